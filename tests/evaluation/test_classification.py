"""Nearest neighbours and linear probes: votes by hand, layouts of labelled images, and bad data."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow_except
from ranks import torchrun
from scenes import RANDOM, image_bytes, labelled, tiny_model

from testreg.cli import main
from testreg.evaluation import knn, linear
from testreg.evaluation.bootstrap import mean_of
from testreg.evaluation.classification import BLOCKS, features, top_1_and_5
from testreg.evaluation.fitting import _order_of_samples
from testreg.evaluation.knn import vote
from testreg.evaluation.labels import class_names, labelled_images
from testreg.evaluation.linear import RATES, Probes
from testreg.families import find_tower
from testreg.measure.tokens import normed_tokens

OPTIONS: dict[str, Any] = {"progress": False, "resamples": 5, "size": 64}


@pytest.fixture(autouse=True)
def _rows_of_parquet_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_neighbours_vote_by_their_similarity() -> None:
    known = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    asked = torch.tensor([[0.8, 0.6]])  # cosines .8, .96, .6
    votes = vote(asked, known, torch.tensor([2, 1, 2]), k=3, temperature=0.1)
    weights = np.exp(np.array([0.8, 0.96, 0.6]) / 0.1)
    assert votes[0].tolist() == pytest.approx(
        [0, weights[1] / weights.sum(), (weights[0] + weights[2]) / weights.sum()]
    )
    assert vote(asked, known, torch.tensor([2, 1, 2]), k=3, temperature=10.0).argmax() == 2  # two against one
    assert vote(asked, known, torch.tensor([2, 1, 2]), k=1, temperature=10.0).tolist() == [[0, 1, 0]]


def test_top_1_and_5() -> None:
    logits = torch.arange(7.0).repeat(3, 1)
    found = top_1_and_5(logits, torch.tensor([6, 2, 1]))
    assert found["top1"].value == pytest.approx(1 / 3)
    assert found["top5"].value == pytest.approx(2 / 3)


def test_colours_are_told_apart(tmp_path: Path) -> None:
    result = knn.evaluate(tiny_model(), labelled(tmp_path), neurons=RANDOM, k=3, **OPTIONS)
    assert result.metrics["plain"]["top1"] > 0.8
    assert result.protocol["images"] == result.protocol["train"] == 8
    with pytest.raises(ValueError, match="k must be between 1 and the 8 images of train, got 20"):
        knn.evaluate(tiny_model(), tmp_path, **OPTIONS)


@pytest.mark.parametrize("augment", slow_except([True, False], True))
def test_a_linear_probe_learns(augment: bool, tmp_path: Path) -> None:
    labelled(tmp_path)
    result = linear.evaluate(
        tiny_model(), tmp_path, neurons=RANDOM, iterations=20, fit_batch=8, augment=augment, **OPTIONS
    )
    assert result.metrics["plain"]["top1"] > 0.8
    assert result.protocol["augment"] is augment
    assert set(result.details["chosen"]) == {"plain", "patched"}


def test_probes_read_what_dinov2_gives_them() -> None:
    probes = Probes(width=3, classes=2, batch_size=512)
    assert len(probes.heads) == 52 == len(RATES) * 4
    assert {head.in_features for head in probes.heads} == {3, 6, 12, 15}
    cls = torch.arange(24.0).reshape(2, BLOCKS, 3)
    logits = probes({"cls": cls, "mean": torch.ones(2, 3)})
    head = probes.heads[1]  # of the last block, with the mean
    assert torch.allclose(
        logits["rate 1e-05, 1 block, with mean patch"],
        head(torch.tensor([[0, 1, 2, 1, 1, 1], [12, 13, 14, 1, 1, 1]]).float()),
    )
    before = probes.heads[0].weight.clone()
    probes.fit([({"cls": cls, "mean": torch.ones(2, 3)}, torch.tensor([0, 1]))], 1)
    step = (probes.heads[0].weight - before).abs().max()
    largest = (cls[:, 0].abs().max() / 2).item()
    assert 0 < step <= 1e-5 * 512 / 256 * largest  # the rate is for 256 images


def test_features_are_those_of_the_last_blocks() -> None:
    loaded = tiny_model("timm_dinov2")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        run_column = type("Variant", (), {"tower": find_tower(loaded.model)})
        found = features(run_column, images)  # type: ignore[arg-type]
        last = loaded.model.forward_features(images)
        blocks = loaded.model.get_intermediate_layers(images, n=4, return_prefix_tokens=True, norm=True)
    assert torch.allclose(found["cls"][:, 0], last[:, 0], atol=1e-5)
    assert torch.allclose(found["mean"], last[:, 1:].mean(1), atol=1e-5)
    assert torch.allclose(found["cls"][:, 3], blocks[0][1][:, 0], atol=1e-5)


def test_every_sample_is_drawn_as_often() -> None:
    draws = _order_of_samples(5, iterations=4, batch_size=5, seed=0)
    assert all(sorted(row) == [0, 1, 2, 3, 4] for row in draws)
    assert draws.tolist() == _order_of_samples(5, 4, 5, 0).tolist() != _order_of_samples(5, 4, 5, 1).tolist()


def parquet(folder: Path, label: str = "label", labels: tuple[Any, ...] = (0, 1)) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "test"):
        rows = {"image": [image_bytes(i) for i in range(len(labels))], label: list(labels)}
        pq.write_table(pa.table(rows), folder / f"tiny-{split}.parquet")
    return folder


def test_layouts_of_labelled_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folders = labelled_images(labelled(tmp_path / "folders", ("train", "test")))
    assert folders.classes == ["green", "red"]
    assert [each.target for each in folders.splits["val"]] == [0] * 4 + [1] * 4
    alone = labelled_images(tmp_path / "folders" / "train")
    assert [*alone.splits] == [""]
    (tmp_path / "parquet").mkdir()
    rows = labelled_images(parquet(tmp_path / "parquet"))
    assert {split: [each.target for each in found] for split, found in rows.splits.items()} == {
        "train": [0, 1],
        "val": [0, 1],
    }
    assert rows.splits["train"][1].open().size == (32, 32)
    one = labelled_images(tmp_path / "parquet" / "tiny-test.parquet")
    assert len(one.splits[""]) == 2
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict(
        {"img": [{"bytes": image_bytes(1), "path": None}], "label": [1]}, features=features
    )
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "saved")
    saved = labelled_images(f"hf-dataset:{tmp_path / 'saved'}")
    assert saved.classes == ["cat", "dog"]
    assert saved.splits["val"][0].target == 1
    assert saved.splits["val"][0].open().size == (32, 32)
    assert len({each.name for found in rows.splits.values() for each in found}) == 4


def test_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    rows = labelled_images(parquet(tmp_path / "parquet"))
    with pytest.raises(ValueError, match=r"does not say what its classes are called: .* \(--classes\)"):
        class_names(rows, None)
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="there are 1 names of classes, but an image of class 1"):
        class_names(rows, tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("cat\nbig dog\n")
    assert class_names(rows, tmp_path / "names.txt") == ["cat", "big dog"]


def missing(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no data at .*: labels are read from"


def nothing(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "has no labelled images"


def empty_split(folder: Path) -> str:
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    return "the split val of .* is empty"


def no_val(folder: Path) -> str:
    shutil.rmtree(folder / "val")
    return "has no split val: name its folder val or validation"


def unknown_class(folder: Path) -> str:
    shutil.copytree(folder / "val" / "red", folder / "val" / "violet")
    return "class violet of val is not in train"


@pytest.mark.parametrize("task", [knn, linear])
@pytest.mark.parametrize(
    "spoil", [missing, nothing, empty_split, no_val, unknown_class], ids=lambda spoil: spoil.__name__
)
def test_bad_data_is_one_error_before_a_model_is_loaded(spoil: Any, task: Any, tmp_path: Path) -> None:
    folder = labelled(tmp_path / "data")
    message = spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        task.evaluate("no such model", folder, **OPTIONS)


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column of labels among image, kind: name it label or labels"):
        labelled_images(parquet(tmp_path, "kind"))
    with pytest.raises(ValueError, match="has a label -1: labels are whole numbers from 0 on"):
        labelled_images(parquet(tmp_path, labels=(0, -1)))
    (tmp_path / "tiny-train.parquet").write_bytes(b"PAR")
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        labelled_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="no dataset's folder"):
        labelled_images("hf-dataset:/no/such/folder")


def test_tokens_behind_the_norm_are_the_librarys(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64)
    for name in ("hf_vit", "hf_siglip", "hf_dinov3", "timm_siglip"):
        tower = find_tower(tiny_model(name).model)
        with torch.no_grad():
            out = tower.run(images)
            assert torch.allclose(normed_tokens(tower, images)[0], getattr(out, "last_hidden_state", out), atol=1e-5)
    tower = find_tower(tiny_model("hf_clip").model)
    with torch.no_grad():
        assert torch.allclose(normed_tokens(tower, images)[0][:, 0], tower.run(images).pooler_output, atol=1e-5)


def test_means_of_nothing_are_not_defined() -> None:
    assert np.isnan(mean_of([np.nan]).value)


@pytest.mark.slow
def test_processes_fit_the_same_probe(tmp_path: Path) -> None:
    command = ["evaluate", "linear", "demo", "--data", str(labelled(tmp_path / "data")), "--neurons", "none"]
    command += ["--iterations", "3", "--fit-batch", "6", "--size", "56", "--resamples", "5", "--device", "cpu"]
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert main([*command, "--cache", str(tmp_path / "alone"), "--json", str(alone)]) == 0
    done = torchrun(2, [*command, "--cache", str(tmp_path / "shared"), "--json", str(shared)])
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(file.read_text()) for file in (alone, shared))
    assert two["plain"] == pytest.approx(one["plain"])
    assert two["details"] == one["details"]


def test_knn_and_linear_share_their_features(tmp_path: Path) -> None:
    folder, kept = labelled(tmp_path / "data"), tmp_path / "kept"
    options: dict[str, Any] = {"size": 64, "cache": kept, "progress": False}
    knn.evaluate(tiny_model(), folder, k=2, **options)
    files = {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")}
    linear.evaluate(tiny_model(), folder, augment=False, iterations=2, fit_batch=2, **options)
    assert {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")} == files
