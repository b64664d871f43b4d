"""Features of many images in one file: those of `features`, `attention` and `registers`, also after an interruption."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import in_processes
from safetensors import safe_open
from tiny import NEURONS, build
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg.io.processes import process_group
from testreg.measure import extraction

COUNT = 7
EVERYTHING: Any = ("patches", "cls", "attention", "registers")


def to_input(image: Image.Image) -> Tensor:
    return tv.pil_to_tensor(image).float() / 127.5 - 1


@pytest.fixture
def folder(photos: Tensor, tmp_path: Path) -> Path:
    """Photographs, one of which is broken, in two folders."""
    for i, photo in enumerate(photos[: COUNT - 1]):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        tv.to_pil_image((photo + 1) / 2).save(file)
    (tmp_path / "photos" / "b" / "0.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


NAMES = ["a/0.png", "a/2.png", "a/4.png", "b/0.jpg", "b/1.png", "b/3.png", "b/5.png"]
GOOD = [0, 1, 2, 4, 5, 6]
write = functools.partial(testreg.extract, transform=to_input, batch_size=2, progress=False)


def tensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


@pytest.mark.parametrize("family", ["timm_dinov2_reg4", "open_clip_sequence_first", "hf_siglip"])
def test_the_arrays_are_those_of_features_attention_and_registers(family: str, folder: Path, tmp_path: Path) -> None:
    model = testreg.patch(build(family), NEURONS, num_registers=2)
    what = [each for each in EVERYTHING if each != "cls" or family != "hf_siglip"]
    done = write(model, folder, tmp_path / "f.safetensors", blocks=[1, -1], what=what, norm=True)
    found, metadata = tensors(done.path)
    assert {name: tuple(value.shape) for name, value in found.items() if name != "read"} == done.arrays
    assert (json.loads(metadata["images"]), done.unreadable) == (NAMES, ["b/0.jpg"])
    assert json.loads(metadata["testreg"])["neurons"] == {str(block): units for block, units in NEURONS.items()}
    assert found["read"].tolist() == [number in GOOD for number in range(COUNT)]
    images = torch.stack([to_input(Image.open(folder / NAMES[number])) for number in GOOD])
    tower = testreg.families.find_tower(model)
    with testreg.registers(model) as held, torch.no_grad():
        tower.run(images)
    for block in (1, 3):
        patches = testreg.features(model, images, block, norm=True)
        torch.testing.assert_close(found[f"patches.{block}"][GOOD], patches, rtol=1e-4, atol=1e-5)
        attention = testreg.attention(model, images, block)
        torch.testing.assert_close(found[f"attention.{block}"][GOOD], attention, rtol=1e-4, atol=1e-6)
        registers = found[f"registers.{block}"][GOOD]
        assert registers.shape[1] == tower.num_trained_registers + 2
        expected = tower.final_norm(held[block])  # type: ignore[misc]
        torch.testing.assert_close(registers[:, -2:], expected, rtol=1e-4, atol=1e-5)
        assert not any(value[3].any() for name, value in found.items() if name.endswith(str(block)))
    if "cls" in what:
        kept: list[Tensor] = []
        handle = tower.blocks[1].module.register_forward_hook(lambda module, args, output: kept.append(output))
        tower.run(images)
        handle.remove()
        expected = tower.final_norm(tower.batch_first(kept[0])[:, 0])  # type: ignore[misc]
        torch.testing.assert_close(found["cls.1"][GOOD], expected, rtol=1e-4, atol=1e-5)


def test_half_precision_npz_and_parquet_hold_the_same(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    model = build("timm_vit")
    exact, _ = tensors(write(model, folder, tmp_path / "f.safetensors").path)
    halved, metadata = tensors(write(model, folder, tmp_path / "h.safetensors", half=True).path)
    assert {name: value.dtype for name, value in halved.items()} == {
        "read": torch.bool,
        "patches.3": torch.float16,
        "cls.3": torch.float16,
    }
    torch.testing.assert_close(halved["patches.3"].float(), exact["patches.3"], rtol=2e-3, atol=2e-3)
    assert json.loads(metadata["testreg"])["neurons"] is None
    arrays = np.load(write(model, folder, tmp_path / "f.npz", half=True).path)
    assert arrays["images"].tolist() == NAMES
    table = parquet.read_table(write(model, folder, tmp_path / "f.parquet", half=True).path)
    assert table["image"].to_pylist() == NAMES
    for name, value in halved.items():
        assert (arrays[name] == value.numpy()).all()
        assert (np.array(table[name].to_pylist()).reshape(value.shape) == value.numpy()).all()
    shape = json.loads(table.schema.field("patches.3").metadata[b"shape"])
    assert tuple(shape) == exact["patches.3"].shape[1:]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *("f.npz", "f.parquet", "f.safetensors", "h.safetensors")
    ]


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_it_goes_on_after_an_interruption(
    suffix: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = build("timm_vit"), tmp_path / f"f.{suffix}"
    expected = write(model, folder, tmp_path / f"whole.{suffix}").path.read_bytes()
    output.write_text("an earlier file")
    taken: list[int] = []

    def take(self: Any, images: Tensor) -> dict[str, Tensor]:
        if stops and len(taken) == 3:  # the first is that of the shapes
            raise KeyboardInterrupt
        taken.append(len(images))
        return plain(self, images)

    plain, stops = extraction._Extractor.extract, True
    monkeypatch.setattr(extraction._Extractor, "extract", take)
    with pytest.raises(KeyboardInterrupt):
        write(model, folder, output)
    assert (taken, output.read_text()) == ([1, 2, 2], "an earlier file")
    stops = False
    with pytest.raises(ValueError, match="was begun with other images, another model or other options"):
        write(model, folder, output, norm=True)
    taken.clear()
    write(model, folder, output)
    assert taken == [1, 2]
    assert not output.with_name(output.name + ".unfinished").exists()
    if suffix == "safetensors":
        assert output.read_bytes() == expected
    else:
        assert (np.load(output)["cls.3"] == np.load(tmp_path / "whole.npz")["cls.3"]).all()


def test_processes_share_the_images(folder: Path, tmp_path: Path) -> None:
    model = build("timm_vit")

    def work(rank: int) -> None:
        with process_group("cpu"):
            done = write(model, folder, tmp_path / "two.safetensors")
        assert done.unreadable == ["b/0.jpg"]

    assert [(each.code, each.err) for each in in_processes(2, work, tmp_path)] == [(0, "")] * 2
    found, _ = tensors(tmp_path / "two.safetensors")
    expected, _ = tensors(write(model, folder, tmp_path / "one.safetensors").path)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_said_at_once(folder: Path, tmp_path: Path, photos: Tensor) -> None:
    model, output = build("timm_vit"), tmp_path / "f.safetensors"

    def stream() -> Iterator[Tensor]:
        yield from photos

    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (folder, tmp_path / "f.json", {}, r"name a \.safetensors or \.npz or \.parquet file"),
        (folder, output, {"blocks": [9]}, r"blocks=\[9\] do not fit: the model has 4 blocks"),
        (folder, output, {"what": ["registers"]}, "has no registers"),
        (folder, output, {"what": ["norms"]}, "what is among patches, cls, attention, registers, got 'norms'"),
        (stream(), output, {}, "are not counted before they are read"),
        ([photos[0], photos[1, :, :48]], output, {}, "1 has 48 x 64 pixels as the model's input"),
        ([folder / "b" / "0.jpg"], output, {}, "no image could be read"),
    ]
    for images, path, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            write(model, images, path, **options)
        assert not output.exists()
        output.with_name(output.name + ".unfinished").unlink(missing_ok=True)
    with (
        testreg.patched(model, {2: [3]}, start="mean"),
        pytest.raises(ValueError, match="registers enter block 2 of VisionTransformer: leave them or earlier blocks"),
    ):
        write(model, folder, output, blocks=[1, 3], what=["registers"])
    with pytest.raises(ValueError, match="has no CLS token"):
        write(build("hf_siglip"), folder, output, what=["cls"])
    model.blocks[3].mlp.fc2.bias.data.fill_(1e5)  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="has values that float16 cannot hold: leave half out"):
        write(model, folder, output, half=True)
