"""OpenAI's CLIP ViT-B/16, its weights rounded to 8 bits, in four libraries; skipped where it is not at hand."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from imitations import clip
from torch import Tensor, nn

import testreg
from testreg import RegisterNeurons
from testreg.families import activation, checkpoint_names, compare_weights, find_tower, fingerprint, mismatch_of
from testreg.patching.state import patch_of

FOLDER = Path(__file__).parents[3] / "shared" / "models" / "clip-vit-base-patch16"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.is_dir(), reason="the weights are not here")]
HUB, LIST = "openai/clip-vit-base-patch16", "openai-clip-vitb16"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the checkpoint under its name on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / HUB).parent.mkdir()
    runpy.run_path(str(FOLDER / "expand.py"))["main"](str(folder / HUB))
    return folder


@pytest.fixture(scope="module")
def original(folder: Path) -> Any:
    return transformers.CLIPVisionModelWithProjection.from_pretrained(folder / HUB).eval()


@pytest.fixture(scope="module")
def weights(original: Any) -> Weights:
    """Under OpenAI's names."""
    return clip.visual_state(original.state_dict())


def in_timm(weights: Weights, name: str = "vit_base_patch16_clip_quickgelu_224") -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model(f"{name}.openai", pretrained=False)
    named = {f"visual.{key}": value for key, value in weights.items()}
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(named, model), assign=True)
    return model.eval()


def in_open_clip(weights: Weights, name: str = "ViT-B-16-quickgelu") -> nn.Module:
    with torch.device("meta"):
        model: Any = open_clip.create_model(name, load_weights=False, device="meta").visual
    model.load_state_dict(weights, assign=True)
    return model.eval()


def in_openais_class(weights: Weights) -> nn.Module:
    with torch.device("meta"):
        model = clip.VisionTransformer(224, 16, 768, 12, 12)
        model.proj = nn.Parameter(torch.empty(768, 512))
    model.load_state_dict(weights, assign=True)
    return model.eval()


LIBRARIES: dict[str, Callable[[Weights], nn.Module]] = {
    "timm": in_timm,
    "open_clip": in_open_clip,
    "OpenAI": in_openais_class,
}


@pytest.mark.parametrize("library", LIBRARIES)
@torch.no_grad()
def test_one_checkpoint_in_all_libraries(library: str, original: Any, weights: Weights) -> None:
    model, images = LIBRARIES[library](weights), torch.randn(1, 3, 224, 224)
    assert fingerprint(find_tower(model)) == fingerprint(find_tower(original))
    assert activation(find_tower(model)) == activation(find_tower(original)) == "quick_gelu"
    assert mismatch_of(model, find_tower(model)) is None
    torch.testing.assert_close(model(images), original(images).image_embeds, rtol=0, atol=1e-3)


def in_transformers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """Loaded by its name on the hub, which is that of the folder as seen from the one above it."""
    monkeypatch.chdir(folder)
    return transformers.CLIPVisionModelWithProjection.from_pretrained(HUB).eval()


def list_of(model: nn.Module) -> RegisterNeurons:
    neurons = patch_of(testreg.patch(model)).neurons
    testreg.unpatch(model)
    return neurons


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("library", LIBRARIES)
def test_patch_finds_the_list_in_all_libraries(library: str, weights: Weights) -> None:
    """By its weights alone, where the model does not say its name, and without a warning."""
    assert list_of(LIBRARIES[library](weights)) == testreg.bundled()[LIST].truncate()


@pytest.mark.filterwarnings("error::UserWarning")
def test_patch_finds_the_list_in_transformers(
    folder: Path, original: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the name on the hub, and by the weights of a copy with another one."""
    named = in_transformers(monkeypatch, folder)
    assert checkpoint_names(named) == [f"hf:{HUB}"]
    with caplog.at_level("INFO", "testreg"):
        assert list_of(named) == list_of(original) == testreg.bundled()[LIST].truncate()
    assert all(LIST in each.getMessage() and ", verified" in each.getMessage() for each in caplog.records)


def test_the_list_removes_the_outliers_of_other_photographs(original: Any) -> None:
    found = testreg.compare(original, sorted((FOLDER.parents[1] / "images").glob("*.jpg"))[-4:])
    assert found.before.max_over_median > 10
    assert found.after.max_over_median < 1.6
    assert found.before.outlier_fraction > 0.02
    assert found.after.outlier_fraction == 0


def test_gelu_on_these_weights_is_known_without_a_name(weights: Weights) -> None:
    for model, right in (
        (in_open_clip(weights, "ViT-B-16"), "open_clip:ViT-B-16-quickgelu/openai"),
        (in_timm(weights, "vit_base_patch16_clip_224"), "timm:vit_base_patch16_clip_quickgelu_224.openai"),
    ):
        model.__dict__.pop("pretrained_cfg", None)
        with pytest.warns(
            UserWarning, match=f"OpenAI's CLIP ViT-B/16 was trained with quick_gelu.*Load {right} instead"
        ):
            testreg.patch(model, {5: [3]})


@pytest.mark.parametrize(
    ("changed", "likeness"),
    [
        (lambda weight: weight.bfloat16().float(), "same"),
        (lambda weight: rounded(weight, 6), "similar"),
        (lambda weight: rounded(weight, 4), "similar"),
        (lambda weight: weight + 0.1 * weight.std() * torch.randn_like(weight), "similar"),
        (lambda weight: torch.randn_like(weight), "other"),
    ],
)
@torch.no_grad()
def test_likeness_of_changed_weights(
    changed: Callable[[Tensor], Tensor], likeness: str, original: Any, weights: Weights
) -> None:
    torch.manual_seed(0)
    copy = {key: changed(value) if "c_proj.weight" in key else value for key, value in weights.items()}
    assert compare_weights(fingerprint(find_tower(original)), find_tower(in_openais_class(copy))) == likeness


def rounded(weight: Tensor, bits: int) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step
