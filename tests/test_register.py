"""The method: against literal tensors, the released code's outputs, and a forward written out by hand."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from marks import slow_except
from reference import LAYOUTS, block_outputs, build, forward_by_hand, mean_patch, run
from safetensors import safe_open
from timm.models.vision_transformer import checkpoint_filter_fn
from tiny import DUPLICATES, IMAGE, TORCH_2_9, TRANSFORMERS_4
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import testreg
from testreg import RegisterNeurons, disabled, is_patched, patch, unpatch
from testreg.neurons import Calibration
from testreg.patching.moves import AT_REST
from testreg.patching.state import patch_of
from testreg.records.calibration import Effect, Verification
from testreg.register import shift

# In rank order, mixed over all blocks, so that sharing them out to registers in another order would show.
RANKING = ((1, 3), (2, 127), (1, 120), (2, 0), (1, 77), (0, 5), (3, 9), (2, 64))
NEURONS = RegisterNeurons(tuple((block, unit, None) for block, unit in RANKING))
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "zero_firing": {"zero": "firing"},
    "zero_all": {"zero": "all"},
    "max_over_layer": {"max_over": "layer"},
    "three_registers": {"num_registers": 3},
    "all_options": {"num_registers": 2, "split_neurons": True, "zero": "all", "max_over": "layer"},
}

PATHS = (
    "timm_vit",
    "timm_dinov2_reg4",
    "timm_dinov3",
    "timm_eva02",
    "timm_parallel",
    "hf_clip",
    "hf_siglip",
    "hf_dinov2_swiglu",
    "hf_dinov3_gated",
    "open_clip",
    "open_clip_sequence_first",
    "torchvision_vit",
)  # of families with the same path through the code there is one

all_families = pytest.mark.parametrize("family", LAYOUTS)


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7)).to(dtype)


def build64(family: str) -> Any:
    return build(family).double()


@torch.no_grad()
def outputs(model: nn.Module, batch: int = 2) -> Tensor:
    return run(model, images(batch, next(model.parameters()).dtype))


class Same:
    """Equal only to the same object, not edited in place meanwhile."""

    def __init__(self, value: object) -> None:
        self.value, self.version = value, getattr(value, "_version", None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value and self.version == other.version

    def __repr__(self) -> str:
        return f"Same({type(self.value).__name__} {id(self.value)})"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that every module holds (parameters, hooks, submodules, ...), so that any residue of a patch shows."""

    def entry(value: object) -> object:
        return {key: Same(item) for key, item in value.items()} if isinstance(value, dict) else Same(value)

    return {
        name: (type(module), {key: entry(value) for key, value in module.__dict__.items()})
        for name, module in model.named_modules()
    }


@pytest.fixture
def unharmed() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Marks models that must end the test exactly as they are now."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []

    def mark(model: nn.Module) -> nn.Module:
        before.append((model, snapshot(model)))
        return model

    yield mark
    assert before
    for model, state in before:
        assert snapshot(model) == state


# shift ---------------------------------------------------------------------------------------------------------------

