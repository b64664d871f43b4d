"""Linear segmentation and depth: metrics and losses by hand, windows, augmentation, and bad data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow_except
from scenes import RANDOM, SIZES, masks, tiny_model, write_image, write_map
from torch import nn

from testreg.evaluation import depth, segment
from testreg.evaluation.dense import dense_features, edges_around, resized
from testreg.evaluation.overlap import overlap
from testreg.evaluation.pixel_maps import MapFile, mapped_images
from testreg.evaluation.preparing import Normalisation, resized_within
from testreg.families import find_tower

OPTIONS: dict[str, Any] = {"progress": False, "resamples": 5, "warm_up": 2, "fit_batch": 4}
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3)


def scenes(folder: Path) -> Path:
    """Images with masks, whose rectangle is class 2 on class 1, and a border that is not labelled."""
    for split, count in (("training", 6), ("validation", 3)):
        masks(folder, count, f"images/{split}", f"annotations/{split}")
        for file in (folder / "annotations" / split).iterdir():
            values = MapFile(file).read().astype(np.uint8) + 1
            values[:2] = 0
            write_map(file, values)
    return folder


def rooms(folder: Path, count: int = 8) -> Path:
    """Images beside depth: the rectangle is at 1 m, all else at 3 m, and the border is not known."""
    for i in range(count):
        write_image(folder / "rgb" / f"{i}.jpg", i)
        values = np.full((64, 64), 3000, dtype=np.uint16)
        values[10:40, 20:60] = 1000
        values[:2] = 0
        write_map(folder / "depth" / f"{i}.png", values)
    return folder


@pytest.mark.parametrize("augment", slow_except([True, False], False))
def test_a_bright_rectangle_is_segmented(augment: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": 64, "augment": augment, "cache": tmp_path / "kept", **OPTIONS}
    scenes(tmp_path)
    untrained = segment.evaluate(tiny_model(), tmp_path, iterations=1, **options)
    options["neurons"] = None if augment else RANDOM
    result = segment.evaluate(tiny_model(), tmp_path, iterations=60, **options)
    assert result.metrics["plain"]["miou"] > untrained.metrics["plain"]["miou"] + 0.05
    assert set(result.details["iou_per_class"]["plain"]) == {"1", "2"}
    ious = result.details["iou_per_class"]["plain"].values()
    assert result.metrics["plain"]["miou"] == pytest.approx(sum(ious) / 2)
    assert (result.protocol["train"], result.protocol["images"], result.protocol["classes"]) == (6, 3, 2)
    assert result.save_figures(tmp_path)[0].name == "segment-masks.png"


@pytest.mark.parametrize(
    ("augment", "size"), slow_except([(True, None), (False, None), (False, 64), (True, 48)], (True, 48), (False, None))
)
def test_depth_is_learnt(augment: bool, size: int | None, tmp_path: Path) -> None:
    result = depth.evaluate(
        tiny_model(),
        rooms(tmp_path),
        neurons=RANDOM,
        iterations=15 if augment else 30,
        every=10,
        augment=augment,
        size=size,
        nyu_crop=False,
        **OPTIONS,
    )
    assert set(result.metrics["patched"]) == {"rmse", "abs_rel", "delta1"}
    assert result.metrics["plain"]["rmse"] < 2.5  # a head that has learnt nothing says 5 m everywhere: 3.0
    assert result.save_figures(tmp_path)[0].name == "depth-depth.png"


def test_counts_of_classes_by_hand() -> None:
    truth, predicted = np.array([[0, 1, 1], [2, -1, 0]]), np.array([[0, 0, 1], [1, 2, 0]])
    both, either, pixels = overlap(predicted, truth, 4)
    assert both.tolist() == [2, 1, 0, 0]
    assert either.tolist() == [3, 3, 1, 0]
    assert pixels == 5


def test_windows_cover_the_image() -> None:
    assert segment.corners(512, 512, 512) == [(0, 0)]
    assert segment.corners(512, 683, 512) == [(0, 0), (0, 171)]
    assert segment.corners(512, 1024, 512) == [(0, 0), (0, 341), (0, 512)]
    assert segment.corners(300, 512, 512) == [(0, 0)]


def test_windows_that_overlap_are_averaged() -> None:
    head = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    with torch.no_grad():
        head[0].weight.copy_(torch.eye(2)[..., None, None])
    windows = torch.zeros(2, 2, 2, 2)  # of 32 pixels, from 0 and from 16
    windows[0, 0], windows[1, 1] = 1.0, 3.0
    found = segment.predict(head, windows, (32, 48), 32, (16, 16))
    assert found[:, :16].max() == 0
    assert found[:, 16:].min() == 1  # where both lie, 3 beats 1


def test_padding_is_around_and_is_taken_off_again() -> None:
    assert edges_around(30, 33, (14, 14)) == (4, 5, 6, 6)
    values = torch.zeros(1, 1, 3, 3)
    values[..., 1, 1] = 1
    full = resized(values, (30, 33), (14, 14))
    assert full.shape == (1, 1, 30, 33)
    row, column = divmod(int(full.argmax()), 33)
    assert (row, column) == pytest.approx((21 - 6, 21 - 4), abs=1)
    assert resized_within((100, 400), 50, 100) == (25, 100)


def test_dense_features_are_maps_of_the_patches() -> None:
    tower = find_tower(tiny_model().model)
    with torch.no_grad():
        patches, cls = dense_features(tower, torch.randn(2, 3, 64, 50))
    assert patches.shape == (2, 48, 4, 4)
    assert cls.shape == (2, 48)


def test_augmentation_keeps_image_and_mask_together(tmp_path: Path) -> None:
    sample = mapped_images(scenes(tmp_path))["train"][0]
    crop = segment._Crop(PLAIN, 64, {1: 0, 2: 1})
    crop.distort = nn.Identity()  # type: ignore[assignment]
    for seed in range(8):
        torch.manual_seed(seed)
        pixels, target = crop(sample)
        assert pixels.shape == (3, 64, 64)
        assert target.shape == (64, 64)
        assert target.unique().tolist() in ([-1, 0, 1], [0, 1], [-1, 0], [0])
        bright = pixels.amax(0) > 0.6
        agreed = (bright == (target == 1))[target >= 0].float().mean()
        assert agreed > 0.93  # but for edges
    image, truth = depth._Augment(PLAIN, 1000.0, False, None)(mapped_images(rooms(tmp_path / "r"), ["depth"])[""][0])
    assert image.shape[1:] == truth.shape == (64, 64)
    assert ((image.amax(0) > 0.6) == (truth == 1))[truth > 0].float().mean() > 0.93


def test_depth_lies_over_the_image_squashed_or_not() -> None:
    ramp = torch.linspace(0, 1, 9)[None, None, None].expand(1, 1, 5, 9)
    for size, grid in ((None, ramp), (70, ramp[..., ::2])):  # 5 x 9, or 5 x 5 patches of 14
        full = depth.on_image(grid, (70, 126), size, (14, 14))
        assert full.shape == (1, 70, 126)
        assert float(full[0, 35, 63]) == pytest.approx(0.5, abs=0.02)
    padded = depth.on_image(torch.eye(3)[None, None], (30, 33), None, (14, 14))[0]
    assert float(padded[15, 16]) == pytest.approx(1, abs=0.1)  # the middle stays the middle


def test_errors_of_depth_by_hand() -> None:
    truth = torch.tensor([[2.0, 4.0], [0.0, 1.0]])
    found = depth.score([torch.tensor([[2.0, 5.0], [9.0, 2.0]])], [truth])
    assert found["rmse"].value == pytest.approx((2 / 3) ** 0.5)
    assert found["abs_rel"].value == pytest.approx((0.25 + 1.0) / 3)
    assert found["delta1"].value == pytest.approx(1 / 3)  # 5/4 is not below 1.25


def test_the_loss_does_not_care_for_scale() -> None:
    truth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    gap = np.log(2)
    loss = depth.loss_of(truth * 2, truth, with_variance=True)
    assert float(loss) == pytest.approx(0.15**0.5 * gap, rel=1e-3)  # all too far alike: no variance
    uneven = torch.tensor([[[1.0, 2.0, 8.0, 5.0]]])
    expected = (np.var([0, 0, gap], ddof=1) + 0.15 * (gap / 3) ** 2) ** 0.5
    assert float(depth.loss_of(uneven, truth, with_variance=True)) == pytest.approx(expected, rel=1e-2)
    assert float(depth.loss_of(uneven, truth, with_variance=False)) == pytest.approx(0.15**0.5 * gap / 3, rel=1e-2)


def test_depth_is_the_expectation_over_bins() -> None:
    head = depth.Head(4)
    with torch.no_grad():
        head.convolution.weight.zero_()
        head.convolution.bias.fill_(-1.0)  # .1 in every bin
        assert head(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2)).shape == (1, 1, 4, 4)
        assert head(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2)).mean() == pytest.approx(5.0005, abs=1e-3)
        head.convolution.bias[0] = 1e6
        assert head(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2)).mean() == pytest.approx(0.001, abs=1e-3)


def test_the_probe_with_the_best_relative_error_counts(tmp_path: Path) -> None:
    options = {"iterations": 30, "augment": False, "nyu_crop": False, "cache": tmp_path / "kept", **OPTIONS}
    folder = rooms(tmp_path / "rooms")
    last, best = (depth.evaluate(tiny_model(), folder, every=each, **options) for each in (30, 3))
    assert best.metrics["plain"]["abs_rel"] <= last.metrics["plain"]["abs_rel"]


def test_bad_masks(tmp_path: Path) -> None:
    folder = scenes(tmp_path / "scenes")
    with pytest.raises(ValueError, match=r"png has the value 2, which is none of the 1 classes \(nor 0"):
        segment.evaluate("no such model", folder, classes=1, **OPTIONS)
    for file in folder.rglob("*.png"):
        write_map(file, np.zeros(SIZES[int(file.stem) % 4], dtype=np.uint8))
    with pytest.raises(ValueError, match="no mask has a class: all values are 0, which is ignored"):
        segment.evaluate("no such model", folder, **OPTIONS)


def test_classes_from_0_with_another_value_ignored(tmp_path: Path) -> None:
    samples = mapped_images(scenes(tmp_path))["train"]
    assert segment.class_values(samples, None, 255, False) == [0, 1, 2]
    assert segment.class_values(samples, 21, 255, False) == [*range(21)]
    assert segment.class_values(samples, 150, 0, False) == [*range(1, 151)]


def test_bad_depth(tmp_path: Path) -> None:
    folder = rooms(tmp_path / "rooms", 4)
    with pytest.raises(ValueError, match=r"has 64 x 64 pixels, .* for 480 x 640: .*--no-nyu-crop"):
        depth.evaluate("no such model", folder, **OPTIONS)
    with pytest.raises(ValueError, match=r"has no depth between 0.001 and 10 m: is unit \(--unit\) right"):
        depth.evaluate("no such model", folder, nyu_crop=False, unit=1.0, **OPTIONS)
    first = min((folder / "depth").iterdir())  # of train
    whole = first.read_bytes()
    write_map(first, np.zeros((64, 64), dtype=np.uint16))
    with pytest.raises(ValueError, match=rf"{first.name} has no depth between"):
        depth.evaluate("no such model", folder, nyu_crop=False, augment=False, **OPTIONS)
    first.write_bytes(whole)
    with pytest.raises(ValueError, match=r"holds no maps: it must hold images/ or rgb/ and depth/"):
        depth.evaluate("no such model", folder / "rgb", **OPTIONS)


def test_what_is_scored_of_nyu() -> None:
    truth = depth.scored_part(torch.ones(480, 640), True, "a file")
    assert truth.sum() == (471 - 45) * (601 - 41)
