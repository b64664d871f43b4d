"""LOST: the reference implementation's boxes, CorLoc by hand, both layouts, and bad data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scenes import RANDOM, SIZES, coco, tiny_model, voc, write_coco, write_image

from testreg.evaluation import lost
from testreg.evaluation.boxes import Objects, boxed_images
from testreg.evaluation.figures import _inside
from testreg.evaluation.lost import _centred_box, _hits, _in_pixels, _is_correct, _is_whole
from testreg.evaluation.samples import Sample

GOLDEN = Path(__file__).parents[1] / "data" / "lost.safetensors"


def sample(boxes: list[list[float]], size: tuple[int, int] = (64, 96)) -> Sample[Objects]:
    return Sample("", Path(), Objects(torch.tensor(boxes, dtype=torch.float64), size))


def test_boxes_are_those_of_the_reference_implementation() -> None:
    with safe_open(GOLDEN, "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        features = [file.get_tensor(f"features.{i}") for i in range(len(cases))]
    for tokens, case in zip(features, cases, strict=True):
        box, seed = lost.lost(tokens, tuple(case["grid"]), candidates=case["k_patches"])
        objects = sample([], tuple(case["image"]))
        assert seed == case["seed"]
        assert _in_pixels(box, objects, (case["patch"],) * 2, None).tolist() == case["box_xyxy"]


def test_the_object_is_what_is_unlike_the_rest() -> None:
    features = torch.zeros(4, 5, 2)
    features[..., 0] = 1
    features[1:3, 2:4] = torch.tensor([-0.1, 1.0])  # like each other, unlike the background
    box, seed = lost.lost(features.flatten(0, 1), (4, 5))
    assert (box.tolist(), seed) == ([2, 1, 4, 3], 7)


def test_a_bias_leaves_the_seed_alone_where_nothing_is_alike() -> None:
    box, seed = lost.lost(torch.eye(6), (2, 3), bias=-1.0)
    assert (box.tolist(), seed) == ([0, 0, 1, 1], 0)


def test_corloc_counts_boxes_that_overlap_by_half() -> None:
    samples = [sample([[0, 0, 10, 10], [50, 50, 60, 60]]), sample([[0, 0, 10, 10]])]
    boxes = torch.tensor([[50.0, 50.0, 60.0, 65.0], [0.0, 0.0, 10.0, 4.9]], dtype=torch.float64)
    assert _is_correct(boxes, samples).tolist() == [1, 0]  # IoU .67 with the second, .49
    assert _is_correct(torch.tensor([[0.0, 0.0, 10.0, 5.0]] * 2).double(), samples).tolist() == [1, 1]  # exactly half


def test_trivial_boxes() -> None:
    assert _centred_box(sample([], (100, 200)), 1.0).tolist() == [0, 0, 200, 100]
    assert _centred_box(sample([], (100, 200)), 0.7).tolist() == pytest.approx([30, 15, 170, 85])


def test_boxes_of_the_whole_image_are_counted() -> None:
    boxes = torch.tensor([[0.0, 0.0, 200.0, 100.0], [0.0, 0.0, 200.0, 91.0], [0.0, 0.0, 200.0, 89.0]]).double()
    assert _is_whole(boxes, [sample([], (100, 200))] * 3).tolist() == [1, 1, 0]


def test_the_best_patch_hits_if_its_centre_is_in_a_box() -> None:
    objects = sample([[20, 10, 60, 40]], (64, 90))  # 4 x 6 patches of 16, the last column half padded
    assert _hits(1 * 6 + 2, objects, (16, 16), None)  # centre 40, 24
    assert not _hits(0 * 6 + 2, objects, (16, 16), None)  # centre 40, 8
    assert _hits(1 * 4 + 1, objects, (16, 16), 64)  # squashed to 64: centre 24 of 64 -> 34 of 90, 24


@pytest.mark.parametrize("layout", [coco, voc])
def test_both_layouts_have_the_same_boxes(layout: object, tmp_path: Path) -> None:
    samples = boxed_images(layout(tmp_path))  # type: ignore[operator]
    for found, size in zip(samples, SIZES, strict=False):
        assert found.target.boxes.tolist() == [[20, 10, 60, 40]]
        assert found.target.size == size


def test_crowds_do_not_count_and_images_without_boxes_are_left_out(tmp_path: Path) -> None:
    coco(tmp_path, 3)
    sizes = {i: {"height": height, "width": width} for i, (height, width) in enumerate(SIZES[:3])}
    images = [{"id": i, "file_name": f"{i}.png", **size} for i, size in sizes.items()]
    boxes = [{"image_id": 0, "bbox": [0, 0, 5, 5], "iscrowd": 1}, {"image_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 0}]
    write_coco(tmp_path, images, boxes)
    assert [Path(str(each.image)).stem for each in boxed_images(tmp_path)] == ["1"]


def test_names_choose_images_whatever_their_folder(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("train2014/2.jpg\n0\n")
    coco(tmp_path, 4)
    assert [Path(str(each.image)).stem for each in boxed_images(tmp_path, names)] == ["0", "2"]


def test_plain_and_patched_on_the_same_images(tmp_path: Path) -> None:
    coco(tmp_path / "coco")
    result = lost.evaluate(tiny_model(), tmp_path / "coco", neurons=RANDOM, progress=False, resamples=50)
    assert set(result.metrics) == {"plain", "patched"}
    assert set(result.metrics["plain"]) == {"corloc", "hit_ratio", "whole_image"} == set(result.difference or ())
    assert set(result.baselines) == {"corloc_whole_image", "corloc_centred_box"}
    assert result.protocol["images"] == 4


@pytest.mark.parametrize("name", ["hf_dinov2", "open_clip", "timm_siglip", "torchvision_vit"])
def test_every_library_at_one_size(name: str, tmp_path: Path) -> None:
    coco(tmp_path / "coco")
    result = lost.evaluate(tiny_model(name), tmp_path / "coco", feature="v", size=64, progress=False)
    assert result.difference is None
    assert result.to_json()["patched"] is None


def test_a_sweep_chooses_on_one_half_and_reports_the_other(tmp_path: Path) -> None:
    coco(tmp_path / "coco", 4)
    result = lost.evaluate(tiny_model(), tmp_path / "coco", neurons="none", sweep=True, progress=False)
    assert result.protocol["images"] == 2 == result.protocol["sweep"]["images"]
    assert set(result.protocol["sweep"]["chosen"]) == {"plain"}
    assert {"corloc", "corloc_sweep"} < set(result.metrics["plain"])


def test_pictures(tmp_path: Path) -> None:
    coco(tmp_path / "coco", 2)
    result = lost.evaluate(tiny_model(), tmp_path / "coco", progress=False)
    (path,) = result.save_figures(tmp_path / "figures")
    assert path.name == "lost-boxes.png"
    assert path.stat().st_size > 1000


def test_boxes_are_drawn_where_they_are_and_inside_of_the_image() -> None:
    """Of an image of 200 x 100 pixels, nothing is nearer to its edges than 2."""
    boxes = torch.tensor([[0.0, 0, 200, 100], [16, 32, 32, 48], [192, 0, 200, 16]])
    assert _inside(boxes, np.zeros((100, 200, 3))).tolist() == [[2, 2, 198, 98], [16, 32, 32, 48], [192, 2, 198, 16]]


def test_a_model_of_one_size_says_so(tmp_path: Path) -> None:
    coco(tmp_path / "coco", 1)
    with pytest.raises(ValueError, match=r"failed on images of 64 x 96 pixels .* name that as size \(--size\)"):
        lost.evaluate(tiny_model("torchvision_vit"), tmp_path / "coco", progress=False)


def missing_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no data folder at"


def no_layout(folder: Path) -> str:
    shutil.rmtree(folder / "annotations")
    return "has no boxes: they are read from VOC"


def missing_image(folder: Path) -> str:
    (folder / "val2017" / "1.png").unlink()
    return "there is no image .*1.png"


def missing_images(folder: Path) -> str:
    shutil.rmtree(folder / "val2017")
    return "no images for .*instances_val2017.json"


def broken_json(folder: Path) -> str:
    (folder / "annotations" / "instances_val2017.json").write_text("{")
    return "is not a list of instances of COCO"


def other_json(folder: Path) -> str:
    (folder / "annotations" / "instances_val2017.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    return "is not a list of instances of COCO: 'file_name'"


def stray_annotation(folder: Path) -> str:
    write_coco(folder, [], [{"image_id": 7, "bbox": [0, 0, 1, 1]}])
    return "an annotation is of image 7, which is not listed"


def empty_box(folder: Path) -> str:
    image = {"id": 0, "file_name": "0.png", "width": 96, "height": 64}
    write_coco(folder, [image], [{"image_id": 0, "bbox": [5, 5, 0, 3]}])
    return "0.png has a box that is empty or not finite"


def other_size(folder: Path) -> str:
    write_image(folder / "val2017" / "0.png", 0, (32, 48))
    return "0.png has 32 x 48 pixels, but .*instances_val2017.json says 64 x 96"


def unreadable_image(folder: Path) -> str:
    (folder / "val2017" / "2.png").write_bytes(b"no picture")
    return "2.png is not a readable image"


def no_boxes(folder: Path) -> str:
    write_coco(folder, [{"id": 0, "file_name": "0.png", "width": 96, "height": 64}], [])
    return "no image in .* has a box"


BAD_JSON = [broken_json, other_json, stray_annotation, empty_box, no_boxes]
BAD_IMAGES = [missing_folder, no_layout, missing_image, missing_images, other_size, unreadable_image]


@pytest.mark.parametrize("spoil", [*BAD_JSON, *BAD_IMAGES], ids=lambda spoil: spoil.__name__)
def test_bad_data_is_one_error_before_a_model_is_loaded(spoil: object, tmp_path: Path) -> None:
    folder = coco(tmp_path / "coco")
    message = spoil(folder)  # type: ignore[operator]
    with pytest.raises((ValueError, OSError), match=message):
        lost.evaluate("no such model", folder, progress=False)


def test_boxes_are_of_the_pixels_as_they_lie(tmp_path: Path) -> None:
    """Who annotated VOC and COCO did not turn images as their EXIF tag says."""
    folder = coco(tmp_path, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # rows are columns
    pixels = Image.open(folder / "val2017" / "0.png")
    pixels.save(folder / "val2017" / "0.png", exif=exif)
    (found,) = boxed_images(folder)
    assert np.array_equal(np.asarray(found.open()), np.asarray(pixels))


def test_bad_annotations_of_voc(tmp_path: Path) -> None:
    folder = voc(tmp_path / "voc")
    write_image(folder / "JPEGImages" / "extra.jpg", 0)
    with pytest.raises(FileNotFoundError, match=r"extra.jpg has no annotations: there is no file .*extra.xml"):
        boxed_images(folder)
    (folder / "Annotations" / "extra.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(ValueError, match=r"extra.xml is not an annotation of Pascal VOC"):
        boxed_images(folder)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    folder = coco(tmp_path / "coco")
    names = tmp_path / "names.txt"
    names.write_text("77.png\n")
    with pytest.raises(ValueError, match=r"names 77, which has no annotations"):
        boxed_images(folder, names)
    names.write_text("\n")
    with pytest.raises(ValueError, match="names no image"):
        boxed_images(folder, names)


def test_a_block_and_a_size_that_do_not_fit(tmp_path: Path) -> None:
    folder = coco(tmp_path / "coco")
    with pytest.raises(ValueError, match="has no block 9, but 4 blocks"):
        lost.evaluate(tiny_model(), folder, block=9, progress=False)
    with pytest.raises(ValueError, match="size must be a multiple of the model's patches of 16 x 16, got 70"):
        lost.evaluate(tiny_model(), folder, size=70, progress=False)
