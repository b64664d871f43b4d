"""Run all tests with the oldest and the newest releases of the libraries that testreg supports.

    python scripts/matrix.py [ROW ...] [--environments FOLDER]

A row is a set of releases. Each gets a fresh virtual environment, which needs PyPI and about 8 GB of disk. Rows run one
after the other. The output ends with a table of results, and the exit code is 1 if any row failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = (
    "timm==1.0.26",
    "transformers==4.56.0",
    "open_clip_torch==3.0.0",
    "safetensors==0.5.0",
)  # the same as in pyproject.toml
TORCH_2_9 = (
    "torch==2.9.1",
    "torchvision==0.24.1",
    "torchao==0.16.0",
)  # peft needs this torchao, torch 2.9 has no newer
ROWS = {  # {row: the releases that are pinned}
    "oldest": (*TORCH_2_9, *OLDEST),
    "2.9": TORCH_2_9,
    "2.12": ("torch==2.12.1", "torchvision==0.27.1"),
    "2.14": ("torch==2.14.1", "torchvision==0.29.1"),
    "2.15": ("torch==2.15.0",),
}
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "open_clip_torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--environments", type=Path, help="keep the environments there, and use those that are there")
    args = parser.parse_args()
    if unknown := set(args.rows) - ROWS.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}: the rows are {', '.join(ROWS)}")
    lines = [f"| row | {' | '.join(LIBRARIES)} | result | minutes |", "|---" * (len(LIBRARIES) + 3) + "|"]
    failed = False
    for row in args.rows or ROWS:
        with tempfile.TemporaryDirectory() as temporary:
            environment = (args.environments or Path(temporary)) / row
            install(environment, ROWS[row])
            started = time.monotonic()
            code, result = run_tests(environment)
            minutes = (time.monotonic() - started) / 60
        failed |= code != 0
        lines.append(f"| {row} | {' | '.join(versions(environment))} | {result} | {minutes:.1f} |")
    print("\n".join(lines))
    return int(failed)


def install(environment: Path, pins: tuple[str, ...]) -> None:
    """Create the environment if it does not exist; install the pinned releases, and testreg with its dependencies."""
    if not environment.exists():
        venv.create(environment, with_pip=True)
    # Without pip's configuration file, which may restrict torch on this machine.
    pip = [environment / "bin/pip", "install", "-q", *pins, "-e", f"{ROOT}[dev]"]
    subprocess.run(pip, check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull})


def run_tests(environment: Path) -> tuple[int, str]:
    """Run the README's test command (without its installation) for all tests; returns exit code and last line."""
    command = re.search(r"^pip install .*\[dev\].* && (.*pytest.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command is not None, "the README has no test command"
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.Popen(
        f"{command[1]} -m ''",  # all tests, also the slow ones
        shell=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    line = ""
    for line in run.stdout:
        print(line, end="", flush=True)
    return run.wait(), line.strip(" =\n")


def versions(environment: Path) -> list[str]:
    """The installed releases of the libraries in `LIBRARIES`."""
    script = f"from importlib.metadata import version\nfor name in {LIBRARIES}: print(version(name))"
    run = subprocess.run([environment / "bin/python", "-c", script], capture_output=True, text=True, check=True)
    return run.stdout.split()


if __name__ == "__main__":
    sys.exit(main())
