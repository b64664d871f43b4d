"""Segmentation by attention: metrics by hand, alignment, layouts of masks, and bad data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import RANDOM, SIZES, masks, tiny_model, write_image, write_map

from testreg.evaluation import attention_seg
from testreg.evaluation.attention_seg import scaled, score
from testreg.evaluation.pixel_maps import MapFile, mapped_images, two_splits


def test_metrics_by_hand() -> None:
    # Scaled to [0, 1]: 0, 0, 0.5, 1; mean .375, so that the lower row is foreground.
    attention = torch.tensor([[0.0, 0.0], [0.1, 0.2]])
    found = score([attention], [np.array([[0, 1], [0, 1]])])
    assert found["pixel_accuracy"].value == 0.5  # of the upper left and the lower right
    assert found["miou"].value == pytest.approx((1 / 3 + 1 / 3) / 2)
    # Ranked 1 (bg, true), 1 (bg, false), 1 (fg, true): all at the threshold 1 -> 2/3; .5 (bg true, fg false) -> 3/5;
    # 0: the rest, 4/8.
    assert found["map"].value == pytest.approx(0.5 * 2 / 3 + 0.25 * 3 / 5 + 0.25 * 4 / 8)


def test_pixels_that_do_not_count() -> None:
    attention = torch.tensor([[0.0, 0.0], [0.1, 0.2]])
    found = score([attention], [np.array([[0, -1], [-1, 1]])])
    assert (found["pixel_accuracy"].value, found["miou"].value, found["map"].value) == (1, 1, 1)


def test_images_of_one_kind_have_no_average_precision() -> None:
    found = score([torch.rand(2, 2)] * 2, [np.zeros((4, 4)), np.eye(4)])
    assert found["map"].rows[:, 1].tolist() == [0, 1]


def test_attention_is_scaled_to_the_mask() -> None:
    full = scaled(torch.tensor([[3.0, 3.0], [5.0, 5.0]]), 4)
    assert full.shape == (4, 4)
    assert (full.min(), full.max()) == (0, 1)
    assert full[:, 0].diff().min() >= 0


def test_an_object_that_is_attended_to(tmp_path: Path) -> None:
    result = attention_seg.evaluate(
        tiny_model("timm_vit"), masks(tmp_path), neurons=RANDOM, size=64, progress=False, resamples=20
    )
    assert set(result.metrics["plain"]) == {"miou", "pixel_accuracy", "map"}
    assert result.metrics["plain"] != result.metrics["patched"]
    truths = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "masks").iterdir())]
    share = result.details["foreground_share"]
    assert share == pytest.approx(
        np.mean([(truth > 0).mean() for truth in truths]), abs=0.03
    )  # before they are squashed
    line = f"foreground: {100 * share:.1f} % of the pixels that count, of {len(truths)} masks in {tmp_path / 'masks'}"
    assert line in str(result).splitlines()
    result.save_figures(tmp_path / "figures")
    assert (tmp_path / "figures" / "attention-seg-attention.png").is_file()


def test_alignment_matters_unless_images_are_square(tmp_path: Path) -> None:
    folder = masks(tmp_path, 4)
    options = {"size": 64, "progress": False}
    aligned, released = (attention_seg.evaluate(tiny_model(), folder, align=each, **options) for each in (True, False))
    assert aligned.metrics["plain"] != released.metrics["plain"]
    square = tmp_path / "square"
    for folder_, kind in (("images", write_image), ("masks", write_map)):
        name, value = ("0.jpg", 0) if kind is write_image else ("0.png", np.eye(64, dtype=np.uint8))
        kind(square / folder_ / name, value)
    aligned, released = (attention_seg.evaluate(tiny_model(), square, align=each, **options) for each in (True, False))
    assert aligned.metrics["plain"] == pytest.approx(released.metrics["plain"])


def test_foreground_is_a_range_of_values(tmp_path: Path) -> None:
    masks(tmp_path)
    options = {"size": 64, "progress": False}
    by_default = attention_seg.evaluate(tiny_model(), tmp_path, **options)
    assert attention_seg.evaluate(tiny_model(), tmp_path, foreground="1-90", **options).metrics == by_default.metrics
    other = attention_seg.evaluate(tiny_model(), tmp_path, foreground="0-1", **options)  # no image has background
    assert np.isnan(other.metrics["plain"]["map"])
    assert other.to_json()["plain"]["map"] is None
    with pytest.raises(ValueError, match="foreground must be FIRST-LAST"):
        attention_seg.evaluate(tiny_model(), tmp_path, foreground="things", **options)


def test_of_several_folders_of_masks_the_first_counts(tmp_path: Path) -> None:
    masks(tmp_path, 3)
    masks(tmp_path, 3, maps="annotations")
    (samples,) = mapped_images(tmp_path).values()
    assert [Path(sample.target.name).parent.name for sample in samples] == ["annotations"] * 3


@pytest.mark.parametrize(
    ("images", "maps"),
    [
        ("images/{}", "annotations/{}"),
        ("{}", "semantic/{}"),
        ("{}/rgb", "{}/labels"),
    ],
)
def test_layouts_with_splits(images: str, maps: str, tmp_path: Path) -> None:
    for split, count in (("training", 3), ("validation", 2)):
        masks(tmp_path, count, images.format(split), maps.format(split))
    found = mapped_images(tmp_path)
    assert {split: len(samples) for split, samples in found.items()} == {"train": 3, "val": 2}
    train, val = two_splits(found, tmp_path)
    assert (len(train), len(val)) == (3, 2)
    assert train[0].target.read().sum() == 30 * 40


def test_lists_of_images_and_depth(tmp_path: Path) -> None:
    masks(tmp_path, 4, "kitchen", "kitchen")
    (tmp_path / "nyu_train.txt").write_text("/kitchen/0.jpg /kitchen/0.png 518.8\n/kitchen/1.jpg None 518.8\n")
    (tmp_path / "nyu_test.txt").write_text("kitchen/2.jpg kitchen/2.png 518.8\n")
    found = mapped_images(tmp_path)
    assert {split: len(samples) for split, samples in found.items()} == {"train": 1, "val": 1}
    (tmp_path / "nyu_test.txt").write_text("kitchen/2.jpg kitchen/9.png 518.8\n")
    with pytest.raises(FileNotFoundError, match=r"nyu_test.txt, line 1: there is no file .*9.png"):
        mapped_images(tmp_path)
    (tmp_path / "nyu_test.txt").write_text("kitchen/2.jpg\n")
    with pytest.raises(ValueError, match=r"line 1: expected an image and its map"):
        mapped_images(tmp_path)


def test_without_splits_the_last_are_held_out(tmp_path: Path) -> None:
    train, val = two_splits(mapped_images(masks(tmp_path, 4)), tmp_path)
    assert [Path(str(each.image)).stem for each in (*train, *val)] == ["0", "1", "2", "3"]
    assert len(val) == 1
    with pytest.raises(ValueError, match="has 1 images: too few to split them"):
        two_splits({"": [1]}, "data")
    with pytest.raises(ValueError, match="data has no split train: name its folder train or training"):
        two_splits({"val": [1]}, "data")


def test_imagenet_segmentation_as_it_is_published(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    image, truth = np.zeros((3, 70, 64), np.uint8), np.zeros((70, 64), np.uint8)  # channels, width, height
    image[0, 10:30], truth[10:30] = 255, 1
    with h5py.File(tmp_path / "gtsegs_ijcv.mat", "w") as file:
        file["a"], file["b"] = image, truth
        inner = file.create_dataset("c", (1, 1), dtype=h5py.ref_dtype)
        inner[0, 0] = file["b"].ref
        for name, target in (("img", "a"), ("gt", "c")):
            references = file.create_dataset(f"value/{name}", (1, 1), dtype=h5py.ref_dtype)
            references[0, 0] = file[target].ref
    (sample,) = mapped_images(tmp_path)[""]
    assert sample.open().size == (70, 64)
    assert sample.open().getpixel((15, 3)) == (255, 0, 0)
    assert sample.target.read().shape == (64, 70)
    assert sample.target.read()[3, 15] == 1
    attention_seg.evaluate(tiny_model(), tmp_path, size=64, progress=False)
    (tmp_path / "gtsegs_ijcv.mat").write_text("MATLAB")
    with pytest.raises(ValueError, match="is not ImageNet-segmentation"):
        mapped_images(tmp_path)


def missing_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no data folder at"


def no_masks(folder: Path) -> str:
    shutil.rmtree(folder / "masks")
    return "holds no maps: it must hold images/ or rgb/ and annotations/"


def no_images(folder: Path) -> str:
    shutil.rmtree(folder / "images")
    return "no images for the maps in .*images"


def missing_image(folder: Path) -> str:
    (folder / "images" / "1.jpg").unlink()
    return r"1.png has no image: there is no .*images/1 of any suffix"


def mask_of_another_size(folder: Path) -> str:
    write_map(folder / "masks" / "1.png", np.zeros((10, 12), dtype=np.uint8))
    return r"1.png has 10 x 12 pixels, but its image .*1.jpg has 80 x 64"


def broken_mask(folder: Path) -> str:
    (folder / "masks" / "1.png").write_bytes(b"no mask")
    return r"1.png is not a readable image"


def no_foreground(folder: Path) -> str:
    for i in range(4):
        write_map(folder / "masks" / f"{i}.png", np.zeros(SIZES[i], dtype=np.uint8))
    return r"no mask has foreground: a value of more than 0 \(--foreground\)"


@pytest.mark.parametrize(
    "spoil",
    [missing_folder, no_masks, no_images, missing_image, mask_of_another_size, broken_mask, no_foreground],
    ids=lambda spoil: spoil.__name__,
)
def test_bad_data_is_one_error_before_a_model_is_loaded(spoil: object, tmp_path: Path) -> None:
    folder = masks(tmp_path / "data")
    message = spoil(folder)  # type: ignore[operator]
    with pytest.raises((ValueError, OSError), match=message):
        attention_seg.evaluate("no such model", folder, progress=False)


def test_a_mask_in_colours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 channels: a map has one"):
        MapFile(write_image(tmp_path / "mask.png", 0)).read()
