"""The frame: columns on the same images, features computed once, intervals, the result's JSON."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import in_processes
from scenes import RANDOM, coco, masks, tiny_model

from testreg.evaluation import attention_seg, lost
from testreg.evaluation.bootstrap import difference, mean_iou_of, mean_of, ratio_of
from testreg.evaluation.boxes import boxed_images
from testreg.evaluation.evaluation import Evaluation, Settings
from testreg.evaluation.libraries import library
from testreg.evaluation.preparing import ModelPreprocessing, Normalisation, PaddedToPatches, Square, normalisation_of
from testreg.io.loading import load_model
from testreg.register import is_patched, patch, patched


def test_metrics_follow_from_sums() -> None:
    assert mean_of([1.0, np.nan, 0.0]).value == 0.5  # what is not defined does not count
    assert ratio_of([1, 3], [2, 6]).value == 0.5
    assert mean_iou_of([[1, 0, 0], [1, 2, 0]], [[2, 2, 0], [2, 2, 0]]).value == 0.5  # 2/4, 2/4; none of class 2


def test_the_interval_is_of_the_paired_difference() -> None:
    before = mean_of(np.tile([0.0, 1.0], 50))
    value, low, high = difference(before, mean_of(before.rows[:, 0] + 0.25), 200, 0)
    assert (value, low, high) == pytest.approx((0.25, 0.25, 0.25))  # every image changed alike
    changed = before.rows[:, 0].copy()
    changed[:10] = 1  # 5 of the 100 were 0
    value, low, high = difference(before, mean_of(changed), 2000, 0)
    assert value == pytest.approx(0.05)
    assert low == pytest.approx(0.05 - 1.96 * (0.05 * 0.95 / 100) ** 0.5, abs=0.01)
    assert high == pytest.approx(0.05 + 1.96 * (0.05 * 0.95 / 100) ** 0.5, abs=0.015)


def test_the_json_is_as_documented(tmp_path: Path) -> None:
    coco(tmp_path / "coco")
    result = lost.evaluate(
        tiny_model(), tmp_path / "coco", neurons=RANDOM, against=tiny_model(seed=1), progress=False, resamples=20
    )
    result.save(tmp_path / "result.json")
    data = json.loads((tmp_path / "result.json").read_text())
    assert (data["task"], data["model"], data["data"]) == ("lost", "hf_dinov2", str(tmp_path / "coco"))
    for column in ("plain", "patched", "against"):
        assert set(data[column]) == {"corloc", "hit_ratio", "whole_image"}
    value, low, high = data["difference"]["corloc"]
    assert value == pytest.approx(data["patched"]["corloc"] - data["plain"]["corloc"])
    assert low <= value <= high
    assert set(data["difference_against"]) == {"corloc", "hit_ratio", "whole_image"}
    assert data["protocol"]["neurons"]["neurons"] == {str(k): v for k, v in RANDOM.by_block().items()}
    assert "corloc_centred_box" in str(result)
    assert "patched - plain (95 %)" in str(result)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The images that towers are run on from now on."""
    from testreg.families import Tower

    run, seen = Tower.run, list[Any]()
    monkeypatch.setattr(Tower, "run", lambda self, images: (seen.extend(images), run(self, images))[1])
    return seen


def test_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = masks(tmp_path / "data")
    seen = counted(monkeypatch)
    options: dict[str, Any] = {"neurons": RANDOM, "size": 64, "progress": False, "resamples": 5}
    first = attention_seg.evaluate(tiny_model(), folder, **options)
    assert len(seen) == 8  # four images, two columns
    again = attention_seg.evaluate(tiny_model(), folder, **options)
    assert len(seen) == 8
    assert again.to_json() == first.to_json()
    attention_seg.evaluate(tiny_model(), folder, **options | {"block": -2})  # depends on the block
    assert len(seen) == 16
    attention_seg.evaluate(tiny_model(), folder, **options | {"neurons": {1: [4]}})  # plain is known
    assert len(seen) == 20
    other = tiny_model()
    with torch.no_grad():
        next(other.model.encoder.layer[1].mlp.fc1.parameters())[5, 7] += 1  # which no fingerprint of signs would see
    attention_seg.evaluate(other, folder, **options | {"neurons": None})
    assert len(seen) == 24


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testreg.evaluation.features.CHUNK", 2)
    folder = masks(tmp_path / "data", 6)
    seen = counted(monkeypatch)
    options: dict[str, Any] = {"size": 64, "progress": False}
    whole = attention_seg.evaluate(tiny_model(), folder, cache=tmp_path / "whole", **options)
    seen.clear()
    kept = tmp_path / "kept"
    attention_seg.evaluate(tiny_model(), folder, cache=kept, **options)
    chunks = sorted(kept.rglob("*.safetensors"))
    assert len(chunks) == 3
    chunks[1].unlink()
    chunks[2].write_bytes(b"half a file")
    seen.clear()
    resumed = attention_seg.evaluate(tiny_model(), folder, cache=kept, **options)
    assert len(seen) == 4
    assert resumed.to_json() == whole.to_json()


