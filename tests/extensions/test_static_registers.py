"""Static registers: constants in place of what registers hold, against a forward by hand, in both forms."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch._dynamo
from reference import LAYOUTS, block_outputs, build, forward_by_hand, mean_patch, run
from tiny import IMAGE
from torch import Tensor, nn

import testreg
from testreg import StaticRegisters, disabled, patch, registers, steered, unpatch
from testreg.families import find_tower, fingerprint
from testreg.patching.moves import shift
from testreg.patching.state import patch_of

RANKING = ((1, 3), (2, 127), (1, 120), (2, 0), (1, 77), (0, 5), (3, 9), (2, 64))
NEURONS = testreg.RegisterNeurons(tuple((layer, unit, None) for layer, unit in RANKING))
WITH_BIAS = ("open_clip", "open_clip_sequence_first", "torchvision_vit")
BOTH = [("timm_vit", "token"), ("open_clip_sequence_first", "token"), *((name, "bias") for name in WITH_BIAS)]

both_forms = pytest.mark.parametrize(("family", "form"), BOTH)


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7)).to(dtype)


def static(num_registers: int = 1, form: Any = "token", neurons: Mapping[int, Any] | None = None) -> StaticRegisters:
    states = 3 * torch.randn(4, num_registers, 48, generator=torch.Generator().manual_seed(5))
    return StaticRegisters(states, neurons or NEURONS.by_block(), form)


@torch.no_grad()
def outputs(model: nn.Module, batch: int = 2) -> Tensor:
    return run(model, images(batch, next(model.parameters()).dtype))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, -9, 7], [0, 0, 8], [0, 0, 9]]),
        ({"zero": "all"}, [[0, 0, 7], [0, 0, 8], [0, 0, 9]]),
        ({"patches": torch.tensor([[True, True, False]])}, [[0, 0, 7], [0, 0, 8], [4, -1, 9]]),
    ],
)
def test_neurons_are_silent_on_the_patches(options: dict[str, Any], expected: list[list[float]]) -> None:
    hidden = torch.tensor([[[1.0, -9.0, 7.0], [-6.0, 3.0, 8.0], [4.0, -1.0, 9.0]]])
    with torch.no_grad():
        assert shift(
            hidden, (0, 1), **{"num_registers": 0, "num_prefix": 1, "zero": "patches", **options}
        ).tolist() == [expected]


@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_every_block_agrees_with_the_forward_by_hand(family: str) -> None:
    """Both forms, where the family has both; the hand multiplies and adds with an explicit token."""
    model, inputs = build(family).double(), images(dtype=torch.float64)
    computed = block_outputs(family, patch(model, NEURONS), inputs)
    unpatch(model)
    for number, zero in ((1, "patches"), (3, "all")):
        constants = static(number)
        expected = forward_by_hand(
            family, model, inputs, RANKING, num_registers=number, zero=zero, static=constants.states.double()
        )
        assert (expected[-1] - computed[-1]).abs().max() > 0.1
        for form in ("token", "bias") if number == 1 and family in WITH_BIAS else ("token",):
            options = {"num_registers": number, "zero": zero, "static": dataclasses.replace(constants, form=form)}
            ours = block_outputs(family, patch(model, NEURONS, **options), inputs)
            unpatch(model)
            for block, by_hand in enumerate(expected):
                assert (ours[block] - by_hand).abs().max() < 1e-10, f"{form}, block {block}"


def test_without_neurons_those_are_taken_that_it_was_made_with() -> None:
    model = build("timm_vit")
    expected = outputs(patch(model, NEURONS, static=static(2)))
    unpatch(model)
    assert outputs(patch(model, static=static(2))).equal(expected)
    assert patch_of(model).neurons.by_block() == NEURONS.by_block()
    with pytest.raises(ValueError, match="has no scores, so it cannot be truncated to top_k"):
        patch(unpatch(model), top_k=2, static=static(2))


def test_what_enters_block_0_is_as_the_registers_start() -> None:
    model = build("timm_vit")
    entered = []
    with model.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0][:, 1:])):
        outputs(model)
    zeros, mean = (
        testreg.make_static(model, images(), NEURONS, progress=False, start=start, num_registers=2).states
        for start in ("zeros", "mean")
    )
    assert not zeros[0].any()
    torch.testing.assert_close(mean[0], mean_patch(entered[0]).mean(0).expand(2, -1))
    assert not torch.allclose(zeros[1], mean[1])


@torch.no_grad()
def test_those_that_enter_a_later_block_are_absent_in_front_of_it(tmp_path: Path) -> None:
    model, neurons, inputs = build("timm_vit").double(), {2: [3, 7], 3: [5]}, images(dtype=torch.float64)
    made = testreg.make_static(model, images(), neurons, progress=False, start="mean", num_registers=2)
    assert [bool(state.any()) for state in made.states] == [False, False, True, True]
    made.save(tmp_path / "it.static.safetensors")
    read = testreg.StaticRegisters.load(tmp_path / "it.static.safetensors")
    assert read.start == "mean"
    ranking = [(block, unit) for block, units in neurons.items() for unit in units]
    states = made.states.double()
    expected = forward_by_hand("timm_vit", model, inputs, ranking, num_registers=2, start="mean", static=states)
    ours = block_outputs("timm_vit", patch(model, neurons, static=read), inputs)
    for block, by_hand in enumerate(expected):
        assert (ours[block] - by_hand).abs().max() < 1e-10, f"block {block}"
    with pytest.raises(ValueError, match="are of registers with start='mean', not 'zeros'"):
        patch(unpatch(model), neurons, static=read, start="zeros")


@torch.no_grad()
def test_it_is_used_on_quantised_weights_and_refused_on_others() -> None:
    model = build("timm_vit")
    constants = dataclasses.replace(static(), model={"fingerprint": fingerprint(find_tower(model)), "name": "it"})
    for block in find_tower(model).blocks:
        weight = block.mlps[0].fc2_linear.weight
        weight.copy_((weight / 0.05).round() * 0.05)
    assert testreg.is_patched(patch(model, NEURONS, static=constants))
    for block in find_tower(unpatch(model)).blocks:
        block.mlps[0].fc2_linear.weight.normal_()
    with pytest.raises(ValueError, match="are of it, whose weights are not those of this model"):
        patch(model, NEURONS, static=constants)


@pytest.mark.parametrize("family", WITH_BIAS)
@torch.no_grad()
def test_folded_into_the_weights_the_model_is_an_ordinary_one(family: str) -> None:
    """Its state_dict gives the same in a model that testreg never saw, made with `bias_k` and `bias_v`."""
    model = patch(build(family).double(), NEURONS, zero="all", static=static(form="bias"))
    expected = outputs(model)
    assert testreg.fold(model) is model
    assert not testreg.is_patched(model)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-12)
    plain = build(family).double()
    for parameter in plain.parameters():
        parameter.zero_()
    for block in find_tower(plain).blocks:
        (attention,) = (each for each in block.module.modules() if isinstance(each, nn.MultiheadAttention))
        attention.bias_k, attention.bias_v = (
            nn.Parameter(torch.empty(1, 1, 48, dtype=torch.float64)) for _ in range(2)
        )
    plain.load_state_dict(model.state_dict())
    assert outputs(plain).equal(outputs(model))
    assert not [name for name, _ in model.named_buffers() if "testreg" in name]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("torchvision_vit", {"zero": "all"}, 'only static registers of form="bias"'),
        ("torchvision_vit", {"static": static(form="bias")}, "cannot tell CLS from patches"),
    ],
)
def test_what_weights_cannot_say_is_not_folded(family: str, options: dict[str, Any], message: str) -> None:
    model = patch(build(family), NEURONS, **options)
    expected = outputs(model)
    with pytest.raises(ValueError, match=message):
        testreg.fold(model)
    assert outputs(model).equal(expected)


def test_gradients_agree_with_the_forward_by_hand() -> None:
    for family, form in (("timm_dinov2_reg4", "token"), ("torchvision_vit", "bias")):
        model, inputs = build(family).double(), images(dtype=torch.float64).requires_grad_()
        by_hand = forward_by_hand(family, model, inputs, RANKING, static=static().states.double())[-1]
        weights = torch.randn(by_hand.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (expected,) = torch.autograd.grad((by_hand * weights).sum(), inputs)
        ours = block_outputs(family, patch(model, NEURONS, static=static(form=form)), inputs)[-1]
        (actual,) = torch.autograd.grad((ours * weights).sum(), inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@both_forms
def test_nothing_is_left_by_unpatch_and_nothing_is_in_the_state_dict(family: str, form: str) -> None:
    model = build(family)
    keys, before = list(model.state_dict()), {name: set(vars(each)) for name, each in model.named_modules()}
    buffers, clean = [name for name, _ in model.named_buffers()], outputs(model)
    patch(model, NEURONS, static=static(form=form))
    assert list(model.state_dict()) == keys
    with disabled(model):
        assert outputs(model).equal(clean)
    assert not outputs(model).equal(clean)
    unpatch(model)
    assert {name: set(vars(each)) for name, each in model.named_modules()} == before
    assert [name for name, _ in model.named_buffers()] == buffers
    assert not any(each._non_persistent_buffers_set & {"testreg_state", "testreg_bias_k"} for each in model.modules())
    assert outputs(model).equal(clean)


@both_forms
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_independent(family: str, form: str, duplicate: Callable[[Any], Any]) -> None:
    model = patch(build(family), NEURONS, static=static(form=form))
    expected, twin = outputs(model), duplicate(model)
    unpatch(model)
    assert outputs(twin).equal(expected)


@both_forms
@torch.no_grad()
def test_hooks_inside_see_a_token_more_only_where_there_is_one(family: str, form: str) -> None:
    model = build(family)
    tower = find_tower(model)
    patch(model, NEURONS, static=static(form=form))
    lengths: list[int] = []
    fc2 = tower.blocks[1].mlps[0].fc2
    fc2.register_forward_pre_hook(lambda module, args: lengths.append(tower.batch_first(args[0]).shape[1]))
    with registers(model) as seen:
        outputs(model)
    assert lengths == [18 if form == "token" else 17]
    assert [each.shape for each in seen] == ([(2, 1, 48)] * 4 if form == "token" else [])
    assert testreg.attention(model, images()).shape == (2, 4, 4, 4)
    assert testreg.features(model, images()).shape == (2, 48, 4, 4)


@torch.no_grad()
def test_attention_leaves_its_weights_of_the_bias_out() -> None:
    model = patch(build("torchvision_vit"), NEURONS, static=static(form="bias"))
    attention, kept = model.encoder.layers[1].self_attention, []
    plain = attention.forward

    def asked(*args: Any, **kwargs: Any) -> Any:
        out, weights = plain(*args, **{**kwargs, "need_weights": True})
        kept.append(weights)
        return out, None

    attention.forward = asked
    outputs(model)
    assert kept[0].shape == (2, 17, 17)
    assert (kept[0].sum(-1) < 1).all()


@both_forms
def test_steering_needs_no_registers(family: str, form: str) -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 1] = True
    model = patch(build(family), NEURONS)
    with steered(model, mask):
        expected = outputs(model)
    unpatch(model)
    patch(model, NEURONS, static=static(form=form))
    with steered(model, mask):
        assert outputs(model).equal(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form"), [("timm_vit", "token"), ("open_clip", "bias")])
@torch.no_grad()
def test_compile_and_export(family: str, form: str) -> None:
    torch._dynamo.reset()
    model = patch(build(family), NEURONS, static=static(form=form))
    tower, expected = getattr(model, "visual", model), outputs(model)
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, images()), expected, rtol=1e-4, atol=1e-5)
    with disabled(model):
        torch.testing.assert_close(run(compiled, images()), outputs(model), rtol=1e-4, atol=1e-5)
    for strict in (False, True):
        program = torch.export.export(tower, (images(),), strict=strict).module()
        torch.testing.assert_close(run(program, images()), expected, rtol=1e-4, atol=1e-5)
    assert outputs(copy.deepcopy(model)).equal(expected)


@both_forms
@torch.no_grad()
def test_lower_precision_and_autocast(family: str, form: str) -> None:
    exact = outputs(patch(build(family).double(), NEURONS, static=static(form=form)))
    model = patch(build(family), NEURONS, static=static(form=form))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = outputs(model)
    half = outputs(model.bfloat16())  # the constants follow
    for low in (mixed, half):
        assert (low.double() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("form", ["token", "bias"])
def test_gradient_checkpointing_changes_nothing(form: str) -> None:
    plain, model = (patch(build("open_clip").train(), NEURONS, static=static(form=form)) for _ in range(2))
    model.visual.set_grad_checkpointing(True)
    for each in (plain, model):
        run(each, images()).square().sum().backward()
    for ours, expected in zip(model.visual.parameters(), plain.visual.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_that_replace_others_get_the_constants_too() -> None:
    model = patch(build("timm_vit"), NEURONS, static=static())
    expected = outputs(model)
    model.blocks[1].register_forward_hook(lambda module, args, out: out.clone())
    assert outputs(model).equal(expected)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "given", "options", "message"),
    [
        ("timm_vit", static(form="bias"), {}, "does not attend with nn.MultiheadAttention.*form='token'"),
        ("open_clip", static(2, "bias"), {"num_registers": 2}, "a place for one register, not for 2"),
        ("timm_vit", static(2), {"num_registers": 1}, "pass num_registers=2, got 1"),
        ("timm_vit", static(neurons={1: [4]}), {}, "made with other register neurons"),
        ("timm_vit", StaticRegisters(torch.zeros(5, 1, 48), {1: [3]}), {}, "5 blocks of width 48, .* 4 of 48"),
        ("timm_vit", static(), {"target": torch.ones(1, 4, 4, dtype=torch.bool)}, "static or target"),
        (
            "timm_vit",
            dataclasses.replace(static(), model={"fingerprint": "0" * 16, "name": "another"}),
            {},
            "are of another, whose weights are not those of this model",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(
    family: str, given: StaticRegisters, options: dict[str, Any], message: str
) -> None:
    model = build(family)
    clean, buffers = outputs(model), dict(model.named_buffers()).keys()
    with pytest.raises(ValueError, match=message):
        patch(model, NEURONS, static=given, **options)
    assert not testreg.is_patched(model)
    assert dict(model.named_buffers()).keys() == buffers
    assert outputs(model).equal(clean)


def test_attention_that_has_a_bias_already_is_refused() -> None:
    model = build("torchvision_vit")
    model.encoder.layers[2].self_attention = nn.MultiheadAttention(48, 4, batch_first=True, add_bias_kv=True)
    with pytest.raises(ValueError, match="has a bias, or another forward, already"):
        patch(model, NEURONS, static=static(form="bias"))


def test_open_clips_own_attention_is_refused() -> None:
    tower = open_clip.transformer.VisionTransformer(
        image_size=64, patch_size=16, width=48, layers=4, heads=4, mlp_ratio=4.0, scale_fc=True
    )
    with pytest.raises(ValueError, match=r"does not attend with nn\.MultiheadAttention"):
        patch(tower, NEURONS, static=static(form="bias"))
