import base64
import hashlib
import math
import warnings

import pytest
import tiny
import torch
from lists import fingerprint_of, rounded

import testreg
from testreg import RegisterNeurons
from testreg.families import compare_weights, find_tower, fingerprint
from testreg.families.fingerprint import agreement
from testreg.neurons import describe_model


def same_weights() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A timm and a transformers DINOv2 with the same second linears."""
    ours, theirs = tiny.build("timm_dinov2", seed=0), tiny.build("hf_dinov2", seed=1)
    for a, b in zip(find_tower(ours).blocks, find_tower(theirs).blocks, strict=True):
        b.mlps[0].fc2_linear.load_state_dict(a.mlps[0].fc2_linear.state_dict())
    return ours, theirs


def test_fingerprint_is_the_same_in_every_library() -> None:
    ours, theirs = same_weights()
    assert fingerprint_of(ours) == fingerprint_of(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    assert fingerprint_of(model.to(dtype)) == before


def test_fingerprint_leaves_out_what_rounding_made_zero() -> None:
    model = tiny.build("timm_vit")
    tower = find_tower(model)
    with torch.no_grad():
        tower.blocks[0].mlps[0].fc2_linear.weight.mul_(1e-9)  # fp16 has nothing but signed zeros for these
    before = fingerprint_of(model)
    assert compare_weights(before, find_tower(model.half())) == "similar"
    assert agreement(before, fingerprint_of(model)) == 1.0


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
def test_rounded_weights_are_similar_whichever_side_is_rounded(bits: int) -> None:
    tower = find_tower(tiny.build("timm_vit"))
    exact = fingerprint(tower)
    for block in tower.blocks:
        rounded(block.mlps[0].fc2_linear.weight.data, bits)
    assert compare_weights(exact, tower) in (("similar",) if bits <= 4 else ("same", "similar"))
    coarse = fingerprint(tower)
    assert agreement(exact, coarse) == agreement(coarse, exact) == 1.0
    assert agreement(coarse, fingerprint_of(tiny.build("timm_vit", seed=1))) == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize(("noise", "likeness"), [(0.05, "similar"), (0.15, "similar"), (1.0, "other"), (4.0, "other")])
def test_light_fine_tuning_is_similar_and_a_heavy_one_is_not(noise: float, likeness: str) -> None:
    """Of Gaussian weights, noise of a standard deviation n of theirs changes arctan(n) / pi of the signs."""
    torch.manual_seed(0)
    tower = find_tower(tiny.build("timm_vit"))
    before = fingerprint(tower)
    for block in tower.blocks:
        weight = block.mlps[0].fc2_linear.weight.data
        weight.add_(torch.randn_like(weight), alpha=noise * float(weight.std()))
    assert compare_weights(before, tower) == likeness
    assert agreement(before, fingerprint(tower)) == pytest.approx(1 - math.atan(noise) / math.pi, abs=0.08)


def test_fingerprint_holds_the_signs_at_places_that_are_the_same_in_each_block() -> None:
    """Written out from the weights: 64 of each of four blocks, at multiples of the golden ratio."""
    tower = find_tower(tiny.build("timm_vit"))
    bits = ""
    for block in tower.blocks:
        flat = block.mlps[0].fc2_linear.weight.detach().flatten()
        for i in range(64):
            value = float(flat[int((i * 2654435769 % 2**32) / 2**32 * len(flat))])
            bits += f"{int(value > 0)}{int(value < 0)}"
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    assert fingerprint(tower) == "2:" + base64.b64encode(packed).decode()


def test_fingerprints_of_the_first_version_are_compared_exactly() -> None:
    tower = find_tower(tiny.build("timm_vit"))
    signs = b""
    for block in tower.blocks:
        flat = block.mlps[0].fc2_linear.weight.detach().flatten()
        signs += bytes(int(flat[i * (len(flat) - 1) // 255] < 0) for i in range(256))
    old = hashlib.sha256(signs).hexdigest()[:16]
    assert compare_weights(old, tower) == "same"
    assert compare_weights("0" * 16, tower) == "other"
    tower.blocks[0].mlps[0].fc2_linear.weight.data[0, 0] *= -1
    assert compare_weights(old, tower) == "other"
    assert compare_weights(old, find_tower(tiny.build("timm_vit").to("meta"))) == "unknown"


@pytest.mark.parametrize("text", ["unknown", "3:AAAA", "2:AAA", "2:\N{SNOWMAN}", ""])
def test_what_is_no_fingerprint_tells_nothing(text: str) -> None:
    assert compare_weights(text, find_tower(tiny.build("timm_vit"))) == "unknown"


def test_fingerprints_of_towers_of_other_depths_are_others() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    model.blocks = model.blocks[:3]
    assert compare_weights(before, find_tower(model)) == "other"


def test_weights_that_are_nearly_all_zero_tell_nothing() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    for block in find_tower(model).blocks:
        block.mlps[0].fc2_linear.weight.data[2:] = 0
    assert compare_weights(before, find_tower(model)) == "unknown"


def test_torchao_weights_are_dequantised_to_be_read() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert compare_weights(before, find_tower(model)) in ("same", "similar")
    assert compare_weights(fingerprint_of(tiny.build("timm_vit", seed=1)), find_tower(model)) == "other"
    assert compare_weights("0" * 16, find_tower(model)) == "unknown"


def test_a_list_of_similar_weights_is_used_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("timm_vit")
    list_of_it = RegisterNeurons(((1, 3, None),), model={"name": "timm:ours", "fingerprint": fingerprint_of(model)})
    for block in find_tower(model).blocks:
        rounded(block.mlps[0].fc2_linear.weight.data, 4)
    with warnings.catch_warnings(), caplog.at_level("INFO", "testreg"):
        warnings.simplefilter("error")
        testreg.patch(model, list_of_it)
    assert [record.message for record in caplog.records] == [
        "the weights of timm:vit_base_patch16_224.augreg2_in21k_ft_in1k are those of timm:ours, quantised or "
        "fine-tuned: its register neurons are used"
    ]


def test_fingerprint_tells_weights_apart() -> None:
    towers = [find_tower(tiny.build("timm_vit", seed=seed)) for seed in range(5)]
    assert all(len(fingerprint(tower)) == 90 for tower in towers)
    likeness = [[compare_weights(fingerprint(one), other) for other in towers] for one in towers]
    assert likeness == [["same" if i == j else "other" for j in range(5)] for i in range(5)]


def test_fingerprint_sees_fine_tuning() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    with torch.no_grad():
        for block in find_tower(model).blocks:
            weight = block.mlps[0].fc2_linear.weight
            weight.add_(torch.randn_like(weight), alpha=0.05 * float(weight.std()))
    assert fingerprint_of(model) != before


def test_fingerprint_survives_patching() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    testreg.patch(model, tiny.NEURONS)
    assert fingerprint_of(model) == before


def test_patch_warns_of_other_weights_and_names_both_checkpoints() -> None:
    ours, theirs = same_weights()
    found = RegisterNeurons(((1, 3, None),), model={**describe_model(ours, find_tower(ours)), "name": "timm:ours"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        testreg.unpatch(testreg.patch(ours, found))
        testreg.unpatch(testreg.patch(theirs, found))
        testreg.unpatch(testreg.patch(theirs, tiny.NEURONS))  # a list without a fingerprint
    other = tiny.build("hf_dinov2", seed=2)
    other.config._name_or_path = "me/other"
    with pytest.warns(UserWarning, match=r"timm:ours.*not those of hf:me/other"):
        testreg.patch(other, found)
    assert testreg.is_patched(other)


def test_patch_warns_of_other_weights_of_an_unnamed_model() -> None:
    found = RegisterNeurons(((1, 3, None),), model={"name": "timm:ours", "fingerprint": "0" * 16})
    with pytest.warns(UserWarning, match=r"timm:ours.*this CLIP \(its checkpoint is unknown\)"):
        testreg.patch(tiny.build("open_clip"), found)
