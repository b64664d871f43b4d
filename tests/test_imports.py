"""The house: imports run one way, and the command line starts at once."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import testreg

PACKAGE = Path(testreg.__file__).parent
FLOORS = (  # a room imports from itself and from those below it
    *("__main__", "cli", "demo", "report", "evaluation", "calibration", "measure", "io", "register", "extensions"),
    *("patching", "static", "neurons", "hub", "records", "families", "display", "files"),
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The modules of testreg that a file imports: at its top, in functions, and for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert not node.level, f"{path} imports relatively"
            if node.module.startswith("testreg"):
                yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.startswith("testreg"))


def module_file(name: str) -> Path:
    """The file of a module, or of the module that a name is from."""
    parts = name.split(".")[1:]
    candidates = [PACKAGE.joinpath(*parts[:n]) for n in range(len(parts), 0, -1)]
    found = (file for each in candidates for file in (each.with_suffix(".py"), each / "__init__.py") if file.is_file())
    return next(found, PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_downwards(path: Path) -> None:
    below = FLOORS[FLOORS.index(room(path)) :]
    upwards = {name for name in imported(path) if room(module_file(name)) not in below}
    assert not upwards


def test_there_are_no_circles() -> None:
    edges = {path: {module_file(name) for name in imported(path)} - {path} for path in FILES}
    while leaves := {path for path, targets in edges.items() if not targets & edges.keys()}:
        edges = {path: targets for path, targets in edges.items() if path not in leaves}
    assert not edges, {str(path.relative_to(PACKAGE)) for path in edges}


def test_the_top_of_the_package_is_short() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


@pytest.mark.parametrize(
    "arguments", [["-c", "import testreg"], ["-m", "testreg", "--help"], ["-m", "testreg", "calibrate", "--help"]]
)
def test_starting_does_not_import_torch(arguments: list[str]) -> None:
    run = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert any(module.startswith("testreg") for module in modules)
    assert not {"torch", "huggingface_hub"} & modules


def test_the_version_is_that_of_the_package() -> None:
    assert testreg.__version__ == importlib.metadata.version("testreg")


def test_every_public_name_is_there() -> None:
    assert all(getattr(testreg, name) is not None for name in testreg.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        testreg.nothing  # noqa: B018


def test_patching_rests_on_neither_the_hub_nor_what_notebooks_show() -> None:
    """Lists of neurons call both, when somebody asks them to."""
    code = "import sys, testreg; testreg.patch; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert "testreg.neurons.ranked" in modules
    assert not [each for each in modules if each.startswith(("testreg.hub", "testreg.display", "huggingface_hub"))]


def test_patching_and_calibrating_import_little_beside_torch() -> None:
    """Patching imports no images, plots or model libraries; torch's flex attention imports sympy: half a second."""
    code = (
        "import sys, torch; before = set(sys.modules); import testreg; testreg.patch; print(*sys.modules);"
        "testreg.calibrate; testreg.diagnose; print(*set(sys.modules) - before)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    patching, added = (line.split() for line in printed.splitlines())
    assert not {"PIL", "matplotlib", "timm", "transformers", "open_clip", "torchvision"} & set(patching)
    assert "testreg.register" in patching
    assert "testreg.register" in added
    assert not {"sympy", "torch.nn.attention.flex_attention", "torch._dynamo"} & set(added)