# Rows: CLS, patch, patch, register. Columns: neurons 0 and 1, which move, and 2, which does not.
HIDDEN = [[1.0, -7.0, 7.0], [-6.0, 3.0, 8.0], [4.0, -1.0, 9.0], [0.0, 5.0, 6.0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The largest magnitude keeps its sign, be it on a patch (-6) or on CLS (-7); CLS stays.
        ({}, [[1, -7, 7], [0, 0, 8], [0, 0, 9], [-6, -7, 6]]),
        ({"zero": "all"}, [[0, 0, 7], [0, 0, 8], [0, 0, 9], [-6, -7, 6]]),
        ({"max_over": "layer"}, [[1, -7, 7], [0, 0, 8], [0, 0, 9], [-7, -7, 6]]),
        ({"max_over": "layer", "zero": "all"}, [[0, 0, 7], [0, 0, 8], [0, 0, 9], [-7, -7, 6]]),
        # No CLS: every token is a patch. A trained register: prefix, and it may hold the maximum.
        ({"num_prefix": 0}, [[0, 0, 7], [0, 0, 8], [0, 0, 9], [-6, -7, 6]]),
        ({"num_prefix": 2}, [[1, -7, 7], [-6, 3, 8], [0, 0, 9], [-6, -7, 6]]),
        # Two registers, the last two rows: each holds all neurons.
        ({"num_registers": 2}, [[1, -7, 7], [0, 0, 8], [-6, -7, 9], [-6, -7, 6]]),
        # The neurons are shared out: a register holds its own, and is zero in the others'.
        ({"num_registers": 2, "owners": (0, 1)}, [[1, -7, 7], [0, 0, 8], [-6, 0, 9], [0, -7, 6]]),
        ({"num_registers": 2, "owners": (1, 0)}, [[1, -7, 7], [0, 0, 8], [0, -7, 9], [-6, 0, 6]]),
        ({"num_registers": 2, "owners": (1, 1)}, [[1, -7, 7], [0, 0, 8], [0, 0, 9], [-6, -7, 6]]),
        (
            {"num_registers": 2, "owners": (0, 1), "max_over": "layer"},
            [[1, -7, 7], [0, 0, 8], [-7, 0, 9], [0, -7, 6]],
        ),
        # The order of units is the order of owners.
        (
            {"num_registers": 2, "units": (1, 0), "owners": (0, 1)},
            [[1, -7, 7], [0, 0, 8], [0, -7, 9], [-6, 0, 6]],
        ),
        # The register's own activation takes part in the max (5 beats 3 and -1 where CLS holds less).
        ({"hidden": [[0, 0, 0], [0, 3, 0], [0, -1, 0], [0, 5, 0]]}, [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 5, 0]]),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_shift_gives_the_literal_result(options: dict[str, Any], expected: list[list[float]], grad: bool) -> None:
    options = {"units": (0, 1), "owners": None, "hidden": HIDDEN, **options}
    one = torch.tensor(options.pop("hidden"), dtype=torch.float32)
    hidden = torch.stack([one, -one, one.roll(1, 0)])  # each image has a maximum of its own
    with torch.set_grad_enabled(grad):
        moved = shift(hidden.clone(), options.pop("units"), options.pop("owners"), **options)
    torch.testing.assert_close(moved[0], torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0)
    torch.testing.assert_close(moved[1], -moved[0], rtol=0, atol=0)
    assert not moved[2].equal(moved[0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_shift_keeps_what_neurons_at_rest_give(grad: bool, masked: bool) -> None:
    # Rows: CLS, three patches, register. Neuron 0 fires on the first patch, neuron 1 on the second; 2 does not move.
    hidden = torch.tensor([[[0.5, -0.1, 2], [6, -0.17, -2], [-0.05, 4, 3], [-9, 0, 4], [0.3, -0.2, 5]]])
    patches = torch.tensor([[False, True, True, True, False]]) if masked else None
    with torch.set_grad_enabled(grad):
        moved = shift(hidden, (0, 1), zero="firing", patches=patches)
    expected = torch.tensor([[[0.5, -0.1, 2], [0, -0.17, -2], [-0.05, 0, 3], [-0.28, 0, 4], [-9, 4, 5]]])
    torch.testing.assert_close(moved, expected, rtol=0, atol=0)


def test_a_resting_neuron_is_within_the_range_that_shift_keeps() -> None:
    values = torch.linspace(-20, 0, 20_001)
    for activation in (F.gelu, F.silu, F.relu, lambda x: x * torch.sigmoid(1.702 * x)):
        at_rest = activation(values)
        assert at_rest.clamp(*AT_REST).equal(at_rest)


def test_registers_of_a_forward_are_never_beside_those_of_another() -> None:
    model = patch(build("timm_vit"), NEURONS)
    with testreg.registers(model) as seen:
        model(images())
        assert len(seen) == 4
        handle = model.blocks[1].register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images())
        handle.remove()
        assert len(seen) == 1
        with disabled(model):
            model(images())
        assert seen == []


@torch.no_grad()
def test_parts_that_are_called_outside_of_their_block_are_as_they_were() -> None:
    model = build("timm_vit")
    tokens = torch.randn(2, 17, 48)
    expected = model.blocks[1].mlp(tokens)
    patch(model, NEURONS)
    with pytest.warns(UserWarning, match="called outside of the block's own forward"):
        assert model.blocks[1].mlp(tokens).equal(expected)
    assert model.blocks[1].mlp(tokens).equal(expected)  # says so once


def test_an_infinite_activation_goes_to_its_own_register_alone() -> None:
    hidden = torch.zeros(1, 5, 2)
    hidden[0, 1] = torch.inf
    moved = shift(hidden, [0, 1], [0, 1], num_registers=2, num_prefix=1)
    assert moved[0].tolist() == [[0, 0], [0, 0], [0, 0], [torch.inf, 0], [0, torch.inf]]


def test_shift_copies_with_gradients_and_edits_in_place_without() -> None:
    hidden = torch.tensor([HIDDEN])
    before = hidden.clone()
    moved = shift(hidden, (0, 1))
    assert hidden.equal(before)
    assert moved.data_ptr() != hidden.data_ptr()
    with torch.no_grad():
        assert shift(hidden, (0, 1)) is hidden
    assert hidden.equal(moved)


def test_shift_sends_the_gradient_of_the_register_to_the_largest_activation() -> None:
    hidden = torch.tensor([HIDDEN], requires_grad=True)
    weights = torch.arange(1.0, 13.0).view(1, 4, 3)
    (shift(hidden, (0, 1)) * weights).sum().backward()
    # The register's weights are 10 and 11: 10 goes to patch 1, 11 to CLS on top of CLS's own 2.
    expected = [[1.0, 2.0 + 11.0, 3.0], [10.0, 0.0, 6.0], [0.0, 0.0, 9.0], [0.0, 0.0, 12.0]]
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == expected


@pytest.mark.parametrize(
    "options",
    [{}, {"zero": "all", "max_over": "layer"}, {"num_registers": 2}, {"num_registers": 2, "owners": (0, 1)}],
)
def test_shift_passes_gradcheck(options: dict[str, Any]) -> None:
    hidden = torch.tensor([HIDDEN], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: shift(h, (0, 1), **options), (hidden,))


def test_shift_leaves_what_activations_saved_for_backward() -> None:
    hidden = torch.tensor([HIDDEN], requires_grad=True)
    shift(F.relu(hidden), (0, 1), (0, 0)).sum().backward()  # ReLU's backward reads its output


def test_shift_in_inference_mode_does_not_spoil_a_later_backward() -> None:
    units = (2, 1, 0)  # used by no other test: the cached index is made here
    with torch.inference_mode():
        shift(torch.tensor([HIDDEN]), units, (0, 0, 0))
    hidden = torch.tensor([HIDDEN], requires_grad=True)
    shift(hidden, units, (0, 0, 0)).sum().backward()
    assert hidden.grad is not None


# The released code ---------------------------------------------------------------------------------------------------


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(Path(__file__).parent / "data" / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.neurons = {int(block): units for block, units in json.loads(file.metadata()["neurons"]).items()}
        self.weights = {key[len("weights.") :]: value for key, value in tensors.items() if key.startswith("weights.")}
        self.io = {key[len("io.") :]: value for key, value in tensors.items() if key.startswith("io.")}


def timm_dinov2(golden: Golden) -> nn.Module:
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=56, embed_dim=48, depth=4, num_heads=4, init_values=1.0
    )
    model.load_state_dict(checkpoint_filter_fn(dict(golden.weights), model))
    return model.eval()


def hf_dinov2(golden: Golden) -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14
    )
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "blocks.": "encoder.layer.",
        ".ls1.gamma": ".layer_scale1.lambda1",
        ".ls2.gamma": ".layer_scale2.lambda1",
        ".attn.proj.": ".attention.o_proj.",
    }
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    if TRANSFORMERS_4:
        names[".attn.proj."] = ".attention.output.dense."
        parts = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}
    state = {}
    for key, value in golden.weights.items():
        key = "layernorm" + key[len("norm") :] if key.startswith("norm.") else key
        for old, new in names.items():
            key = key.replace(old, new)
        if ".attn.qkv." in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                state[key.replace(".attn.qkv.", f".attention.{parts[part]}.")] = third
        else:
            state[key] = value
    model = transformers.Dinov2Model(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(("make", "layout"), [(timm_dinov2, "timm_dinov2"), (hf_dinov2, "hf_dinov2")])
@torch.no_grad()
def test_agrees_with_the_released_dinov2(make: Callable[[Golden], nn.Module], layout: str) -> None:
    golden = Golden("dinov2_tiny")
    model, inputs = make(golden), golden.io["input_56"]
    base, official = golden.io["base_prenorm_56"], golden.io["official_prenorm_56"][:, :-1]
    assert (base - official).abs().max() > 0.1  # or agreement would say nothing
    torch.testing.assert_close(block_outputs(layout, model, inputs)[-1], base, rtol=0, atol=1e-5)
    patch(model, golden.neurons, max_over="layer")
    torch.testing.assert_close(block_outputs(layout, model, inputs)[-1], official, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_agrees_with_the_released_openclip(batch_first: bool) -> None:
    golden = Golden("openclip_tiny")
    model = open_clip.transformer.VisionTransformer(
        image_size=64,
        patch_size=16,
        width=48,
        layers=4,
        heads=4,
        mlp_ratio=4.0,
        output_dim=32,
        act_layer=open_clip.transformer.QuickGELU,
    ).eval()
    model.load_state_dict(golden.weights)
    model.transformer.batch_first = batch_first
    for block in model.transformer.resblocks:
        block.attn.batch_first = batch_first
    layout = "open_clip" if batch_first else "open_clip_sequence_first"
    wrapped = nn.ModuleDict({"visual": model})  # where the layout looks for it
    wrapped.visual = model

    base, official = golden.io["base_tokens"], golden.io["official_tokens"][:, :-1]
    assert (base - official).abs().max() > 0.1
    torch.testing.assert_close(block_outputs(layout, wrapped, golden.io["input"])[-1], base, rtol=0, atol=1e-5)
    patch(model, golden.neurons, max_over="layer")
    torch.testing.assert_close(block_outputs(layout, wrapped, golden.io["input"])[-1], official, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(golden.io["input"]), golden.io["official_pooled"], rtol=0, atol=1e-5)


# The forward written out by hand -------------------------------------------------------------------------------------


@all_families
@torch.no_grad()
def test_every_block_agrees_with_the_forward_by_hand(family: str) -> None:
    model, inputs = build64(family), images(dtype=torch.float64)
    unpatched = block_outputs(family, model, inputs)
    for variant, options in VARIANTS.items():
        expected = forward_by_hand(family, model, inputs, RANKING, **options)
        patched = block_outputs(family, patch(model, NEURONS, **options), inputs)
        unpatch(model)
        assert (expected[-1] - unpatched[-1]).abs().max() > 0.1
        for block, (ours, by_hand) in enumerate(zip(patched, expected, strict=True)):
            assert (ours - by_hand).abs().max() < 1e-10, f"{variant}, block {block}"


@all_families
@torch.no_grad()
def test_registers_that_start_as_the_mean_patch_enter_the_first_block_with_neurons(family: str) -> None:
    model, inputs = build64(family), images(dtype=torch.float64)
    unpatched = block_outputs(family, model, inputs)
    for entry in (0, 1, 2):
        ranking = [(block, unit) for block, unit in RANKING if block >= entry]
        neurons = {block: [unit for at, unit in ranking if at == block] for block, _ in ranking}
        for options in ({}, {"num_registers": 3, "zero": "all", "max_over": "layer"}):
            expected = forward_by_hand(family, model, inputs, ranking, start="mean", **options)
            with testreg.patched(model, neurons, start="mean", **options), testreg.registers(model) as after_block:
                patched = block_outputs(family, model, inputs)
            count = options.get("num_registers", 1)
            assert [each.shape[1] for each in after_block] == [0] * entry + [count] * (len(expected) - entry)
            assert (expected[-1] - unpatched[-1]).abs().max() > 0.01
            for block, (ours, by_hand) in enumerate(zip(patched, expected, strict=True)):
                assert (ours - by_hand).abs().max() < 1e-10, f"entry {entry}, {options}, block {block}"


def test_blocks_in_front_of_the_entry_are_not_changed() -> None:
    model = patch(build("timm_vit"), {2: [3], 3: [5]}, start="mean")
    changed = [any("forward" in vars(module) for module in block.modules()) for block in model.blocks]
    assert changed == [False, False, True, True]
    with testreg.registers(model) as after_block:
        model(images())
    assert [tuple(each.shape) for each in after_block] == [(2, 0, 48), (2, 0, 48), (2, 1, 48), (2, 1, 48)]


def test_the_variants_differ() -> None:
    model, inputs = build64("timm_dinov2_reg4"), images(dtype=torch.float64)
    finals = [
        forward_by_hand("timm_dinov2_reg4", model, inputs, RANKING, **options)[-1] for options in VARIANTS.values()
    ]
    for i, one in enumerate(finals):
        assert all((one - other).abs().max() > 1e-3 for other in finals[:i])


def test_gradients_agree_with_the_forward_by_hand() -> None:
    family = "timm_dinov2_reg4"
    model, inputs = build64(family), images(dtype=torch.float64).requires_grad_()
    targets = [inputs, *model.blocks.parameters(), model.cls_token]
    weights = torch.randn(2, 21, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(tokens: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((tokens * weights).sum(), targets)

    expected = gradients(forward_by_hand(family, model, inputs, RANKING)[-1])
    plain = gradients(block_outputs(family, model, inputs)[-1])
    actual = gradients(block_outputs(family, patch(model, NEURONS), inputs)[-1])
    assert (expected[0] - plain[0]).abs().max() > 1e-2
    for ours, by_hand in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-10)


def test_top_k_takes_the_best() -> None:
    scored = RegisterNeurons(tuple((block, unit, 9.0 - i) for i, (block, unit) in enumerate(RANKING)))
    best = outputs(patch(build("timm_vit"), {1: [3, 120], 2: [127]}))
    assert outputs(patch(build("timm_vit"), scored, top_k=3)).equal(best)
    assert not outputs(patch(build("timm_vit"), scored)).equal(best)


# What patching leaves as it was --------------------------------------------------------------------------------------


@all_families
@torch.no_grad()
def test_images_of_a_batch_do_not_mix(family: str) -> None:
    model, inputs = patch(build64(family), NEURONS, num_registers=2), images(3, torch.float64)
    single = torch.cat([run(model, image.unsqueeze(0)) for image in inputs])
    torch.testing.assert_close(run(model, inputs), single, rtol=0, atol=1e-10)


@all_families
def test_unpatch_leaves_no_trace(family: str) -> None:
    model = build(family)
    clean, state, keys = outputs(model), snapshot(model), list(model.state_dict())
    assert patch(model, NEURONS, num_registers=2) is model
    assert is_patched(model)
    assert list(model.state_dict()) == keys
    assert snapshot(model) != state
    assert not outputs(model).equal(clean)
    assert unpatch(model) is model
    assert not is_patched(model)
    assert snapshot(model) == state
    assert outputs(model).equal(clean)


@pytest.mark.parametrize(
    ("family", "duplicate"),
    slow_except(
        itertools.product(LAYOUTS, DUPLICATES),
        *[(family, copy.deepcopy) for family in PATHS],
        *[("timm_vit", duplicate) for duplicate in DUPLICATES],
    ),
)
def test_copies_are_patched_and_independent(family: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = build(family)
    clean = outputs(model)
    patched = outputs(patch(model, NEURONS, num_registers=2))
    twin = duplicate(model)
    assert outputs(twin).equal(patched)
    with disabled(twin):
        assert outputs(model).equal(patched)
    assert outputs(unpatch(twin)).equal(clean)
    assert is_patched(model)
    assert outputs(model).equal(patched)
    twin = duplicate(model)
    assert outputs(unpatch(model)).equal(clean)
    assert outputs(twin).equal(patched)


def test_state_dict_of_an_unpatched_model_loads() -> None:
    source, target = build("timm_vit"), patch(timm.create_model("test_vit", num_classes=10), {1: [0]})
    assert list(target.state_dict()) == list(timm.create_model("test_vit", num_classes=10).state_dict())
    model = patch(copy.deepcopy(source), NEURONS)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(source.state_dict())
    assert outputs(model).equal(outputs(patch(source, NEURONS)))


def test_class_swaps_after_patching_keep_the_registers() -> None:
    model = patch(build("timm_vit"), NEURONS)
    expected = outputs(model)
    for block in model.blocks:  # as FSDP2's fully_shard does
        block.__class__ = type("FSDP" + type(block).__name__, (type(block),), {})
    assert outputs(model).equal(expected)


def test_user_hooks_see_the_tokens_alone() -> None:
    model, shapes = patch(build("timm_vit"), NEURONS), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
        block.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    outputs(model)
    assert shapes == [(2, 17, 48)] * 8


@all_families
def test_the_tokens_leave_the_last_block_contiguous_and_carry_nothing(family: str) -> None:
    model, left = patch(build(family), NEURONS), []
    LAYOUTS[family].blocks(model)[-1].register_forward_hook(lambda module, args, output: left.append(output))
    outputs(model)
    tokens = left[0][0] if isinstance(left[0], tuple) else left[0]
    assert tokens.is_contiguous()
    assert not vars(tokens)


def test_edits_in_place_between_blocks_reach_the_next_block() -> None:
    def scale(module: nn.Module, args: Any, output: Tensor) -> None:
        output.mul_(0.5)

    model = build("timm_vit")
    plain = outputs(patch(model, NEURONS))
    model.blocks[1].register_forward_hook(scale)
    assert not torch.allclose(outputs(model), plain, atol=1e-3)


# disabled ------------------------------------------------------------------------------------------------------------


@all_families
def test_disabled_restores_the_original_output(family: str) -> None:
    model = build(family)
    clean = outputs(model)
    patched = outputs(patch(model, NEURONS))
    with disabled(model) as same:
        assert same is model
        assert outputs(model).equal(clean)
    assert outputs(model).equal(patched)


def test_disabled_nests_and_ends_with_an_exception() -> None:
    model = patch(build("timm_vit"), NEURONS)
    patched = outputs(model)
    with disabled(model):
        with disabled(model):
            pass
        assert not outputs(model).equal(patched)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert outputs(model).equal(patched)


def test_disabled_blocks_that_overlap_end_with_the_last() -> None:
    model = build("timm_vit")
    clean = outputs(model)
    patched = outputs(patch(model, NEURONS))
    first, second = disabled(model), disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert outputs(model).equal(clean)
    second.__exit__(None, None, None)
    assert outputs(model).equal(patched)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_while_disabled_is_not_disabled(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = patch(build("timm_vit"), NEURONS)
    patched = outputs(model)
    with disabled(model):
        twin = duplicate(model)
        assert outputs(twin).equal(patched)


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "open_clip_sequence_first", "torchvision_vit"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_forward_ends_as_it_began(family: str, at: int) -> None:
    """Another thread opens or closes `disabled` while a block runs: the hook stands for it."""
    model = build(family)
    block = LAYOUTS[family].blocks(model)[at]
    clean = outputs(model)
    patched = outputs(patch(model, NEURONS))
    norm = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
    with contextlib.ExitStack() as stack:
        norm.register_forward_hook(lambda *args: stack.enter_context(disabled(model)) and None)
        assert outputs(model).equal(patched)
        norm._forward_hooks.clear()
        norm.register_forward_hook(lambda *args: stack.close())
        assert outputs(model).equal(clean)


@pytest.mark.parametrize("begins_disabled", [True, False])
def test_a_checkpointed_forward_is_recomputed_as_it_began(begins_disabled: bool) -> None:
    plain, model = (build("timm_vit").train() for _ in range(2))
    patch(model, NEURONS).set_grad_checkpointing(True)
    during, after = disabled(model), contextlib.nullcontext()
    if not begins_disabled:
        patch(plain, NEURONS)
        during, after = after, during
    with during:
        loss = run(model, images()).square().sum()
    with after:
        loss.backward()
    run(plain, images()).square().sum().backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


# Compilers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_dynamo(request: pytest.FixtureRequest) -> None:
    if "compile" in request.node.name:
        torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Callable[[Tensor], Tensor]:
    tower = torch.compile(getattr(model, "visual", model), fullgraph=True, **options)
    return lambda inputs: run(tower, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", PATHS)
@torch.no_grad()
def test_compile_needs_one_graph_for_all_batch_sizes(family: str) -> None:
    if TORCH_2_9 and family.startswith(("open_clip", "torchvision")):
        pytest.skip("torch 2.9 cannot compile nn.MultiheadAttention for sizes that change, patched or not")
    model = patch(build(family), NEURONS, num_registers=2)
    from torch._dynamo.testing import CompileCounter  # imported here, as it takes a second

    counter = CompileCounter()
    forward = compiled(model, backend=counter)
    for batch in (2, 3, 5):
        torch.testing.assert_close(forward(images(batch)), outputs(model, batch), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2  # the first is static, the second dynamic


@pytest.mark.slow
@torch.no_grad()
def test_compile_with_inductor_agrees() -> None:
    model = patch(build("timm_dinov2_reg4"), NEURONS)
    torch.testing.assert_close(compiled(model)(images()), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_has_the_same_gradients() -> None:
    model = patch(build("timm_dinov2_reg4"), NEURONS)
    actual, expected = (
        torch.autograd.grad(forward(images()).square().sum(), list(model.blocks.parameters()))
        for forward in (compiled(model, backend="aot_eager"), functools.partial(run, model))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compile_notices_patch_disabled_and_unpatch() -> None:
    model = build("timm_vit")
    model.blocks = model.blocks[:2]  # compiling takes a second for each
    neurons = {block: units for block, units in NEURONS.by_block().items() if block < 2}
    forward, clean = compiled(model, backend="eager"), outputs(model)
    assert forward(images()).equal(clean)
    patched = outputs(patch(model, neurons))
    assert not patched.equal(clean)
    assert forward(images()).equal(patched)
    with disabled(model):
        assert forward(images()).equal(clean)
    assert forward(images()).equal(patched)
    unpatch(model)
    assert forward(images()).equal(clean)


@pytest.mark.parametrize("family", slow_except(LAYOUTS, "timm_vit"))
@torch.no_grad()
def test_export_takes_any_batch_size(family: str) -> None:
    # Units used by no other test, so that an index is cached, or not, by the trace itself.
    model = patch(build(family), {1: [31, 41, 59], 2: [26, 53]}, num_registers=2)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(
        getattr(model, "visual", model), (images(2),), strict=False, dynamic_shapes=shapes
    ).module()
    for batch in (2, 5):
        torch.testing.assert_close(run(program, images(batch)), outputs(model, batch), rtol=1e-4, atol=1e-5)
    # Nothing of the trace stays behind in the model.
    assert outputs(copy.deepcopy(model)).equal(outputs(model))


@pytest.mark.slow
@torch.no_grad()
def test_export_with_eager_attention_extends_the_mask_that_transformers_makes() -> None:
    model = build("hf_vit")
    model.set_attn_implementation("eager")
    patch(model, NEURONS, num_registers=2)
    program = torch.export.export(model, (images(),), strict=False).module()
    torch.testing.assert_close(run(program, images()), outputs(model), rtol=1e-4, atol=1e-5)


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bf16", "autocast"])
@pytest.mark.parametrize("family", slow_except(LAYOUTS, *PATHS))
@torch.no_grad()
def test_low_precision_errs_no_more_than_without_registers(family: str, how: str) -> None:
    def tokens(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return block_outputs(family, model, images(4, next(model.parameters()).dtype))[-1]

    def error(prepare: Callable[[Any], Any]) -> float:
        exact = tokens64 = block_outputs(family, prepare(build64(family)), images(4, torch.float64))[-1]
        low = tokens(prepare(build(family).bfloat16() if how == "bf16" else build(family)))
        plain = tokens(build(family).bfloat16() if how == "bf16" else build(family))
        assert low.dtype == plain.dtype
        return ((low - exact).norm() / tokens64.norm()).item()

    assert error(lambda model: patch(model, NEURONS)) < 1.5 * error(lambda model: model) < 0.05


# Training ------------------------------------------------------------------------------------------------------------


def parameter_gradients(model: Any) -> list[Tensor]:
    tower = getattr(model, "visual", model)
    output = run(model, images())
    # Not a plain sum, which a final LayerNorm would make constant.
    loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    loss.backward()
    return [parameter.grad for parameter in tower.parameters() if parameter.grad is not None]


CHECKPOINTING = [
    (name, reentrant)
    for name in LAYOUTS
    # transformers 4 has the re-entrant kind around whole blocks, which is refused.
    for reentrant in ([False, True] if name.startswith("hf") and not TRANSFORMERS_4 else [False])
    # The first two have no such switch; open_clip's own custom blocks cannot be checkpointed.
    if not name.startswith(("dinov2", "torchvision", "open_clip_mlp_norm"))
]


@pytest.mark.parametrize(("family", "reentrant"), CHECKPOINTING)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    plain = parameter_gradients(patch(build(family).train(), NEURONS))
    model: Any = patch(build(family).train(), NEURONS)
    if family.startswith("hf"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        getattr(model, "visual", model).set_grad_checkpointing(True)
    runs: list[nn.Module] = []
    inner = next(m for m in LAYOUTS[family].blocks(model)[2].modules() if isinstance(m, nn.LayerNorm))
    inner.register_forward_hook(lambda module, args, output: runs.append(module))

    recomputed = parameter_gradients(model)
    assert len(runs) == 2  # forward, and again in backward
    assert len(recomputed) == len(plain) > 40
    for ours, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_of_blocks_is_refused() -> None:
    model = patch(build("timm_vit"), NEURONS)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images())))
    x = checkpoint(model.blocks[0], x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"at block 1 .*use_reentrant=False"):
        checkpoint(model.blocks[1], x, use_reentrant=True)


def test_reentrant_checkpointing_of_the_whole_model_works() -> None:
    model = patch(build("timm_vit"), NEURONS)
    plain, whole = images().requires_grad_(), images().requires_grad_()
    model(plain).square().sum().backward()
    checkpoint(model, whole, use_reentrant=True).square().sum().backward()
    torch.testing.assert_close(whole.grad, plain.grad)


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["timm_dinov2_reg4", "hf_clip", "open_clip_sequence_first", "torchvision_vit"])
def test_threads_do_not_meet(family: str) -> None:
    model = patch(build(family), NEURONS, num_registers=2)
    expected = {batch: outputs(model, batch) for batch in (2, 3)}
    wrong: list[Any] = []
    start = threading.Barrier(2)

    def work(batch: int) -> None:
        start.wait()
        for _ in range(25):
            try:
                if not outputs(model, batch).equal(expected[batch]):
                    wrong.append(batch)
            except Exception as error:  # a thread would swallow it
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_threads(*jobs: Callable[[], object]) -> None:
    """Run jobs side by side, from one start; the first error of a job is raised here."""
    start = threading.Barrier(len(jobs))
    errors: list[BaseException] = []

    def work(job: Callable[[], object]) -> None:
        try:
            start.wait()
            job()
        except BaseException as error:  # a thread would swallow it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_disabled_in_eight_threads() -> None:
    """Half of them disable the model again and again: every forward is either plain or patched, and it ends patched."""
    model = build("timm_vit")
    clean = outputs(model)
    patched = outputs(patch(model, NEURONS))

    def toggle() -> None:
        for _ in range(20):
            with disabled(model):
                assert outputs(model).equal(clean)

    def forward() -> None:
        for _ in range(20):
            assert any(map(outputs(model).equal, (clean, patched)))

    in_threads(*[toggle, forward] * 4)
    assert outputs(model).equal(patched)


def test_registers_in_eight_threads_are_each_of_its_own_forward() -> None:
    model = patch(build("timm_vit"), NEURONS)

    def recorded(batch: int) -> list[Tensor]:
        with testreg.registers(model) as held:
            outputs(model, batch)
        return held

    expected = {batch: recorded(batch) for batch in range(1, 9)}

    def work(batch: int) -> None:
        for _ in range(10):
            torch.testing.assert_close(recorded(batch), expected[batch])

    in_threads(*(functools.partial(work, batch) for batch in expected))


# Growth --------------------------------------------------------------------------------------------------------------


def test_a_thousand_patches_leave_nothing_behind() -> None:
    model = build("timm_vit")
    clean, keys = outputs(model), {name: set(vars(module)) for name, module in model.named_modules()}

    def rounds(count: int) -> int:
        for _ in range(count):
            unpatch(patch(model, NEURONS, num_registers=2))
        gc.collect()
        return len(gc.get_objects())

    rounds(10)
    with disabled(patch(model, NEURONS)), testreg.registers(model):
        outputs(model)
    unpatch(model)
    before = rounds(10)
    assert rounds(1000) - before < 100  # a tenth of an object a round
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert outputs(model).equal(clean)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_registers": 0}, ValueError, "num_registers must be at least 1, got 0"),
        ({"num_registers": 10**9}, ValueError, r"num_registers must be at most 256, got 1000000000"),
        ({"max_over": "image"}, ValueError, "max_over must be 'neuron' or 'layer', got 'image'"),
        ({"zero": "cls"}, ValueError, "zero must be 'patches', 'all' or 'firing', got 'cls'"),
        ({"neurons": {4: [0]}}, ValueError, r"block 4 \(unit 0\) is out of range: the model has 4 blocks"),
        ({"neurons": {1: [192]}}, ValueError, "unit 192 of block 1 is out of range: .* 192 neurons"),
        ({"neurons": {-1: [0]}}, ValueError, "0-based"),
        ({"neurons": {1: [3, 3]}}, ValueError, "duplicate register neuron: block 1, unit 3"),
        ({"neurons": {}}, ValueError, "the list of register neurons is empty"),
        ({"neurons": "no-such-list"}, ValueError, "no bundled list 'no-such-list'"),
        ({"neurons": "no/such/file.json"}, FileNotFoundError, "no neuron JSON at no/such/file.json"),
        ({"neurons": 7}, TypeError, "neurons must be .* got int"),
        ({"neurons": None}, ValueError, "(?s)does not say which checkpoint.*[Cc]alibrate"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": 99}, ValueError, "top_k=99, but the list holds 8 neurons"),
        ({"top_k": 2}, ValueError, "no scores, so it cannot be truncated"),
    ],
)
def test_bad_arguments_leave_the_model_alone(
    arguments: dict[str, Any], error: type[Exception], message: str, unharmed: Callable[[nn.Module], nn.Module]
) -> None:
    model = unharmed(build("torchvision_vit"))
    with pytest.raises(error, match=message):
        patch(model, **{"neurons": NEURONS, **arguments})
    assert not is_patched(model)


def test_patching_twice_is_refused_and_says_how_to_patch_anew(unharmed: Callable[[nn.Module], nn.Module]) -> None:
    model = unharmed(patch(build("timm_vit"), NEURONS))
    for again in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"already patched: call testreg.unpatch\(model\) first"):
            patch(again, NEURONS)
    other = outputs(patch(build("timm_vit"), {2: [5]}))
    assert outputs(patch(unpatch(copy.deepcopy(model)), {2: [5]})).equal(other)


def test_unpatched_models_cannot_be_unpatched(unharmed: Callable[[nn.Module], nn.Module]) -> None:
    model = unharmed(build("timm_vit"))
    for action in (unpatch, patch_of, lambda m: disabled(m).__enter__()):
        with pytest.raises(RuntimeError, match="the model is not patched"):
            action(model)


@pytest.mark.parametrize("fails", [False, True])
def test_patched_gives_the_model_back_as_it_was(fails: bool, unharmed: Callable[[nn.Module], nn.Module]) -> None:
    model, options = build("timm_vit"), {"num_registers": 2, "zero": "all"}
    expected = outputs(patch(copy.deepcopy(model), NEURONS, **options))
    unharmed(model)
    with contextlib.ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(KeyError, match="in the block"))
        with testreg.patched(model, NEURONS, **options) as within:
            assert within is model
            assert outputs(model).equal(expected)
            if fails:
                raise KeyError("in the block")
    assert not is_patched(model)


def test_patched_with_bad_arguments_leaves_the_model_alone(unharmed: Callable[[nn.Module], nn.Module]) -> None:
    model = unharmed(build("timm_vit"))
    with pytest.raises(ValueError, match="num_registers must be at least 1"), testreg.patched(model, num_registers=0):
        pytest.fail("the block ran")
    assert not is_patched(model)


def test_unpatch_refuses_when_a_forward_was_wrapped_since(unharmed: Callable[[nn.Module], nn.Module]) -> None:
    model = build("timm_vit")
    patched = outputs(patch(model, NEURONS))
    block = model.blocks[1]
    ours = block.forward
    block.forward = functools.wraps(type(block).forward)(lambda *args, **kwargs: ours(*args, **kwargs))
    assert outputs(unharmed(model)).equal(patched)
    with pytest.raises(RuntimeError, match="replaced again by someone else"):
        unpatch(model)


def test_unpatch_gives_back_an_instance_forward_that_was_there_before() -> None:
    model, calls = build("timm_vit"), []
    block = model.blocks[1]
    original = block.forward

    def spy(x: Tensor, **kwargs: Any) -> Tensor:
        calls.append(x.shape)
        return original(x, **kwargs)

    block.forward = spy  # as accelerate's hooks do
    outputs(patch(model, NEURONS))
    assert calls == [(2, 18, 48)]
    unpatch(model)
    assert block.__dict__["forward"] is spy


def test_a_hidden_state_of_another_shape_between_blocks_is_refused() -> None:
    model = patch(build("timm_vit"), NEURONS)
    expected = outputs(model)
    with model.blocks[1].register_forward_hook(lambda module, args, output: output * 1):
        torch.testing.assert_close(outputs(model), expected)
    model.blocks[1].register_forward_hook(lambda module, args, output: output[:, 1:])
    with pytest.raises(RuntimeError, match=r"did not arrive at block 2: .*\(2, 17, 48\), and \(2, 16, 48\)"):
        outputs(model)
    with disabled(model):
        outputs(model)


def test_a_list_of_token_tensors_is_refused() -> None:
    model = patch(build("dinov2"), NEURONS)
    with pytest.raises(NotImplementedError, match="list of tokens"):
        model.forward_features([images(1), images(2)])


# Neurons of other weights --------------------------------------------------------------------------------------------


def test_neurons_of_other_weights_warn() -> None:
    model = build("timm_vit")
    own = testreg.families.fingerprint(testreg.families.find_tower(model))
    ranking = NEURONS.ranking
    patch(model, RegisterNeurons(ranking, model={"fingerprint": own}))
    with pytest.warns(UserWarning, match="were found in some-vit, whose weights are not those of"):
        patch(unpatch(model), RegisterNeurons(ranking, model={"fingerprint": "0" * 16, "name": "some-vit"}))
    assert is_patched(model)


@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_a_verified_list_on_the_meta_device() -> None:
    effect = Effect(neurons=2, remaining=0.0, worst_block=3, excess=0.0, change_pooled=0.0, change_patches=0.0)
    verified = Calibration(verified_at=(Verification((64, 64), "float32", (4, 4), 20, 0.1, effect),))
    model = patch(build("timm_vit").to("meta"), RegisterNeurons(NEURONS.ranking, calibration=verified))
    assert model(images().to("meta")).shape == (2, 10)


def test_patch_of_tells_neurons_and_options() -> None:
    options = {"num_registers": 2, "split_neurons": True, "max_over": "layer", "zero": "all", "start": "mean"}
    state = patch_of(nn.Sequential(patch(build("timm_vit"), NEURONS, **options)))
    assert state.options == options
    assert [neuron[:2] for neuron in state.neurons.ranking] == list(RANKING)


def test_the_list_says_how_many_registers() -> None:
    inputs = images()
    recommended = dataclasses.replace(NEURONS, num_registers=3)
    ours = patch(build("timm_vit"), recommended)
    assert patch_of(ours).options == {
        "num_registers": 3,
        "split_neurons": False,
        "max_over": "neuron",
        "zero": "patches",
        "start": "zeros",
    }
    assert ours(inputs).equal(patch(build("timm_vit"), NEURONS, num_registers=3)(inputs))
    assert patch_of(patch(build("timm_vit"), recommended, num_registers=1)).num_registers == 1


def test_neurons_at_rest_keep_their_value_if_registers_start_as_the_mean_patch() -> None:
    listed = dataclasses.replace(NEURONS, start="mean")
    assert patch_of(patch(build("timm_vit"), listed)).zero == "firing"
    assert patch_of(patch(build("timm_vit"), listed, start="zeros")).zero == "patches"
    assert patch_of(patch(build("timm_vit"), listed, zero="patches")).zero == "patches"


@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_registers_start_as_zeros_or_as_the_mean_patch(family: str) -> None:
    model, entered = build(family), []
    tower = testreg.families.find_tower(model)
    batch_first = lambda tokens: tokens.transpose(0, 1) if tower.sequence_first else tokens
    record = lambda module, args: entered.append(batch_first(args[0]).clone())
    with tower.blocks[0].module.register_forward_pre_hook(record):
        run(model, images())
    norm = next(module for module in tower.blocks[0].module.children() if isinstance(module, nn.LayerNorm))
    for start in ("zeros", "mean"):
        recommended = dataclasses.replace(NEURONS, num_registers=2, start=start)
        with testreg.patched(model, recommended), norm.register_forward_pre_hook(record):
            run(model, images())
        zeros = torch.zeros(1, 1, 48) if tower.entry_norm is None else tower.entry_norm(torch.zeros(1, 1, 48))
        expected = zeros if start == "zeros" else mean_patch(entered[0][:, tower.num_prefix :])
        torch.testing.assert_close(entered[-1][:, -2:], expected.expand(2, 2, 48))
        torch.testing.assert_close(entered[-1][:, :-2], entered[0])
    with testreg.patched(model, recommended, start="zeros"):
        assert patch_of(model).start == "zeros"
    with pytest.raises(ValueError, match="start must be 'zeros' or 'mean', got 'ones'"):
        patch(model, NEURONS, start="ones")


def test_copies_of_a_register_weigh_as_its_logarithm_on_the_logit() -> None:
    """R registers that hold the same are one whose attention logit has log R added to it."""
    model, inputs = build64("timm_vit"), images(dtype=torch.float64)
    with testreg.patched(model, NEURONS, num_registers=3):
        expected = block_outputs("timm_vit", model, inputs)
    mask = torch.zeros(1, 1, 1, 18, dtype=torch.float64)
    mask[..., -1] = math.log(3)
    attend = F.scaled_dot_product_attention
    weighted = lambda q, k, v, *args, **kwargs: attend(q, k, v, attn_mask=mask)
    with testreg.patched(model, NEURONS), pytest.MonkeyPatch.context() as context:
        context.setattr(F, "scaled_dot_product_attention", weighted)
        one = block_outputs("timm_vit", model, inputs)
    for ours, by_hand in zip(one, expected, strict=True):
        torch.testing.assert_close(ours, by_hand)
