from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import timm
import torch
import transformers
from safetensors import SafetensorError
from tiny import BUILDERS, DEPTH, HF, HF_TEXT, IMAGE, NEURONS, PATCH, TIMM, WIDTH, build
from torch import Tensor, nn

import testreg.checkpoint
from testreg import RegisterNeurons, is_patched, patch, unpatch
from testreg.checkpoint import load, save
from testreg.families import find_tower
from testreg.register import patch_of

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BUILDERS, *WHOLE])
def test_loads_as_it_was_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "out", dtype, num_registers=2, zero="all", max_over="layer")
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
    if (
        name == "open_clip_sequence_first"
    ):  # the same numbers, added up in another order: open_clip's config has no word for it
        torch.testing.assert_close(output(loaded), output(model), rtol=0, atol=1e-4 if dtype is torch.float32 else 0.1)
    else:
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
    if name != "open_clip_sequence_first":
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
        ("timm_vit", {"neurons": RegisterNeurons(((9, 0, None),)).to_json()}, "layer 9 .* out of range"),
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
        monkeypatch.setattr(testreg.formats, "save_file", full)
        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match=r"left as it was.*No space left"):
        saved(failure if isinstance(failure, str) else "timm_vit", folder)
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if previous else [])
    if failure == 5:  # a crash on the way leaves nothing that passes for a checkpoint
        assert [moves[0], moves[5].name] == [folder / "testreg.json", "testreg.json"]