def test_processes_share_the_images_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testreg.evaluation.features.CHUNK", 2)
    folder = masks(tmp_path / "data", 6)
    alone = attention_seg.evaluate(tiny_model(), folder, size=64, cache=tmp_path / "alone", progress=False)

    def work(rank: int) -> None:
        from testreg.io.processes import process_group

        with process_group("cpu"):
            seen = counted(monkeypatch)
            result = attention_seg.evaluate(tiny_model(), folder, size=64, cache=tmp_path / "shared", progress=False)
        result.save(tmp_path / f"{rank}.json")
        (tmp_path / f"{rank}.count").write_text(str(len(seen)))

    assert [each.code for each in in_processes(2, work, tmp_path)] == [0, 0]
    assert [(tmp_path / f"{rank}.count").read_text() for rank in (0, 1)] == ["4", "2"]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())["plain"]
        assert found == pytest.approx(alone.to_json()["plain"], abs=1e-5)


def test_a_patched_model_has_both_columns(tmp_path: Path) -> None:
    folder = masks(tmp_path / "data")
    options: dict[str, Any] = {"size": 64, "progress": False, "resamples": 5}
    given = attention_seg.evaluate(tiny_model(), folder, neurons=RANDOM, cache=tmp_path / "a", **options)
    loaded = tiny_model()
    patch(loaded.model, RANDOM)
    found = attention_seg.evaluate(loaded, folder, cache=tmp_path / "b", **options)
    assert found.to_json() == given.to_json()
    assert is_patched(loaded.model)
    with pytest.raises(ValueError, match="is patched already: leave neurons out"):
        attention_seg.evaluate(loaded, folder, neurons=RANDOM, **options)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    loaded = tiny_model()
    loaded.model.train()
    attention_seg.evaluate(loaded, masks(tmp_path / "data"), neurons=RANDOM, size=64, progress=False, resamples=5)
    assert not is_patched(loaded.model)
    assert loaded.model.training


def test_neurons_that_do_not_fit_are_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    with pytest.raises(ValueError, match="block 9"):
        attention_seg.evaluate(tiny_model(), masks(tmp_path), neurons={9: [0]}, progress=False)
    assert not seen


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        Settings(num_images=0)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    folder = coco(tmp_path / "coco")
    whole = (folder / "val2017" / "2.png").read_bytes()
    (folder / "val2017" / "2.png").write_bytes(whole[: len(whole) // 2])  # its head says its size
    with pytest.raises(OSError, match=r"2.png is not a readable image"):
        lost.evaluate(tiny_model(), folder, progress=False)


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    samples = boxed_images(coco(tmp_path / "coco"))
    evaluation = Evaluation("task", tiny_model(), "", Settings(progress=False))
    with pytest.raises(ValueError, match="the values of the model are not finite: run it in float32"):
        evaluation.features(
            evaluation.variants[0],
            samples,
            None,
            lambda variant, images: {"values": images.new_full((len(images),), np.inf)},
            {},
        )


def test_colours_are_normalised_as_the_model_says() -> None:
    found = normalisation_of(load_model("demo").transform)
    assert found.mean == pytest.approx((0.5,) * 3, abs=1e-5)
    assert found.std == pytest.approx((0.5,) * 3, abs=1e-5)
    with pytest.raises(ValueError, match="does not normalise each channel"):
        normalisation_of(lambda image: torch.arange(12.0).reshape(3, 2, 2))


def test_images_are_padded_or_squashed() -> None:
    from PIL import Image

    white = Image.new("RGB", (20, 9), (255, 255, 255))
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    padded = PaddedToPatches(normalise, (8, 8))(white)
    assert padded.shape == (3, 16, 24)
    assert padded[:, :9, :20].eq(1).all()
    assert padded[:, 9:].eq(0).all()
    assert Square(normalise, 16)(white).shape == Square(normalise, 16, "crop")(white).shape == (3, 16, 16)
    bordered = Image.new("RGB", (256, 256), (0, 0, 0))
    bordered.paste((255, 255, 255), (16, 16, 240, 240))
    assert Square(normalise, 224, "crop", 256 / 224)(bordered).eq(1).all()
    assert Square(normalise, 224, "crop")(bordered).min() == -1
    keys = {PaddedToPatches(normalise, (8, 8)).key, Square(normalise, 16).key, Square(normalise, 16, "crop").key}
    assert len(keys | {ModelPreprocessing(load_model("demo").transform).key}) == 4


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r'evaluation needs sklearnn, .* pip install "testreg\[evaluate\]"'):
        library("sklearnn.metrics")


def test_a_named_model_of_timm_takes_any_size() -> None:
    loaded = load_model("demo", any_size=True)
    with torch.no_grad(), patched(loaded.model, {3: [47, 55]}):
        assert loaded.model(torch.zeros(1, 3, 40, 64)).shape == (1, 10)
