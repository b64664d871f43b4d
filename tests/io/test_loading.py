from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from imitations import dinov2
from marks import slow_except
from PIL import Image
from tiny import DEPTH, HF, IMAGE, MLP_WIDTH, NEURONS, PATCH, TIMM, TIMM_RECORDS, WIDTH, build
from torch import Tensor, nn
from torchvision.models import Weights, WeightsEnum
from torchvision.transforms._presets import ImageClassification

from testreg import features, is_patched, patch
from testreg.families import find_tower
from testreg.io.checkpoints import load, save
from testreg.io.loading import LoadedModel, load_model
from testreg.io.preprocessing import OneImage, transform_for

PHOTO = Image.effect_noise((100, 80), 60).convert("RGB")
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": 12},
    "text_cfg": {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2},
}
SQUARE = {"height": IMAGE, "width": IMAGE}
CROP = {"size": {"shortest_edge": 72}, "crop_size": SQUARE}
PROCESSORS: dict[str, Any] = {
    "hf_vit": transformers.ViTImageProcessor(size=SQUARE),
    "hf_deit": transformers.DeiTImageProcessor(size={"height": 72, "width": 72}, crop_size=SQUARE),
    "hf_clip": transformers.CLIPImageProcessor(**CROP),
    "hf_siglip": transformers.SiglipImageProcessor(size=SQUARE),
    "hf_dinov2": transformers.BitImageProcessor(**CROP),
    "hf_dinov2_registers": transformers.BitImageProcessor(**CROP),
}


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_load = torch.load

    def refuse(file: object, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(file, io.BytesIO), "unpickled"  # a tensor that this test pickled in memory
        return torch_load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", refuse)


def write(name: str, folder: Path) -> nn.Module:
    """A folder as the model's own library writes it."""
    model = build(name)
    if name.startswith("timm"):
        model.pretrained_cfg["input_size"] = (3, IMAGE, IMAGE)
        timm.models.save_for_hf(model, str(folder), model_args=TIMM, safe_serialization=True)
    elif name.startswith("open_clip"):
        save(patch(build(name), NEURONS), folder, arch=OPEN_CLIP)
        (folder / "testreg.json").unlink()
    else:
        model.save_pretrained(folder)
        PROCESSORS[name].save_pretrained(folder)
    return model


@torch.no_grad()
def run(loaded: LoadedModel) -> Any:
    """What the tower makes of the photograph, prepared by a transform that went to another process."""
    transform = pickle.loads(pickle.dumps(loaded.transform))
    image = transform(PHOTO)
    assert torch.equal(image, loaded.transform(PHOTO))
    assert image.dtype is torch.float32
    assert not loaded.model.training
    return find_tower(loaded.model).run(image[None])


@pytest.mark.parametrize("image_size", [None, 96])
@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2_reg4", "open_clip", *PROCESSORS])
def test_a_folder_is_loaded_by_its_own_library(name: str, image_size: int | None, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    loaded = load_model(str(tmp_path), image_size=image_size)
    assert type(loaded.model) is type(model)
    size = image_size or IMAGE
    assert loaded.transform(PHOTO).shape == (3, size, size)
    run(loaded)
    if image_size is None:
        states = loaded.model.state_dict(), model.state_dict()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert torch.equal(transform_for(loaded.model)(PHOTO), loaded.transform(PHOTO))


def test_preprocessing_is_the_library_s(tmp_path: Path) -> None:
    write("timm_vit", tmp_path / "timm")
    expected = timm.data.create_transform(
        input_size=(3, IMAGE, IMAGE), crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic"
    )
    assert torch.equal(load_model(str(tmp_path / "timm")).transform(PHOTO), expected(PHOTO))
    write("hf_clip", tmp_path / "hf")
    expected = PROCESSORS["hf_clip"](PHOTO, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(load_model(f"hf:{tmp_path / 'hf'}").transform(PHOTO), expected)
    write("open_clip", tmp_path / "open_clip")
    expected = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")[2](PHOTO)
    assert torch.equal(load_model(str(tmp_path / "open_clip")).transform(PHOTO), expected)


def test_image_size_keeps_the_share_that_is_cropped(tmp_path: Path) -> None:
    write("hf_dinov2", tmp_path)
    processor = load_model(str(tmp_path), image_size=128).processor
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (144, 128)


def test_the_class_that_was_saved_is_loaded(tmp_path: Path) -> None:
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=7)).bfloat16()
    classifier.save_pretrained(tmp_path)
    PROCESSORS["hf_vit"].save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert torch.equal(loaded.model.classifier.weight, classifier.classifier.weight)
    assert loaded.model.dtype is torch.bfloat16
    run(loaded)
    fresh = load_model(f"hf:{tmp_path}", pretrained=False).model
    assert type(fresh) is type(classifier)
    assert not torch.equal(fresh.classifier.weight, classifier.classifier.weight.float())


@pytest.mark.parametrize("name", ["timm_clip", "hf_siglip", "open_clip"])
def test_a_patched_folder(name: str, tmp_path: Path) -> None:
    write(name, tmp_path / "plain")
    plain = load_model(str(tmp_path / "plain"))
    told = {"model_args": TIMM} if name.startswith("timm") else {}
    save(patch(plain.model, NEURONS), tmp_path / "patched", processor=plain.processor, **told)
    loaded = load_model(str(tmp_path / "patched"), device="cpu")
    assert is_patched(loaded.model)
    assert torch.equal(loaded.transform(PHOTO), plain.transform(PHOTO))
    outputs = run(loaded), run(plain)
    for ours, theirs in zip(*map(torch.utils._pytree.tree_leaves, outputs), strict=True):
        assert torch.equal(ours, theirs)
    if name == "hf_siglip":
        assert load_model(str(tmp_path / "patched"), image_size=96).transform(PHOTO).shape == (3, 96, 96)
    else:
        with pytest.raises(ValueError, match="patch the original at that size"):
            load_model(str(tmp_path / "patched"), image_size=96)


def test_timm_and_open_clip_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("timm:vit_tiny_patch16_224", image_size=32, pretrained=False)
    assert loaded.transform(PHOTO).shape == (3, 32, 32)
    assert run(loaded).shape == (1, 5, 192)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-B-32": OPEN_CLIP})
    loaded = load_model("open_clip:ViT-B-32/openai", image_size=32, pretrained=False)
    assert loaded.model.testreg_source == "open_clip:ViT-B-32/openai"
    assert loaded.transform(PHOTO).shape == (3, 32, 32)
    assert any(type(module).__name__ == "QuickGELU" for module in loaded.model.modules())
    run(loaded)


@pytest.mark.parametrize(("image_size", "made"), [(None, 224), (70, 64), (5, 16)])
def test_torch_hub(image_size: int | None, made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def hub_load(*args: str, **kwargs: object) -> nn.Module:
        asked.append((args, kwargs))
        return dinov2.DinoVisionTransformer()

    monkeypatch.setattr(torch.hub, "load", hub_load)
    loaded = load_model(
        "hub:facebookresearch/dinov2:main/dinov2_vits14", image_size=image_size, pretrained=bool(image_size)
    )
    kwargs: dict[str, object] = {} if image_size else {"pretrained": False}
    assert asked == [(("facebookresearch/dinov2:main", "dinov2_vits14"), kwargs)]
    assert loaded.transform(PHOTO).shape == (3, made, made)
    assert loaded.model.testreg_source == loaded.name
    assert transform_for(loaded.model)(PHOTO).shape == (3, 224, 224)
    if made == IMAGE:
        run(loaded)


class TinyWeights(WeightsEnum):
    DEFAULT = Weights(url="", transforms=functools.partial(ImageClassification, crop_size=IMAGE), meta={})

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return build("torchvision_vit").state_dict()


def tiny_vit(*, weights: TinyWeights | None = None, progress: bool = True, **kwargs: Any) -> nn.Module:
    sizes = {"image_size": IMAGE, "num_classes": 10, **kwargs}
    vit = torchvision.models.VisionTransformer(
        patch_size=PATCH, num_layers=DEPTH, num_heads=4, hidden_dim=WIDTH, mlp_dim=MLP_WIDTH, **sizes
    )
    if weights is not None:
        vit.load_state_dict(weights.get_state_dict())
    return vit


@pytest.mark.parametrize("image_size", [None, 96])
def test_torchvision(image_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vit.__annotations__["weights"] = TinyWeights | None  # not the string that postponed evaluation leaves
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, "tiny_vit", tiny_vit)
    loaded = load_model("torchvision:tiny_vit", image_size=image_size)
    size = image_size or IMAGE
    assert loaded.transform(PHOTO).shape == (3, size, size)
    assert torch.equal(loaded.model.class_token, build("torchvision_vit").class_token)
    patch(loaded.model, NEURONS)
    save(loaded.model, tmp_path)
    again = load_model(str(tmp_path))
    assert torch.equal(run(again), run(loaded))
    assert torch.equal(again.transform(PHOTO), loaded.transform(PHOTO))
    loaded.model.heads = nn.Linear(WIDTH, 3)
    with pytest.raises(ValueError, match=r"could not be rebuilt .*heads"):
        save(loaded.model, tmp_path)


def test_bare_weights_need_their_model(tmp_path: Path) -> None:
    save(patch(build("torchvision_vit"), NEURONS), tmp_path)
    with pytest.raises(ValueError, match=r"load\(folder, model="):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="pass transform="):
        transform_for(load(tmp_path, build("torchvision_vit")))


NAMES = {
    "dinov2": (ValueError, "neither a checkpoint folder nor a model name: names are timm:NAME"),
    "facebook/dinov2-small": (ValueError, "did you mean hf:facebook/dinov2-small"),
    "vit_tiny_patch16_224": (ValueError, r"did you mean timm:vit_tiny_patch16_224\?"),
    "vit_small_patch14_dinov2.lvd142m": (ValueError, "did you mean timm:vit_small_patch14_dinov2.lvd142m"),
    "ViT-B-32/openai": (ValueError, "did you mean open_clip:ViT-B-32/openai"),
    "keras:vit": (ValueError, "neither a checkpoint folder nor a model name"),
    "timm:": (ValueError, "neither a checkpoint folder nor a model name"),
    "timm:vit_nope": (ValueError, r"cannot load timm:vit_nope: Unknown model.*timm.list_models"),
    "timm:vit_base_patch16_224": (OSError, r"cannot load timm:vit_base_patch16_224: .*Hub"),
    "timm:local-dir:/nowhere": (OSError, r"/nowhere has no model.safetensors"),
    "hf:someone/vit": (OSError, r"cannot load someone/vit: .* HF_HUB_OFFLINE is set.*huggingface.co, and the network"),
    "hf:openai/clip-vit-base-patch16": (
        OSError,
        r"path to a directory containing a \[\.\.\.\]\. HF_HUB_OFFLINE is set",
    ),
    "hf:./nowhere": (OSError, r"there is no folder ./nowhere, nor can that be a name on the Hub"),
    "hf:/a/b/nowhere": (OSError, r"there is no folder /a/b/nowhere, nor can that be a name on the Hub"),
    "open_clip:ViT-B-32": (ValueError, r"open_clip:ViT-B-32 does not say which weights: .* openai, "),
    "open_clip:ViT-B-32/nope": (ValueError, r"cannot load open_clip:ViT-B-32/nope: .*list_pretrained"),
    "open_clip:Nope/openai": (ValueError, r"cannot load open_clip:Nope/openai: .*not found"),
    "hub:dinov2_vits14": (ValueError, "not of the form hub:OWNER/REPO/NAME"),
    "hub:pytorch/nothing/none": (OSError, "cannot load hub:pytorch/nothing/none: .*network"),
    "torchvision:vit_nope": (ValueError, r"cannot load torchvision:vit_nope: .*list_models"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load", offline)
    kind, message = NAMES[name]
    with pytest.raises(kind, match=message):
        load_model(name)


def rename_to_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.rename(folder / "pytorch_model.bin")


FOLDERS: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "no processor": ("hf_vit", lambda f: (f / "preprocessor_config.json").unlink(), ValueError, "no preprocessor_"),
    "hf pickle": ("hf_vit", rename_to_pickle, ValueError, r"no \*.safetensors, and testreg reads no pickles"),
    "timm pickle": ("timm_vit", rename_to_pickle, ValueError, r"no model.safetensors, and testreg reads no pickles"),
    "open_clip pickle": ("open_clip", rename_to_pickle, ValueError, "testreg reads no pickles"),
    "no weights": ("timm_vit", lambda f: (f / "model.safetensors").unlink(), OSError, r"no model.safetensors"),
    "no config": ("timm_vit", lambda f: (f / "config.json").unlink(), OSError, r"no config.json"),
    "foreign config": ("timm_vit", lambda f: (f / "config.json").write_text("{}"), ValueError, "neither of timm"),
    "no JSON": ("timm_vit", lambda f: (f / "config.json").write_text("{"), ValueError, "is damaged"),
    "truncated": ("hf_vit", lambda f: (f / "model.safetensors").write_bytes(b"abc"), ValueError, "cannot load"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_lack_something(case: str, tmp_path: Path) -> None:
    name, harm, kind, message = FOLDERS[case]
    write(name, tmp_path)
    harm(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hf_vit", "config.json"),
        ("hf_vit", "preprocessor_config.json"),
        ("hf_vit", "model.safetensors"),
        ("timm_vit", "config.json"),
        ("timm_vit", "model.safetensors"),
        ("open_clip", "open_clip_config.json"),
        ("open_clip", "open_clip_model.safetensors"),
    ],
)
def test_pipes_devices_and_folders_are_no_files(
    name: str, file: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    write(name, tmp_path)
    (tmp_path / file).unlink()
    make(tmp_path / file)
    with pytest.raises((OSError, ValueError)) as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTImageProcessor, ViTModel
Path({marker!r}).write_text("this ran")
class Config(ViTConfig):
    model_type = "stranger"
class Model(ViTModel):
    config_class = Config
class Processor(ViTImageProcessor):
    pass
"""
AUTO_MAP = {name: f"code.{name.removeprefix('Auto').removeprefix('Image')}" for name in ("AutoConfig", "AutoModel")}
AUTO_MAP["AutoImageProcessor"] = "code.Processor"
ENCODERS = {"encoder": {**HF, "model_type": "vit"}, "decoder": {**HF, "model_type": "vit"}}
TWO_TOWERS = {
    "model_type": "vision-text-dual-encoder",
    "architectures": ["VisionTextDualEncoderModel"],
    "vision_config": {**HF, "model_type": "trocr", "auto_map": AUTO_MAP},
    "text_config": {**HF, "model_type": "bert"},
}
# Which of transformers' classes find code in the folder: without its own word for a model, or in a part of a model.
STRANGERS = {
    "config": {"config.json": {"model_type": "stranger", "auto_map": AUTO_MAP}},
    "model": {
        "config.json": {"model_type": "encoder-decoder", "architectures": None, "auto_map": AUTO_MAP, **ENCODERS}
    },
    "processor": {"preprocessor_config.json": {"image_processor_type": "Processor", "auto_map": AUTO_MAP}},
    "part": {"config.json": TWO_TOWERS},
}


class Stranger:
    """A folder with code, and somebody at the terminal who answers yes to everything."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.marker = folder.parent / "marker"
        self.asked = 0
        monkeypatch.setattr("builtins.input", self.answer)
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])
        folder.mkdir()
        (folder / "code.py").write_text(CODE.format(marker=str(self.marker)))

    def answer(self, *question: object) -> str:
        self.asked += 1
        return "y"

    def edit(self, file: str, changes: dict[str, Any]) -> None:
        config = json.loads((self.folder / file).read_text())
        (self.folder / file).write_text(json.dumps({**config, **changes}))


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    return Stranger(tmp_path / "folder", monkeypatch)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("prefix", ["", "hf:"])
@pytest.mark.parametrize("case", STRANGERS)
def test_code_in_a_folder_is_not_run(case: str, prefix: str, pretrained: bool, stranger: Stranger) -> None:
    write("hf_vit", stranger.folder)
    for file, changes in STRANGERS[case].items():
        stranger.edit(file, changes)
    with pytest.raises(ValueError, match=r"cannot load .*--trust-remote-code") as caught:
        load_model(f"{prefix}{stranger.folder}", pretrained=pretrained)
    assert str(stranger.folder) in str(caught.value)
    assert not stranger.marker.exists()
    assert not stranger.asked


def test_code_is_run_for_who_trusts_it(stranger: Stranger) -> None:
    write("hf_vit", stranger.folder)
    stranger.edit("config.json", {"model_type": "stranger", "auto_map": AUTO_MAP, "architectures": ["Model"]})
    loaded = load_model(str(stranger.folder), trust_remote_code=True)
    assert type(loaded.model).__name__ == "Model"
    assert stranger.marker.exists()
    assert not stranger.asked


def test_code_beside_a_patched_checkpoint_is_not_run(stranger: Stranger) -> None:
    code = (stranger.folder / "code.py").rename(stranger.folder.parent / "code.py")
    save(patch(build("hf_vit"), NEURONS), stranger.folder, processor=PROCESSORS["hf_vit"])
    code.rename(stranger.folder / "code.py")
    stranger.edit("preprocessor_config.json", STRANGERS["processor"]["preprocessor_config.json"])
    with pytest.raises(ValueError, match=r"cannot load .*--trust-remote-code"):
        load_model(str(stranger.folder))
    stranger.edit("config.json", TWO_TOWERS)
    stranger.edit("testreg.json", {"class_name": "VisionTextDualEncoderModel"})
    with pytest.raises(ValueError, match="could not be rebuilt by transformers"):
        load(stranger.folder)
    assert not stranger.marker.exists()
    assert not stranger.asked


@pytest.mark.parametrize("patched", [True, False])
def test_the_code_of_a_text_tower_is_not_run(patched: bool, stranger: Stranger, tmp_path: Path) -> None:
    (stranger.folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": AUTO_MAP}))
    clip = tmp_path / "clip"
    save(patch(build("open_clip"), NEURONS), clip, arch=OPEN_CLIP)
    config = json.loads((clip / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": str(stranger.folder), "hf_tokenizer_name": str(stranger.folder)}
    (clip / "open_clip_config.json").write_text(json.dumps(config))
    if not patched:
        (clip / "testreg.json").unlink()
    with pytest.raises(ValueError, match=r"(cannot load|could not be rebuilt by open_clip).*trust"):
        load_model(str(clip))
    with pytest.raises(ValueError, match="no config of open_clip fits"):
        save(patch(build("open_clip"), NEURONS), tmp_path / "out", arch=config["model_cfg"])
    assert not stranger.marker.exists()
    assert not stranger.asked


def test_asking_is_switched_on_again(stranger: Stranger) -> None:
    before = transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE
    assert before > 0
    write("hf_vit", stranger.folder)
    load_model(str(stranger.folder))
    stranger.edit("config.json", STRANGERS["model"]["config.json"])
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(stranger.folder))
    assert before == transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    """A repository that somebody's torch.hub downloaded."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    stranger = Stranger(tmp_path / "hub" / "someone_dino_main", monkeypatch)
    code = f"open({str(stranger.marker)!r}, 'w').close()\nfrom imitations.dinov2 import DinoVisionTransformer as vit\n"
    (stranger.folder / "hubconf.py").write_text(code)
    return stranger


@pytest.mark.parametrize("listed", ["", "someone_else\nsomeone_din\n"])
def test_a_cached_repository_is_not_trusted(listed: str, cached: Stranger) -> None:
    (cached.folder.parent / "trusted_list").write_text(listed)
    with pytest.raises(
        ValueError, match=r"someone/dino:main, .*not told to trust.*add the line someone_dino to .*/hub/"
    ):
        load_model("hub:someone/dino:main/vit", pretrained=False)
    assert not cached.marker.exists()
    assert not cached.asked


@pytest.mark.parametrize("trust", ["listed", "argument", "owner"])
def test_a_trusted_repository_is_loaded(trust: str, cached: Stranger) -> None:
    owner = "someone"
    if trust == "listed":
        (cached.folder.parent / "trusted_list").write_text("a_b\nsomeone_dino \n")
    elif trust == "owner":
        owner = "facebookresearch"
        cached.folder.rename(cached.folder.parent / "facebookresearch_dino_main")
    loaded = load_model(f"hub:{owner}/dino:main/vit", trust_remote_code=trust == "argument")
    assert type(loaded.model).__name__ == "DinoVisionTransformer"
    assert cached.marker.exists()
    assert not cached.asked


def test_image_size_is_checked() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        load_model("timm:vit_tiny_patch16_224", image_size=0)


@pytest.mark.parametrize(
    "name", slow_except(["timm_vit", "hf_clip", "open_clip", "torchvision"], "timm_vit", "hf_clip", "open_clip")
)
def test_what_save_writes_takes_photographs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` needs neither the original nor its processor, wherever the folder lies."""
    if name == "torchvision":
        model: Any = load_model("torchvision:vit_b_32", pretrained=False).model
        expected = transform_for(model)(PHOTO)
    else:
        write(name, tmp_path / "original")
        loaded = load_model(str(tmp_path / "original"))
        model, expected = loaded.model, loaded.transform(PHOTO)
    expected = features(patch(model, {0: [1]}), expected[None])
    args = {"open_clip": {"arch": OPEN_CLIP}, "timm_vit": {} if TIMM_RECORDS else {"model_args": TIMM}}
    save(model, tmp_path / "saved", **args.get(name, {}))
    PHOTO.save(tmp_path / "photo.png")
    shutil.rmtree(tmp_path / "original", ignore_errors=True)
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    again = load("elsewhere")
    torch.testing.assert_close(features(again, "photo.png"), expected)
    torch.testing.assert_close(features(load_model("elsewhere").model, "photo.png"), expected)


def test_a_model_without_a_processor_says_how_to_write_one(tmp_path: Path) -> None:
    save(patch(build("hf_vit"), NEURONS), tmp_path)
    with pytest.raises(
        ValueError, match=r"pass transform=, or write it there: testreg.save\(model, FOLDER, processor="
    ) as error:
        features(load(tmp_path), PHOTO)
    assert str(tmp_path) in str(error.value)


def test_of_tiles_the_whole_image_is_taken(tmp_path: Path) -> None:
    """LLaVA-NeXT's processor puts it in front of the tiles: (1, tiles, 3, h, w)."""
    size = {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}
    processor = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=[[2 * IMAGE, IMAGE]])
    pixels = processor(images=PHOTO, return_tensors="pt")["pixel_values"]
    assert pixels.shape[:2] == (1, 3)
    found = OneImage(processor)(PHOTO)
    whole = transformers.CLIPImageProcessor(**size)(images=PHOTO.resize((IMAGE, IMAGE)), return_tensors="pt")
    assert torch.equal(found, torch.as_tensor(pixels[0, 0]))
    assert torch.nn.functional.cosine_similarity(found.flatten(), whole["pixel_values"].flatten(), dim=0) > 0.9
    other = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 2 * IMAGE}, max_image_size={"longest_edge": IMAGE}
    )
    assert OneImage(other)(PHOTO).shape == (3, IMAGE, IMAGE)  # which can be told not to cut

    def cuts(images: Any, return_tensors: str) -> dict[str, Any]:
        return {"pixel_values": torch.ones(1, 2, 3, IMAGE, IMAGE)}

    with pytest.raises(ValueError, match="it cuts images into tiles: pass a transform="):
        OneImage(cuts)(PHOTO)
