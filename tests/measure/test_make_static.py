"""What registers hold, as constants: their mean over images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NEURONS, build
from torch import Tensor

import testreg
from testreg import make_static, patch, patched, registers


def images(number: int = 5) -> Tensor:
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("family", ["timm_siglip", "timm_clip", "hf_dinov3", "open_clip_sequence_first"])
@torch.no_grad()
def test_states_are_the_mean_of_what_enters_each_block(family: str) -> None:
    model = build(family)
    tower: Any = getattr(model, "visual", model)
    static = make_static(model, images(), NEURONS, num_registers=2, batch_size=2, progress=False)
    assert not testreg.is_patched(model)
    with patched(model, NEURONS, num_registers=2), registers(model) as after:
        tower(images())
    for block in range(1, 4):
        torch.testing.assert_close(static.states[block], after[block - 1].mean(0), rtol=1e-4, atol=1e-5)
    norm = {"timm_clip": lambda: model.norm_pre, "open_clip_sequence_first": lambda: tower.ln_pre}.get(family)
    first = torch.zeros(2, 48) if norm is None else norm().bias.expand(2, 48)
    assert static.states[0].equal(first)
    assert static.neurons == NEURONS
    assert (static.images["number"], static.images["image_size"]) == (5, [64, 64])
    assert static.model["depth"] == 4


def test_a_patched_model_keeps_its_patch() -> None:
    model = patch(build("timm_vit"), NEURONS, zero="all")
    one = make_static(model, images(), progress=False)
    assert testreg.is_patched(model)
    testreg.unpatch(model)
    assert one.states.equal(make_static(model, images(), NEURONS, zero="all", progress=False).states)


def test_one_image_is_its_own_mean() -> None:
    """Where every image is the same, constants are what the register holds: nothing changes for the patches."""
    model, image = build("timm_vit"), images(1)
    static = make_static(model, image, NEURONS, progress=False)
    with torch.no_grad(), patched(model, NEURONS):
        expected = model(image)
    with torch.no_grad(), patched(model, NEURONS, static=static):
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    model = build("timm_vit")
    static = make_static(model, images(), NEURONS, progress=False)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_static(model, images(), NEURONS, batch_size=0)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no image could be read"):
        make_static(model, tmp_path, NEURONS, progress=False)
    assert not testreg.is_patched(model)
    patch(model, NEURONS, static=static)
    with pytest.raises(ValueError, match="computes no registers"):
        make_static(model, images(), progress=False)
    with pytest.raises(ValueError, match="patched already"):
        make_static(model, images(), NEURONS, progress=False)
