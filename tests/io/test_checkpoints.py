from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import timm
import torch
import transformers
from marks import slow_except
from safetensors import SafetensorError
from tiny import BUILDERS, DEPTH, HF, HF_TEXT, IMAGE, NEURONS, PATCH, TIMM, WIDTH, build
from torch import Tensor, nn

import testreg.io.checkpoints
from testreg import RegisterNeurons, is_patched, patch, unpatch
from testreg.families import find_tower
from testreg.io.checkpoints import load, save
from testreg.io.install import installing, recover
from testreg.io.loading import load_model
from testreg.patching.state import patch_of

RANKED = RegisterNeurons(((1, 77, 3.0), (2, 64, 2.0), (1, 3, 1.0)), provenance={"by": "hand"})
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": 12},
    "text_cfg": {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
}
OPEN_CLIP_TIMM = {
    **OPEN_CLIP,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"},
}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    size = 224 if hasattr(getattr(model, "visual", None), "trunk") else IMAGE
    out = find_tower(model).run(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    return out["last_hidden_state"] if isinstance(out, dict) else out


def tower_and_text() -> nn.Module:
    return open_clip.CustomTextCLIP(**OPEN_CLIP_TIMM)


def hf_clip_whole() -> nn.Module:
    text = {**HF_TEXT, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 0}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=HF, projection_dim=32))


NO_HEAD = {**TIMM, "num_classes": 0, "global_pool": "avg"}
DYNAMIC = {"depth": 3, "img_size": 96, "dynamic_img_size": True}
WHOLE = {
    "hf_classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=7)),
    "hf_clip_whole": hf_clip_whole,
    "timm_no_head": lambda: timm.create_model("vit_base_patch16_224", **NO_HEAD),
    "timm_dynamic": lambda: timm.create_model("vit_tiny_patch16_224", **DYNAMIC),
    "timm_channels_last": lambda: build("timm_vit").to(memory_format=torch.channels_last),
    "open_clip_quick_gelu": lambda: open_clip.CLIP(**OPEN_CLIP, quick_gelu=True),
    "open_clip_timm": tower_and_text,
}  # fmt: skip


# Neither open_clip's config nor safetensors has a word for these: the same numbers, added up in another order.
OTHER_KERNELS = ("open_clip_sequence_first", "timm_channels_last")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return WHOLE[name]().eval() if name in WHOLE else build(name)


def arguments(name: str) -> dict[str, Any]:
    """What `save` has to be told."""
    if name == "open_clip_timm":
        return {"arch": OPEN_CLIP_TIMM}
    if name.startswith("timm"):  # which timm itself records from 1.0.31 on
        return {"model_args": {"timm_no_head": NO_HEAD, "timm_dynamic": DYNAMIC}.get(name, TIMM)}
    return {"arch": OPEN_CLIP} if name.startswith("open_clip") else {}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = patch(make(name).to(dtype), RANKED, **options)
    save(model, folder, **arguments(name))
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, file: str = "testreg.json", **changes: Any) -> None:
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **changes}))


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """open_clip's registry, with a tiny model only."""
    configs: dict[str, Any] = {"tiny": OPEN_CLIP}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    return configs


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_except(
        itertools.product([*BUILDERS, *WHOLE], [torch.float32, torch.bfloat16]),
        *[(name, torch.float32) for name in (*BUILDERS, *WHOLE)],
        *[(name, torch.bfloat16) for name in ("timm_vit", "hf_vit", "open_clip")],
    ),
)
def test_loads_as_it_was_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "out", dtype, num_registers=2, split_neurons=True, zero="all", max_over="layer")
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"a pickle that nobody may open")
    bare = name == "torchvision_vit"
    loaded = load(tmp_path / "out", build(name, seed=1) if bare else None)
    assert type(loaded) is type(model)
    assert is_patched(loaded)
    assert not loaded.training
    assert patch_of(loaded).options == patch_of(model).options
    assert patch_of(loaded).neurons == patch_of(model).neurons
    states = model.state_dict(), loaded.state_dict()
    assert [(key, value.dtype) for key, value in states[0].items()] == [
        (key, value.dtype) for key, value in states[1].items()
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    if name in OTHER_KERNELS:
        torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=1e-4 if dtype is torch.float32 else 0.1)
    if name == "timm_channels_last":
        assert torch.equal(output(loaded.to(memory_format=torch.channels_last)), output(model))
    elif name not in OTHER_KERNELS:
        assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("name", [name for name in (*BUILDERS, *WHOLE) if name != "torchvision_vit"])
