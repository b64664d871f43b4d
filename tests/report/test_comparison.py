"""Before and after, over photographs of any size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from planting import plant
from tiny import NEURONS, TIMM, build, photograph_crops
from torchvision.transforms import v2

import testreg
from testreg.report.comparison import _box


@pytest.fixture(scope="module")
def planted() -> tuple[Any, testreg.RegisterNeurons]:
    torch.manual_seed(0)
    overlay = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 64, 64), "crop_pct": 1.0}
    model = timm.create_model("vit_base_patch16_clip_224", pretrained_cfg_overlay=overlay, num_classes=0, **TIMM).eval()
    return model, plant(model, photograph_crops(), num_neurons=4).neurons


def test_a_model_before_and_after(planted: Any, photos: torch.Tensor) -> None:
    model, neurons = planted
    found = testreg.compare(model, photos[10:20], neurons)
    assert not testreg.is_patched(model)
    assert found.block == 3
    assert found.before.max_over_median > 2 * found.after.max_over_median
    before = testreg.attention(model, photos[10:20]).mean(1)
    with testreg.patched(model, neurons):
        after = testreg.attention(model, photos[10:20]).mean(1)
        features = testreg.features(model, photos[10:20])
        again = testreg.compare(model, photos[10:20])  # its own registers
        with pytest.raises(RuntimeError, match="already patched"):
            testreg.compare(model, photos[10:20], neurons)
    assert found.before.attention is not None
    assert found.after.attention is not None
    torch.testing.assert_close(found.before.attention, before)
    torch.testing.assert_close(found.after.attention, after)
    torch.testing.assert_close(found.after.features.movedim(-1, 1), features)
    torch.testing.assert_close(again.after.norms, found.after.norms)
    torch.testing.assert_close(again.before.norms, found.before.norms)
    assert repr(found).startswith("Comparison of timm:vit_base_patch16_clip_224.laion2b_ft_in12k_in1k on 10 images, ")
    assert ", norms after block 3\n" in repr(found)
    assert len(repr(found)) < 400


def test_photographs_keep_their_size_and_the_maps_lie_where_the_model_looks(planted: Any, tmp_path: Path) -> None:
    model, neurons = planted
    pixels = np.random.default_rng(0).integers(0, 255, (300, 500, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = testreg.compare(model, tmp_path, neurons)
    (picture,), (box,) = found.photographs, found.boxes
    assert picture.shape == (300, 500, 3)
    np.testing.assert_allclose(box, (100, 0, 400, 300), atol=2)  # the middle square
    figure = found.plot()
    figure.draw_without_rendering()
    overlays = [axis.images[-1] for axis in figure.axes if len(axis.images) == 2]
    assert len(overlays) == 6
    for overlay in overlays:
        np.testing.assert_allclose(overlay.get_extent(), (100, 400, 300, 0), atol=2)
    shown = Image.open(io.BytesIO(found._repr_png_()))
    assert shown.width > 4 * 400  # four photographs of 500 pixels side by side, less the margins
    drawn = figure.axes[0].get_window_extent()
    assert abs(drawn.width / drawn.height - 500 / 300) < 0.02
    assert drawn.width > 350
    assert '<img style="max-width: 100%" src="data:image/png;base64,' in found._repr_html_()
    testreg.compare(model, Image.fromarray(pixels), neurons)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (v2.Compose([v2.Resize((64, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), (0, 0, 400, 200)),
        (v2.Compose([v2.CenterCrop(100), v2.ToImage(), v2.ToDtype(torch.float32)]), (150, 50, 250, 150)),
        (lambda image: torch.full((3, 8, 8), 0.5), (0, 0, 400, 200)),
    ],
)
def test_the_part_of_a_photograph_that_a_transform_leaves(transform: Any, expected: tuple[int, ...]) -> None:
    np.testing.assert_allclose(_box(Image.new("RGB", (400, 200)), transform), expected, atol=2)


def test_towers_whose_attention_is_not_seen_are_compared_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def unseen(*args: Any) -> None:
        raise RuntimeError("saw no attention")

    monkeypatch.setattr("testreg.report.comparison.attention_to_patches", unseen)
    found = testreg.compare(build("timm_siglip"), torch.randn(2, 3, 64, 64), NEURONS)
    assert found.before.attention is None
    assert len(found.plot().axes) == 2 * (1 + 2 * 2)  # the photograph; norms and features, before and after
    title = found.plot().get_suptitle()
    assert title == f"{found.model}: norms after block {found.block}, features after the last block"


def test_bad_arguments() -> None:
    model = build("timm_vit")
    with pytest.raises(ValueError, match="block=4 is out of range"):
        testreg.compare(model, torch.randn(1, 3, 64, 64), NEURONS, block=4)
    with pytest.raises(ValueError, match="bundled"):
        testreg.compare(model, torch.randn(1, 3, 64, 64))
    assert not testreg.is_patched(model)
