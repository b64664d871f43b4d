"""What single tokens know: probes by hand, and on a model whose outliers are planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from planting import plant
from scenes import RANDOM, Transform, labelled, tiny_model
from tiny import TIMM, photograph_crops
from torchvision.transforms.v2 import functional as tv

from testreg.evaluation import tokens
from testreg.evaluation.tokens import _accuracy, _mean_over_kind, _one_token, pixels, position
from testreg.io.loading import LoadedModel

OPTIONS: dict[str, Any] = {"progress": False, "resamples": 5, "size": 64, "num_c": 3, "epochs": 2, "choices": 2}


class Kept:
    """What features are, without files."""

    def __init__(self, **named: torch.Tensor) -> None:
        self.named = named

    def __len__(self) -> int:
        return len(next(iter(self.named.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.named.items()}

    def stacked(self, name: str) -> torch.Tensor:
        return self.named[name]


def test_tokens_that_say_where_they_are() -> None:
    kept: Any = Kept(patches=torch.eye(4).repeat(8, 1, 1))
    outliers = [torch.zeros(8, 4, dtype=torch.bool) for _ in range(2)]
    found = position([kept, kept], outliers, epochs=200, seed=0)
    assert found["position_normal"].value == 1
    assert found["distance_normal"].value == 0
    assert np.isnan(found["position_outlier"].value)
    blind: Any = Kept(patches=torch.ones(8, 4, 4))
    found = position([blind, blind], outliers, epochs=2, seed=0)
    assert found["position_normal"].value == 0.25  # the same guess for all
    assert found["distance_normal"].value == pytest.approx((0 + 1 + 1 + 2**0.5) / 4)


def test_tokens_that_say_their_pixels() -> None:
    patches = torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(0))
    kept: Any = Kept(patches=patches, pixels=patches * 2 + 1)
    outliers = [torch.zeros(20, 6, dtype=torch.bool) for _ in range(2)]
    assert pixels([kept, kept], outliers)["pixels_normal"].value < 0.01
    other: Any = Kept(patches=patches, pixels=patches * 2 + 2)
    assert pixels([kept, other], outliers)["pixels_normal"].value == pytest.approx(3**0.5, abs=0.01)


def test_normal_patches_and_outliers_are_apart() -> None:
    outlier = torch.tensor([[True, False, False], [False, False, False]])
    values = torch.tensor([[5.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
    assert _mean_over_kind(values, outlier, "outlier").value == 5
    assert _mean_over_kind(values, outlier, "normal").value == pytest.approx(12 / 5)


def test_one_token_of_each_kind() -> None:
    patches = torch.arange(6.0).reshape(2, 3, 1)
    kept: Any = Kept(patches=patches, cls=torch.tensor([[7.0], [8.0]]))
    outlier = torch.tensor([[False, True, False], [False, False, False]])
    random = torch.Generator().manual_seed(0)
    assert _one_token(kept, outlier, "cls", random).tolist() == [[7], [8]]
    chosen = _one_token(kept, outlier, "outlier", random)
    assert chosen[0].tolist() == [1]
    assert np.isnan(chosen[1]).all()
    assert {float(_one_token(kept, outlier, "normal", random)[0, 0]) for _ in range(30)} == {0, 2}
    assert np.isnan(_one_token(kept, outlier, "register", random)).all()


def test_classes_from_one_token() -> None:
    labels = [np.arange(20) % 2, np.arange(6) % 2]
    told = [np.stack([each * 2.0 - 1, np.zeros(len(each))], 1) for each in labels]
    assert _accuracy(told, labels, 3).tolist() == [1] * 6
    told[1][2] = np.nan
    assert np.isnan(_accuracy(told, labels, 3)[2])
    nothing = [np.full_like(each, np.nan) for each in told]
    assert np.isnan(_accuracy(nothing, labels, 3)).all()


def test_planted_outliers_are_told_from_normal_patches(tmp_path: Path) -> None:
    images = photograph_crops()
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_clip_224", num_classes=0, **TIMM).eval()
    planted = plant(model, images, num_neurons=4).neurons
    for i, image in enumerate(images):
        path = tmp_path / ("val" if i % 3 == 0 else "train") / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tv.to_pil_image((image + 1) / 2).save(path)
    result = tokens.evaluate(LoadedModel(model, Transform(), "planted"), tmp_path, neurons=planted, **OPTIONS)
    assert result.protocol["outlier_fraction"] > 0.01
    plain, patched = result.metrics["plain"], result.metrics["patched"]
    assert np.isfinite(plain["class_outlier"])
    assert np.isnan(plain["class_register"])
    assert np.isfinite(patched["class_register"])
    assert plain["pixels_outlier"] != pytest.approx(patched["pixels_outlier"])
    assert set(result.details["class_spread"]["plain"]) == {
        "class_cls",
        "class_normal",
        "class_outlier",
        "class_register",
    }


def test_without_outliers_their_metrics_are_not_defined(tmp_path: Path) -> None:
    result = tokens.evaluate(tiny_model(), labelled(tmp_path), threshold=1e6, **OPTIONS)
    assert result.to_json()["plain"]["class_outlier"] is None
    assert result.to_json()["plain"]["position_outlier"] is None
    assert result.protocol["outlier_fraction"] == 0


def test_trained_registers_are_compared(tmp_path: Path) -> None:
    result = tokens.evaluate(
        tiny_model(), labelled(tmp_path), neurons=RANDOM, against=tiny_model("hf_dinov2_registers"), **OPTIONS
    )
    assert np.isfinite(result.metrics["against"]["class_register"])


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train needs at least 6 images and two classes, has 2 images"):
        tokens.evaluate("no such model", labelled(tmp_path, count=1), **OPTIONS)
