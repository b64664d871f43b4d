"""Models with trained registers: how they are diagnosed, and what calibration makes of them."""

import pytest
import timm
import torch
from marks import slow_except
from planting import plant, plant_on_register
from tiny import TIMM, build, fresh
from torch import Tensor

import testreg
from testreg.calibration.errors import NoOutliersError
from testreg.families import find_tower
from testreg.measure.diagnosis import Diagnosis

WITH_REGISTERS = ["timm_dinov2_reg4", "hf_dinov2_registers", "hf_dinov3"]


def look(model: torch.nn.Module, photos: Tensor) -> Diagnosis:
    return testreg.diagnose(model, photos, progress=False)


@pytest.mark.parametrize("name", ["timm_vit", "timm_deit_distilled", "hf_dinov2", "hf_siglip", "open_clip"])
def test_other_models_have_none(name: str) -> None:
    assert find_tower(build(name)).num_trained_registers == 0


@pytest.mark.parametrize("name", ["vit_betwixt_patch16_reg4_gap_256", "vit_small_patch16_dinov3"])
def test_registers_of_timm(name: str) -> None:
    tower = find_tower(timm.create_model(name, **TIMM))
    assert tower.num_trained_registers == 4
    assert tower.num_prefix == (5 if "dinov3" in name else 4)


@pytest.mark.parametrize("name", slow_except(WITH_REGISTERS, "hf_dinov3"))
def test_what_is_planted_on_patches_is_found_and_removed(name: str, photos: Tensor) -> None:
    model = fresh(name)
    planted = plant(model, photos, num_neurons=4, norm_ratio=40.0)
    before = look(model, photos)
    assert before.kind == "movable"
    assert before.trained_registers == 4
    assert before.prefix_roles == []
    neurons = testreg.calibrate(model, photos, progress=False)
    ((block, units),) = neurons.by_block().items()
    assert set(units) <= set(planted.neurons[block])
    with testreg.patched(model, neurons):
        assert look(model, photos).kind == "none"


@pytest.mark.parametrize("name", WITH_REGISTERS)
def test_what_is_planted_on_a_trained_register_needs_nothing(name: str, photos: Tensor) -> None:
    model = fresh(name)
    plant_on_register(model, photos, register=2)
    found = look(model, photos)
    (role,) = found.prefix_roles
    assert (role.token, role.is_register) == (3, True)  # behind CLS and two others
    assert role.ratio > 10
    assert role.attention is not None
    assert role.attention > 0.3  # of half of the heads
    ratio = f"{role.ratio:.0f} x the median norm"
    assert found.verdict == (
        f"no outliers: nothing to fix (their role is taken by trained register (prefix token 3), {ratio})"
    )
    attention = max(sum(block.prefix_attention[1:]) for block in found.blocks if block.prefix_attention)
    cls = max(block.after_mlp.prefix_ratio[0] for block in found.blocks)
    assert found.notes[-1].startswith(
        f"4 trained registers have up to {role.ratio:.1f} x the median norm and {attention:.0%} of the attention; "
        f"1 other prefix token has up to {cls:.1f} x the median norm and "
    )
    with pytest.raises(NoOutliersError):
        testreg.calibrate(model, photos, progress=False)


def test_planting_on_a_register_that_is_not_there(photos: Tensor) -> None:
    with pytest.raises(ValueError, match="the model has 0 trained registers"):
        plant_on_register(fresh("timm_vit"), photos)
