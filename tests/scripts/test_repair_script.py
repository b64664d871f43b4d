"""What `scripts/repair.py` measures is what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from repair import BATCH, channels, main, neighbours, replacing, seen_of
from tiny import HF_DINOV2, build
from torch import Tensor, nn

from testreg.demo.run import PHOTOGRAPHS
from testreg.families import find_tower
from testreg.io.loading import LoadedModel
from testreg.measure.hooks import recorded_tokens
from testreg.patching.forward import first_of, with_first


def with_an_outlier() -> tuple[Tensor, Tensor]:
    """Patches (1, 2, 3, 16) of which that of row 0, column 1 is an outlier in channel 3."""
    patches = torch.arange(6.0).view(1, 2, 3, 1).repeat(1, 1, 1, 16)
    patches[0, 0, 1, 3] = 600.0
    outlier = torch.zeros(1, 2, 3, dtype=torch.bool)
    outlier[0, 0, 1] = True
    return patches, outlier


def test_an_outlier_becomes_the_mean_of_its_neighbours_or_only_its_massive_channels_do() -> None:
    patches, outlier = with_an_outlier()
    mean = (0 + 2 + 3 + 4 + 5) / 5
    whole, part = neighbours(patches, outlier), channels(patches, outlier)
    assert torch.equal(whole[~outlier], patches[~outlier])
    torch.testing.assert_close(whole[0, 0, 1], torch.full((16,), mean))
    wanted = patches.clone()
    wanted[0, 0, 1, 3] = mean
    torch.testing.assert_close(part, wanted)
    assert torch.equal(channels(patches, outlier & False), patches)


@pytest.mark.parametrize("name", ["timm_vit", "hf_clip"])
def test_what_a_block_gets_is_replaced_within_the_context(name: str) -> None:
    model, images = build(name), torch.rand(2, 3, 64, 64)
    tower = find_tower(model)

    def high(module: object, args: object, out: Any) -> Any:
        tokens = first_of(out).clone()  # a tuple in transformers 4
        tokens[:, 1 + 4 + 2] = 100.0
        return with_first(out, tokens)

    handle = tower.blocks[1].module.register_forward_hook(high)
    with torch.no_grad(), replacing(tower, range(2, 3), lambda patches, outlier: patches * ~outlier[..., None]):
        got: list[Tensor] = []
        tower.blocks[2].module.register_forward_pre_hook(
            lambda module, args, kwargs: got.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        tower.run(images)
    assert (got[0] == 0).all(-1).nonzero().tolist() == [[0, 7], [1, 7]]
    with torch.no_grad(), recorded_tokens(tower, images, 1) as after:
        tower.run(images)
    assert (after[0][:, 7] == 100).all()
    handle.remove()


def test_what_is_seen_is_of_all_batches() -> None:
    images = torch.rand(BATCH + 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = build("timm_vit")
    seen = seen_of(LoadedModel(model, nn.Identity(), "tiny"), images)
    with torch.no_grad(), recorded_tokens(find_tower(model), images, 3) as after:
        find_tower(model).run(images)
    torch.testing.assert_close(seen.last, after[0][:, 1:])


def test_positions_are_planted_and_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**HF_DINOV2))
    model.save_pretrained(tmp_path)
    transformers.BitImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False).save_pretrained(tmp_path)
    arguments = ["positions", f"hf:{tmp_path}", "--images", str(PHOTOGRAPHS), "--num-images", "2", "--sizes", "64"]
    monkeypatch.setattr(sys, "argv", ["repair.py", *arguments])
    main()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [each[""] for each in found] == ["planted", "repaired"] * 4
    assert all(float(each["outliers_left"]) == (each[""] == "planted") for each in found)
    assert all(float(each["max_over_median"]) > 3 for each in found if each[""] == "planted")