def test_stock_libraries_load_it_unpatched(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = unpatch(saved(name, tmp_path))
    with caplog.at_level("WARNING"):
        if name.startswith("timm"):
            stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        elif name.startswith("open_clip"):
            stock = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[0].eval()
        else:
            stock, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
            assert not any(info.values())
    assert not caplog.records
    assert not is_patched(stock)
    torch.testing.assert_close(output(stock), output(model), rtol=0, atol=1e-4)
    if name not in OTHER_KERNELS:
        assert torch.equal(output(stock), output(model))


def test_auto_model_loads_the_tower(tmp_path: Path) -> None:
    model = unpatch(saved("hf_dinov2", tmp_path))
    assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path)), output(model))


def test_both_towers_of_a_clip_survive(tmp_path: Path) -> None:
    model = saved("open_clip_timm", tmp_path)
    tokens = torch.randint(1, 99, (2, 16))
    with torch.no_grad():
        assert torch.equal(load(tmp_path).encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_fp16"])
def test_mixed_precision_of_open_clip(precision: str, tmp_path: Path, registered: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = patch(open_clip.create_model("tiny", precision=precision).eval(), NEURONS)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert [value.dtype for value in loaded.parameters()] == [value.dtype for value in model.parameters()]
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    if precision == "bf16":  # half precision on a CPU needs kernels that not all releases have
        assert torch.equal(output(loaded), output(model))


def test_open_clip_config_is_found_by_structure(tmp_path: Path, registered: dict[str, Any]) -> None:
    model = patch(build("open_clip"), NEURONS)
    registered["deeper"] = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "layers": 5}}
    registered["same"] = OPEN_CLIP
    registered["other-text"] = {**OPEN_CLIP, "text_cfg": {**OPEN_CLIP["text_cfg"], "layers": 3}}
    registered["timm"] = OPEN_CLIP_TIMM
    for each in (model, patch(make("open_clip_timm"), NEURONS)):
        save(each, tmp_path / "a")
        assert torch.equal(output(load(tmp_path / "a")), output(each))

    registered["other-heads"] = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "head_width": 24}}
    with pytest.raises(ValueError, match=r"2 of open_clip's configs fit this CLIP: pass arch="):
        save(model, tmp_path / "b")
    model.testreg_source = "open_clip:tiny/some_tag"  # type: ignore[assignment]
    save(model, tmp_path / "b")
    loaded = load(tmp_path / "b")
    assert loaded.testreg_source == "open_clip:tiny/some_tag"
    registered.clear()
    with pytest.raises(ValueError, match="open_clip has no config 'tiny'"):
        save(loaded, tmp_path / "c")
    del loaded.testreg_source
    with pytest.raises(ValueError, match="no config of open_clip fits"):
        save(loaded, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_loaded_checkpoint_can_be_saved_again(tmp_path: Path, registered: dict[str, Any]) -> None:
    registered.clear()
    model = saved("open_clip", tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    save(load(tmp_path / "b"), tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    assert torch.equal(output(load(tmp_path / "c")), output(model))


def test_ties_and_bare_weights(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.tower = build("timm_vit", seed)
            self.head = self.alias = nn.Linear(WIDTH, 3)

    model = patch(Pair(0), NEURONS)
    model.head.half()
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"bare weights of a Pair.*load\(folder, model="):
        load(tmp_path)
    given = Pair(1)
    weight = given.head.weight
    assert load(tmp_path, given) is given
    assert given.head.weight is given.alias.weight is weight
    assert [value.dtype for value in given.parameters()] == [value.dtype for value in model.parameters()]
    assert torch.equal(output(given), output(model))


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit", "open_clip"])
def test_weights_go_into_a_given_model(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path, torch.bfloat16)
    given = build(name, seed=1)
    assert torch.equal(output(load(tmp_path, given, device="cpu")), output(model))


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ("timm_dinov2", {}, "do not fit this VisionTransformer .*unexpected: "),
        ("timm_vit", {"neurons": RegisterNeurons(((9, 0, None),)).to_json()}, "block 9 .* out of range"),
    ],
)
def test_a_given_model_that_does_not_fit_is_left_alone(
    given: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved("timm_vit", tmp_path)
    edit(tmp_path, **changes)
    model = build(given, seed=1)
    before = output(model)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, model)
    assert not is_patched(model)
    assert torch.equal(output(model), before)
    with pytest.raises(RuntimeError, match="already patched"):
        load(tmp_path, patch(model, NEURONS))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    edit(folder, files=["config.json", "pytorch_model.bin"])


def wrong_config(folder: Path) -> None:
    args = json.loads((folder / "config.json").read_text())["model_args"]
    edit(folder, "config.json", model_args={**args, "depth": 3})


DAMAGES = {
    "gone": (shutil.rmtree, FileNotFoundError, "there is no checkpoint folder"),
    "no record": (lambda f: (f / "testreg.json").unlink(), FileNotFoundError, "not a patched .*testreg apply"),
    "truncated weights": (truncate, ValueError, r"model.safetensors is damaged or truncated"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
    "only a pickle": (only_pickle, ValueError, "no safetensors file, and testreg reads no pickles"),
    "config of another": (wrong_config, ValueError, "could not be rebuilt by timm .*unexpected: blocks.3"),
    "truncated record": (lambda f: (f / "testreg.json").write_text('{"format": "tes'), ValueError, "not valid JSON"),
    "foreign record": (lambda f: (f / "testreg.json").write_text('{"a": 1}'), ValueError, "not written by testreg"),
    "no version": (lambda f: edit(f, version="1"), ValueError, "version must be a whole number"),
    "path": (lambda f: edit(f, files=["../model.safetensors"]), ValueError, '"files" is not valid'),
    "library": (lambda f: edit(f, library="os"), ValueError, '"library" is not valid'),
    "class": (lambda f: edit(f, library="transformers", class_name="pipeline"), ValueError, "no class pipeline"),
    "options": (lambda f: edit(f, options={"num_registers": 0}), ValueError, '"options" is not valid'),
    "neurons": (lambda f: edit(f, neurons=[[1, 2]]), ValueError, "register neuron JSON"),
    "other neurons": (lambda f: edit(f, neurons=RegisterNeurons(((9, 0, None),)).to_json()), ValueError, "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_named(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    saved("timm_vit", folder)
    harm, kind, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(kind, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_newer_version_is_read_with_a_warning(tmp_path: Path) -> None:
    model = saved("timm_vit", tmp_path)
    edit(tmp_path, version=2, colour="red")
    with pytest.warns(UserWarning, match=r"version 2, newer than .* ignored: colour"):
        loaded = load(tmp_path)
    assert torch.equal(output(loaded), output(model))


def test_an_id_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("hf_clip", tmp_path)
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    with pytest.raises(OSError, match="no folder someone/clip, and no repository of that name could be fetched"):
        load("someone/clip")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert torch.equal(output(load("someone/clip")), output(model))
    assert asked == [("someone/clip", ["*.json", "*.txt", "*.safetensors"])]


def test_only_patched_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not patched: call testreg.patch"):
        save(build("timm_vit"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_models_that_could_not_be_rebuilt_are_refused(tmp_path: Path) -> None:
    timm_model = patch(build("timm_vit"), NEURONS)
    timm_model._model_args = {}  # as before timm 1.0.31
    with pytest.raises(ValueError, match=r"could not be rebuilt .*model_args="):
        save(timm_model, tmp_path / "out")
    classifier = patch(make("hf_classifier"), NEURONS)
    classifier.classifier = nn.Linear(WIDTH, 3)
    with pytest.raises(ValueError, match=r"could not be rebuilt .*of another shape: classifier"):
        save(classifier, tmp_path / "out")
    with pytest.raises(ValueError, match="one dtype"):
        save(patch(make("hf_clip_whole"), NEURONS).to(torch.float32).apply(_half_norms), tmp_path / "out")
    assert not any(tmp_path.iterdir())
    save(timm_model, tmp_path / "out", model_args={**TIMM, "num_classes": 10})
    assert torch.equal(output(load(tmp_path / "out")), output(timm_model))


def _half_norms(module: nn.Module) -> None:
    if isinstance(module, nn.LayerNorm):
        module.half()


@pytest.mark.parametrize("name", ["notes.txt", "testreg.json"])
def test_folders_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="choose a new or an empty folder"):
        saved("timm_vit", tmp_path)
    with pytest.raises(FileExistsError, match="choose a new or an empty folder"):
        saved("timm_vit", tmp_path / name)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_checkpoint_is_replaced_and_other_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = patch(build("hf_vit"), NEURONS)
    save(model, ".", processor=transformers.ViTImageProcessor())
    (tmp_path / "README.md").write_text("mine")
    assert {"config.json", "preprocessor_config.json"} < set(os.listdir("."))
    other = saved("torchvision_vit", Path("."))
    assert set(os.listdir(".")) == {"README.md", "model.safetensors", "testreg.json"}
    assert torch.equal(output(load(".", build("torchvision_vit", seed=1))), output(other))


WRITERS = ["timm_vit", "hf_vit", "open_clip"]


@pytest.mark.parametrize(
    ("failure", "previous"),
    [
        *((name, previous) for name in WRITERS for previous in (True, False)),
        *((move, True) for move in range(6)),
        *((move, False) for move in range(3)),
    ],
)
def test_a_failed_save_changes_nothing(
    failure: str | int, previous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while a library's weights are written, or one of the moves into the folder fails."""
    folder = tmp_path / "out"
    if previous:
        saved("timm_clip", folder)
        (folder / "README.md").write_text("mine")
    before = contents(tmp_path)

    def full(tensors: dict[str, Tensor], path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise (OSError if failure == "timm_vit" else SafetensorError)("No space left on device")

    moves: list[Path] = []

    def rename(source: Path, destination: Path) -> None:
        if len(moves) == failure:
            moves.append(source)
            raise OSError(28, "No space left on device")
        moves.append(source)
        os.replace(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    if isinstance(failure, str):
        monkeypatch.setattr(testreg.io.formats, "save_file", full)
        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match=r"left as it was.*No space left"):
        saved(failure if isinstance(failure, str) else "timm_vit", folder)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if previous else [])
    if failure == 5:  # a crash on the way leaves nothing that passes for a checkpoint
        assert [moves[0], moves[5].name] == [folder / "testreg.json", "testreg.json"]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, nn.Module, Callable[[], None]]:
    """A folder with a checkpoint and a README, the model of a second one, and how that is saved there."""
    folder = tmp_path / "out"
    saved("hf_vit", folder)
    (folder / "README.md").write_text("mine")
    model = patch(build("timm_vit"), NEURONS)
    return folder, model, lambda: save(model, folder, model_args=TIMM)


WRITES = ((os, "fsync"), (os, "rename"), (os, "mkdir"), (Path, "write_text"))


def watched(run: Callable[[], None], before: Callable[[int], None], steps: Any = WRITES) -> None:
    """Run, and tell `before` before each step, numbered from 0."""
    numbers = itertools.count()

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            before(next(numbers))
            return original(*args, **kwargs)

        return step

    with pytest.MonkeyPatch.context() as patched:
        for owner, name in steps:
            patched.setattr(owner, name, wrap(getattr(owner, name)))
        run()


def killed_at(step: int, run: Callable[[], None]) -> bool:
    """Run in a child that is gone before its n-th step, without any cleaning up. Whether it came that far."""
    child = os.fork()
    if child == 0:
        try:
            watched(run, lambda number: os._exit(9) if number == step else None, (*WRITES, (shutil, "rmtree")))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("previous", [True, False])
def test_a_save_may_be_killed_at_any_step(previous: bool, two: Any) -> None:
    folder, model, again = two
    backup = folder.parent / "backup"
    folder.rename(backup) if previous else shutil.rmtree(folder)
    old = contents(backup)
    save(model, folder, model_args=TIMM)
    new = contents(folder) | ({"README.md": b"mine"} if previous else {})
    found: list[str] = []
    while True:
        shutil.rmtree(folder)
        if previous:
            shutil.copytree(backup, folder)
        if not killed_at(len(found), again):
            break
        if (folder / "testreg.json").exists():
            found.append("new" if type(load(folder)) is type(model) else "old")
            assert contents(folder).items() >= (new if found[-1] == "new" else old).items()
        elif (folder / ".testreg-save").exists():
            found.append("refused")
            for loader in (load, lambda name: load_model(str(name))):
                with pytest.raises(OSError, match=r"was interrupted, .*testreg.io.install.recover\(folder\)"):
                    loader(folder)
        else:
            found.append("nothing")
            assert not contents(folder)
        if len(found) % 2:
            recover(folder)
            assert contents(folder) == (new if found[-1] == "new" else old)
        again()
        assert contents(folder) == new
        assert {path.name for path in folder.parent.iterdir()} <= {"out", "backup"}
    assert list(dict.fromkeys(found)) == ["old" if previous else "nothing", "refused", "new"]
    assert found.count("refused") >= (6 if previous else 10)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_rollback_may_be_killed_at_any_step(two: Any) -> None:
    folder, _, again = two
    old = contents(folder)
    rolled_back = 0

    class Killed(BaseException):
        """As good as a kill here, since `recover` cleans nothing up after an error."""

    def recovered(kill_at: int) -> bool:
        def kill(step: int) -> None:
            if step == kill_at:
                raise Killed

        try:
            watched(lambda: recover(folder), kill, (*WRITES, (shutil, "rmtree")))
        except Killed:
            return False
        return True

    for step in itertools.count():
        assert killed_at(step, again)
        if (folder / "testreg.json").exists() and contents(folder)["testreg.json"] != old["testreg.json"]:
            break
        kills = 0
        while not recovered(kills):
            kills += 1
        rolled_back += kills > 1
        assert contents(folder) == old
        assert set(os.listdir(folder)) == set(old)
    assert rolled_back >= 6


def test_a_disk_that_fills_up_at_any_step(two: Any) -> None:
    folder, model, again = two
    old = contents(folder)
    failures = 0

    def full(step: int) -> None:
        if step == failures:
            raise OSError(28, "No space left on device")

    while True:
        try:
            watched(again, full)
        except OSError as error:
            message = str(error)
        else:
            break
        failures += 1
        assert "left as it was: [Errno 28] No space left" in message
        assert contents(folder) == old
        assert set(os.listdir(folder)) == set(old)
    assert failures > 15
    assert type(load(folder)) is type(model)


def test_only_one_process_saves_into_a_folder(two: Any) -> None:
    folder, model, again = two
    old = contents(folder)
    with installing(folder, []) as stage:
        (stage / "config.json").write_text("{}")
        with pytest.raises(OSError, match=r"another process is saving into .*out"):
            again()
        (stage / "config.json").unlink()
    assert contents(folder) == old
    again()
    assert type(load(folder)) is type(model)


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        saved("timm_vit", tmp_path / "timm")
        saved("hf_vit", tmp_path / "hf")
    finally:
        os.umask(before)
    for folder in tmp_path.iterdir():
        assert folder.stat().st_mode & 0o777 == 0o750
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_stranger_s_record_does_not_have_files_deleted(two: Any) -> None:
    folder, _, again = two
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("mine")
    (folder / "thesis.docx").write_text("mine")
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_text("mine")
    (folder / "linked.safetensors").symlink_to("weights", target_is_directory=True)
    edit(folder, files=["config.json", "model.safetensors", ".git", "README.md", "thesis.docx", "linked.safetensors"])
    again()
    kept = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors", "testreg.json"}
    assert kept == {".git", "README.md", "thesis.docx", "weights", "linked.safetensors"}
    assert (folder / ".git" / "config").read_text() == (folder / "weights" / "model.safetensors").read_text() == "mine"

    pending = folder / ".testreg-save"  # which a stranger may send along as well
    (pending / "new").mkdir(parents=True)
    (pending / "new" / "testreg.json").write_text(json.dumps({"files": ["thesis.docx", ".git", "../x", 3]}))
    (pending / "old").mkdir()
    (pending / "old" / "README.md").write_text("theirs")
    (folder / "testreg.json").unlink()
    recover(folder)
    assert (folder / "README.md").read_text() == (folder / "thesis.docx").read_text() == "mine"
    pending.symlink_to(folder.parent)
    with pytest.raises(OSError, match="holds links"):
        recover(folder)


def test_a_folder_in_the_way_is_named(two: Any) -> None:
    folder, _, again = two
    before = contents(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(OSError, match=r"left as it was: .*config.json is in the way"):
        again()
    assert contents(folder) == {path: data for path, data in before.items() if path != "config.json"}


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def directory(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def dangling(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")


def device(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("file", ["testreg.json", "config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("harm", [fifo, directory, dangling, device])
def test_what_is_no_file_is_named(harm: Callable[[Path, str], None], file: str, tmp_path: Path) -> None:
    """It neither hangs, nor is the model loaded unpatched."""
    save(patch(build("hf_vit"), NEURONS), tmp_path, processor=transformers.ViTImageProcessor())
    harm(tmp_path, file)
    for loader in (load, lambda folder: load_model(str(folder))):
        with pytest.raises((OSError, ValueError), match=file):
            loader(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "pytorch_model.bin", 7, "a\nb.safetensors"]
)
def test_weights_outside_of_the_folder_are_not_read(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, index = tmp_path / "out", "model.safetensors.index.json"
    model = patch(build("hf_vit"), NEURONS)
    monkeypatch.setattr(model, "save_pretrained", functools.partial(model.save_pretrained, max_shard_size="100KB"))
    save(model, folder, processor=transformers.ViTImageProcessor())
    assert torch.equal(output(load(folder)), output(model))
    assert torch.equal(output(load_model(str(folder)).model), output(model))
    shards = json.loads((folder / index).read_text())["weight_map"]
    assert len(set(shards.values())) > 1
    first = next(iter(shards))
    shutil.copy(folder / shards[first], tmp_path / "secret.safetensors")
    edit(folder, index, weight_map={**shards, first: name})
    refused = pytest.raises(ValueError, match=r"index.json (names .*no safetensors file of its folder|is damaged)")
    with refused:
        load(folder)
    with refused:
        load_model(str(folder))
    (folder / "testreg.json").unlink()
    with refused:
        load_model(str(folder))
    with refused:
        load_model(f"hf:{folder}")


def test_a_record_that_was_tampered_with(tmp_path: Path) -> None:
    """Hundreds of records and of weights: each is refused with one error that names the file, or means the same."""
    saved("timm_vit", tmp_path)
    text = (tmp_path / "testreg.json").read_text()
    data = json.loads(text)
    rng = random.Random(0)
    long = "\x1b[31m" + "x" * 10**6
    junk = [
        None,
        True,
        -1,
        0.5,
        10**400,
        float("inf"),
        float("nan"),
        long,
        "",
        "\0",
        "\ud800",
        [],
        [[]],
        {},
        {long: long},
    ]
    records = [text[:cut] for cut in range(0, len(text) - 2, 17)]
    records += ["[" * 10**5, '{"format":' * 10**5, "9" * 10**4, "1e999", "null", "[]", '"x"', "\ufeff" + text]
    records += [json.dumps({**data, key: value}) for key in data for value in junk]
    records += [json.dumps({key: data[key] for key in data if key != gone}) for gone in data]
    records += [
        json.dumps({**data, part: {**data[part], key: value}})
        for part, values in (("options", junk), ("neurons", junk))
        for key in data[part]
        for value in values
    ]
    for _ in range(100):
        at = rng.randrange(len(text))
        records.append(text[:at] + chr(rng.randrange(1, 128)) + text[at + 1 :])
    model = build("timm_vit", seed=1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    refused = 0
    for record in records:
        (tmp_path / "testreg.json").write_text(record, encoding="utf-8", errors="surrogatepass")
        before = contents(tmp_path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a newer version
                loaded = load(tmp_path, model)
        except (OSError, ValueError) as error:
            refused += 1
            message = str(error)
            assert str(tmp_path) in message, message[:500]
            assert len(message) < 2000, message[:500]
            assert message.isprintable()
            assert not is_patched(model)
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        else:
            assert is_patched(loaded)
            unpatch(model).load_state_dict(state)
        assert contents(tmp_path) == before
    assert len(records) > 300
    assert refused > 250


def test_weights_that_were_tampered_with(tmp_path: Path) -> None:
    saved("timm_vit", tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    cases = [whole[:cut] for cut in (0, 1, 7, 8, 9, 100, 8 + length, 9 + length, len(whole) - 1)]
    cases += [
        size.to_bytes(8, "little") + whole[8:] for size in (0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1)
    ]
    changes = [(b'"F32"', b'"I32"'), (b'"F32"', b'"Q99"'), (b"[48]", b"[-1]"), (b'"dtype"', b'"dtypo"'), (b"{", b"[")]
    changes += [(b"[48]", b"[49]"), (b'"shape"', b'"shame"'), (b"data_offsets", b"date_offsets")]
    for old, new in changes:
        assert old in header
        cases.append(whole[:8] + header.replace(old, new, 1) + whole[8 + length :])
    rng = random.Random(0)
    for _ in range(200):
        at = rng.randrange(8 + length)
        cases.append(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
    model = build("timm_vit", seed=1)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    refused = 0
    for case in cases:
        path.write_bytes(case)
        for given in (None, model):
            try:
                loaded = load(tmp_path, given)
            except (OSError, ValueError) as error:
                refused += 1
                message = str(error)
                assert str(tmp_path) in message, message[:500]
                assert len(message) < 2000
                assert message.isprintable()
                assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
            else:
                assert is_patched(loaded)
                if given is not None:
                    unpatch(model).load_state_dict(state)
        assert path.read_bytes() == case
    assert refused > len(cases)


# Static registers, targets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), [("hf_vit", "token"), ("torchvision_vit", "bias"), ("open_clip", "bias")])
def test_static_registers_are_saved_and_loaded(name: str, form: Any, tmp_path: Path) -> None:
    static = testreg.StaticRegisters(torch.randn(4, 1, 48), RANKED.by_block(), form)
    model = saved(name, tmp_path, static=static)
    assert "testreg.static.safetensors" in os.listdir(tmp_path)
    given = make(name) if name == "torchvision_vit" else None
    loaded = load(tmp_path, given)
    assert patch_of(loaded).options == {**patch_of(model).options, "static": form}
    assert patch_of(loaded).static.states.equal(static.states)  # type: ignore[union-attr]
    torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=0)
    assert list(model.state_dict()) == list(make(name).state_dict())


def test_a_checkpoint_without_its_static_registers_is_refused(tmp_path: Path) -> None:
    saved("hf_vit", tmp_path, static=testreg.StaticRegisters(torch.randn(4, 1, 48), RANKED.by_block()))
    (tmp_path / "testreg.static.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"testreg\.static\.safetensors is damaged"):
        load(tmp_path)
    (tmp_path / "testreg.static.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"testreg\.static\.safetensors is missing"):
        load(tmp_path)


def test_a_target_is_not_saved(tmp_path: Path) -> None:
    model = patch(make("hf_vit"), RANKED, target=torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"patched with a target.*testreg\.steered"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
