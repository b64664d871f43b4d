"""Images padded to one length or packed in one sequence, relative bias, several MLPs, and a family of your own."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from coverage import timm_models, transformers_models
from coverage.registry import image, images, randomise
from coverage.transformers_inputs import GRIDS
from coverage.transformers_table import VLM
from marks import slow_except
from reference import shift_by_hand
from tiny import DUPLICATES
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

import testreg
from testreg.families import FAMILIES, MASKS, Family, find_tower
from testreg.families.extend import padded
from testreg.families.layout import Layout
from testreg.measure.outliers import token_norms
from testreg.register import shift

NEURONS = {0: [3, 17, 21, 28, 9, 30], 1: [5, 14, 20, 2, 31, 11], 2: [1, 8]}  # many, so that padding is loudest for some
OPTIONS = [{}, {"num_registers": 2}, {"num_registers": 2, "split_neurons": True, "max_over": "layer", "zero": "all"}]
MIN = torch.finfo(torch.float32).min
patched = pytest.mark.parametrize("options", OPTIONS, ids=["default", "two registers", "joint maximum, all zeroed"])

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # transformers, about itself
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


# The shift -----------------------------------------------------------------------------------------------------------

BODY = [[1, 7, -2], [3, 7, 4], [-5, 7, 1], [9, 7, -8]]  # patch, CLS, patch, and one that only image 0 has as padding
BEFORE = {1: [[2, 7, -3]], 2: [[2, 7, -3], [-1, 7, 3]]}
AFTER = {  # the registers of both images
    ("neuron", 1): [[[-5, 7, 4]], [[9, 7, -8]]],
    ("layer", 1): [[[-5, 7, -5]], [[9, 7, 9]]],
    ("neuron", 2): [[[-5, 7, 0], [0, 7, 4]], [[9, 7, 0], [0, 7, -8]]],
    ("layer", 2): [[[-5, 7, 0], [0, 7, -5]], [[9, 7, 0], [0, 7, 9]]],
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("zero", ["patches", "all"])
@pytest.mark.parametrize(("max_over", "count"), AFTER)
def test_shift_of_padded_images_with_cls_in_their_midst(max_over: Any, count: int, zero: Any, grad: bool) -> None:
    hidden = torch.tensor([BODY + BEFORE[count]] * 2).float()
    valid = torch.ones(2, 4 + count, dtype=torch.bool)
    valid[0, 3] = False
    patches = torch.tensor([[True, False, True, True] + [False] * count])
    body = [[0, 7, 0], [3, 7, 4] if zero == "patches" else [0, 7, 0], [0, 7, 0], [0, 7, 0]]
    expected = torch.tensor([body + registers for registers in AFTER[max_over, count]]).float()
    run = partial(shift, units=[0, 2], owners=[0, count - 1], num_registers=count, max_over=max_over, zero=zero)
    with torch.set_grad_enabled(grad):
        once = run(hidden.clone(), valid=valid, patches=patches)
        assert torch.equal(once, expected)
        assert torch.equal(run(once.clone(), valid=valid, patches=patches), expected)  # a register keeps what it holds


# The layout, token by token ------------------------------------------------------------------------------------------

TWO = Layout(2)
PACKED = Layout(2, lengths=[3, 1, 2])
ROWS = ([0, 1, 2, 100, 101], [10, 11, 12, 110, 111])  # of images 0 and 1; registers from 100
LINE = [0, 1, 2, 100, 101, 10, 110, 111, 20, 21, 120, 121]


def channels(numbers: Any) -> Tensor:
    """Two channels for each token."""
    numbered = torch.tensor(numbers).float()
    return torch.stack([numbered, -numbered], -1)


ARRANGEMENTS = {
    "batch": (TWO, channels(ROWS)),
    "sequence first": (Layout(2, sequence_first=True), channels(ROWS).transpose(0, 1).contiguous()),
    "packed": (PACKED, channels(LINE)),
    "packed, in a batch of one": (PACKED, channels([LINE])),
}


@pytest.mark.parametrize(("layout", "sequence"), ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_tokens_and_registers_of_every_arrangement(layout: Layout, sequence: Tensor) -> None:
    is_register = sequence[..., 0].abs() >= 100
    flat = [row for row in (LINE,) if layout.lengths] or ROWS
    numbers = [[n for n in row if n < 100] for row in flat]
    tokens = channels(numbers if sequence.ndim == 3 else numbers[0])
    tokens = tokens.transpose(0, 1) if layout.sequence_first else tokens
    registers = channels([[100, 101], [110, 111], [120, 121]][: 3 if layout.lengths else 2])

    assert torch.equal(layout.tokens(sequence), tokens)
    assert torch.equal(layout.registers(sequence), registers)
    assert torch.equal(layout.join(tokens, registers), sequence)  # the inverse of the two
    token = torch.tensor([5.0, -5.0])  # as CLIP's registers enter: one token for all images
    for value in (7.0, token):
        extended = torch.where(is_register.unsqueeze(-1), torch.as_tensor(value), sequence)
        assert torch.equal(layout.extend(tokens, layout.dim, value), extended)


@pytest.mark.parametrize(("layout", "sequence"), ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_the_mean_patch_of_every_arrangement(layout: Layout, sequence: Tensor) -> None:
    rows = [LINE[:3], LINE[5:6], LINE[8:-2]] if layout.lengths else [row[:-2] for row in ROWS]
    assert layout.num_images(layout.tokens(sequence)) == len(rows)
    without_prefix = [row[1:] or [math.nan] for row in rows]
    for num_prefix, counted in ((0, rows), (1, without_prefix)):
        expected = torch.cat([channels([[sum(row) / len(row)]]) for row in counted])
        torch.testing.assert_close(layout.patch_means(layout.tokens(sequence), num_prefix), expected, equal_nan=True)


def test_the_mean_patch_is_of_patches_and_not_of_padding() -> None:
    tokens = channels([[9, 1, 2, 3], [9, 4, 5, 6]])
    valid = torch.tensor([[True, True, True, False, True], [True, True, False, False, True]])
    assert torch.equal(Layout(1, valid=valid).patch_means(tokens, 1), channels([[1.5], [4]]))
    patches = torch.tensor([[True, True, False, True, False]])  # the third is CLS
    assert torch.equal(Layout(1, patches=patches).patch_means(tokens, 0), channels([[13 / 3], [19 / 3]]))
    both = Layout(1, valid=valid, patches=patches)
    assert torch.equal(both.patch_means(tokens, 0), channels([[5], [6.5]]))


@pytest.mark.parametrize(("layout", "sequence"), ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_images_of_every_arrangement_are_views(layout: Layout, sequence: Tensor) -> None:
    sequence = sequence.clone()
    found = layout.images(sequence)
    rows = [LINE[:5], LINE[5:8], LINE[8:]]
    expected = [channels([row]) for row in rows] if layout.lengths else [channels(ROWS)]
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(layout.of_images([2 * each for each in found], sequence), 2 * sequence)
    for each in found:
        each += 1000  # without gradients the shift edits in place
    assert bool((sequence > 700).all())


def test_packed_lengths_of_the_wrong_number_are_no_images() -> None:
    with pytest.raises(ValueError, match="zip"):  # rather than lose an image
        PACKED.join(torch.zeros(6, 2), torch.zeros(2, 2, 2))


# Masks: image 0 has its last token as padding, and its first token sees only itself ---------------------------------

SHOWN = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 0]], [[1, 1, 1]] * 3]).bool().unsqueeze(1)  # (B, 1, T, T)
EXTENDED = (
    torch.tensor(
        [
            [[1, 0, 0, 1, 1], [1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 0, 1, 1]],
            [[1, 1, 1, 1, 1]] * 5,
        ]
    )
    .bool()
    .unsqueeze(1)
)
VALID = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
KEYS, EXTENDED_KEYS = SHOWN.any(-2, keepdim=True), VALID[:, None, None]
SHAPES = {
    "(B, 1, T, T)": (SHOWN, EXTENDED, VALID),
    "(B, 1, 1, T)": (KEYS, EXTENDED_KEYS, VALID),
    "(T, T)": (SHOWN[0, 0], EXTENDED[0, 0], VALID[:1]),
    "(B, heads, T, T)": (  # a token that one head sees is no padding
        torch.cat([SHOWN, SHOWN.flip(-1)], 1),
        torch.cat([EXTENDED, torch.cat([EXTENDED[..., [2, 1, 0, 3, 4]]], 1)], 1),
        torch.ones(2, 5, dtype=torch.bool),
    ),
}


@pytest.mark.parametrize("hidden", [None, MIN, -torch.inf, -1e9, -1e4])  # libraries and users write all of these
@pytest.mark.parametrize(("mask", "extended", "valid"), SHAPES.values(), ids=SHAPES)
def test_masks_by_hand(mask: Tensor, extended: Tensor, valid: Tensor, hidden: float | None) -> None:
    if hidden is not None:  # added to the logits, with a bias of 0.5 on what is shown
        floating = torch.where(mask, 0.5, hidden)
        result = TWO.extend_mask(floating)
        assert torch.equal(result[..., : mask.shape[-2], :3], floating)
        more = result.clone()
        more[..., : mask.shape[-2], :3] -= 0.5
        assert bool((more[extended] == 0).all())  # no bias for registers
        assert bool((more[~extended] <= -1e4).all())
        assert torch.equal(TWO.validity(floating), valid)
    else:
        assert torch.equal(TWO.extend_mask(mask), extended)
        assert torch.equal(TWO.validity(mask), valid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_of_low_precision_hide(dtype: torch.dtype) -> None:
    """bfloat16 rounds -1e4 to -9984."""
    for hidden in (torch.finfo(dtype).min, -1e4):
        assert torch.equal(TWO.validity(torch.where(SHOWN, 0.0, hidden).to(dtype)), VALID)


@pytest.mark.parametrize("shape", [(3, 3), (1, 1, 3, 3)])
@pytest.mark.parametrize("floating", [False, True])
def test_the_mask_that_keeps_packed_images_apart(shape: tuple[int, ...], floating: bool) -> None:
    apart = lambda *lengths: torch.block_diag(*(torch.ones(length, length) for length in lengths)).bool()
    mask, extended = apart(2, 1), apart(4, 3)
    if floating:
        mask, extended = (torch.where(each, 0.0, MIN) for each in (mask, extended))
    result = Layout(2, lengths=[2, 1]).extend_mask(mask.view(shape))
    assert torch.equal(result.view(7, 7), extended)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SHOWN.long(), r"an attention mask of torch.int64: pass it as booleans, or added to the logits"),
        (SHOWN.byte(), r"an attention mask of torch.uint8"),
        (SHOWN[:, 0], r"an attention mask of shape \(2, \d+, \d+\): pass \(T, T\) or \(B, heads, T, T\)"),
    ],
)
def test_other_masks_are_refused(mask: Tensor, message: str) -> None:
    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS)
    grown = F.pad(mask, (0, 14, 0, 14), value=1)
    with pytest.raises(NotImplementedError, match=message):
        model.forward_features(images((0, 1), tiny.IMAGE), attn_mask=grown)
    with pytest.raises(NotImplementedError, match=message):
        TWO.validity(mask)


@pytest.mark.parametrize("batch", slow_except([2, None], 2), ids=["of each image", "of all images"])
@pytest.mark.parametrize("size", slow_except([128, 2], 2), ids=["one block", "several blocks"])
def test_block_masks_are_extended_as_dense_ones(batch: int | None, size: int) -> None:
    shown = SHOWN if batch else SHOWN[:1]
    rows = shown[:, 0]
    rule = lambda image, head, query, key: rows[image % len(rows), query, key]
    mask = create_block_mask(rule, batch, None, 3, 3, device="cpu", BLOCK_SIZE=size)
    extended, dense = TWO.extend_mask(mask), TWO.extend_mask(shown)
    assert torch.equal(create_mask(extended.mask_mod, len(shown), 1, 5, 5, device="cpu"), dense)
    assert torch.equal(TWO.validity(mask), TWO.validity(shown))
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, 16)
    flexible = flex_attention(query, key, value, block_mask=extended)  # which sees the blocks too
    torch.testing.assert_close(flexible, F.scaled_dot_product_attention(query, key, value, dense))


def test_block_masks_of_packed_images_are_refused() -> None:
    mask = create_block_mask(lambda b, h, q, k: q >= 0, 1, None, 6, 6, device="cpu")
    with pytest.raises(NotImplementedError, match="flex attention over packed images: use the sdpa or eager"):
        PACKED.extend_mask(mask)


@pytest.mark.parametrize(
    ("layout", "appended", "size", "kept"),
    [
        (TWO, 0, 5, [0, 1, 2]),
        (TWO, 1, 6, [0, 1, 2, 5]),
        (PACKED, 0, 12, [0, 1, 2, 5, 8, 9]),
    ],
    ids=["batch", "appended", "packed"],
)
def test_attention_weights_lose_rows_and_columns_of_registers(
    layout: Layout, appended: int, size: int, kept: Sequence[int]
) -> None:
    weights = torch.arange(2.0 * size * size).view(2, 1, size, size)
    expected = torch.stack([torch.stack([weights[..., row, column] for column in kept], -1) for row in kept], -2)
    assert torch.equal(layout.weights_without_registers(weights, appended), expected)


# Whole towers: a batch, and each image alone -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A tower that takes images 0 and 1, of different sizes, padded or packed."""

    build: Callable[[], Any]
    tokens: Callable[[Any, Sequence[int]], Sequence[Tensor]]
    """The tower's output tokens (T, C) of each image, without padding."""


def _vlm(name: str, valid: Callable[[tuple[Any, ...]], Tensor] | None = None) -> Case:
    """A tower of scripts/coverage; `valid` finds in its arguments which tokens (B, T) are no padding."""
    row = next(row for row in VLM for _, each in row.each() if each == name)
    known = {each.name: each for each in transformers_models.architectures()}

    def build() -> nn.Module:
        return transformers_models.tower_of(known[name].build())

    def tokens(model: Any, numbers: Sequence[int]) -> Sequence[Tensor]:
        double = lambda each: each.double() if each.is_floating_point() else each
        arguments = row.inputs(numbers).tower
        output = model(*map(double, arguments))
        output = getattr(output, "last_hidden_state", output)  # transformers 4 may give the merged tokens only
        if valid is not None:
            return [each[shown] for each, shown in zip(output, valid(arguments).flatten(1).bool(), strict=True)]
        lengths = [math.prod(GRIDS[number]) for number in numbers]
        output = output.flatten(0, -2)
        merged = sum(lengths) // len(output)
        return output.split([length // merged for length in lengths])

    return Case(build, tokens)


def _naflex() -> Case:
    known = {each.name: each for each in timm_models.architectures()}

    def tokens(model: Any, numbers: Sequence[int]) -> Sequence[Tensor]:
        padded = timm_models.naflex_batch(model, numbers)
        padded["patches"] = padded["patches"].double()
        prefix = model.num_prefix_tokens
        output = model.forward_features(**padded)["patches"]
        return [each[: prefix + int(valid.sum())] for each, valid in zip(output, padded["patch_valid"], strict=True)]

    return Case(known["naflexvit_base_patch16_gap"].build, tokens)


HIDDEN = {0: 0, 1: 6}  # patches behind the others that the mask hides


def _mask(numbers: Sequence[int]) -> Tensor:
    """(B, 1, 1, T) for the tiny ViT of 17 tokens."""
    mask = torch.ones(len(numbers), 1, 1, 17, dtype=torch.bool)
    for row, number in enumerate(numbers):
        mask[row, ..., 17 - HIDDEN[number] :] = False
    return mask


def _embedded(model: Any, numbers: Sequence[int], loud: float = 9.0) -> Tensor:
    tokens = model._pos_embed(model.patch_embed(images(numbers, tiny.IMAGE).double()))
    hide = ~_mask(numbers).view(len(numbers), -1, 1)
    return torch.where(hide, loud * tokens.flip(-1), tokens)  # padding that would give most values, were it let


def _masked_timm() -> Case:
    def tokens(model: Any, numbers: Sequence[int]) -> Sequence[Tensor]:
        x = _embedded(model, numbers)
        if len(numbers) == 1:  # alone an image has no padding at all
            x = x[:, : 17 - HIDDEN[numbers[0]]]
        for block in model.blocks:
            x = block(x) if len(numbers) == 1 else block(x, attn_mask=_mask(numbers))
        return [each[: 17 - HIDDEN[number]] for each, number in zip(model.norm(x), numbers, strict=True)]

    return Case(lambda: tiny.build("timm_vit"), tokens)


CASES = {
    "timm ViT, masked": _masked_timm(),
    "NaFlexVit, padded": _naflex(),
    "SigLIP 2, padded": _vlm("Lfm2VlForConditionalGeneration", lambda arguments: arguments[1]),
    "Idefics 3, padded": _vlm("Idefics3ForConditionalGeneration", lambda arguments: arguments[1]),
    "Qwen2-VL, packed": _vlm("Qwen2VLForConditionalGeneration"),
    "PaddleOCR-VL, packed": _vlm("PaddleOCRVLForConditionalGeneration"),
    "Pixtral, packed": _vlm("PixtralVisionModel"),
}


def build(name: str, **options: Any) -> Any:
    """The patched tower in float64, in training mode."""
    torch.manual_seed(0)
    return testreg.patch(randomise(CASES[name].build()).double(), NEURONS, **options).train()


def loss(name: str, model: Any, numbers: Sequence[int]) -> Tensor:
    """A sum over images of a linear function of their tokens, another one for each token."""
    total = torch.zeros((), dtype=torch.float64)
    for tokens in CASES[name].tokens(model, numbers):
        total = total + (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum()
    return total


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}


def assert_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-4) -> None:
    assert ours.keys() == expected.keys()
    assert len(ours) > 20
    # A key's bias has none in exact arithmetic: what it has is noise, against the largest of all.
    scale = max(float(each.abs().max()) for each in expected.values())
    for key, each in expected.items():
        torch.testing.assert_close(ours[key], each, rtol=rtol, atol=1e-6 * scale, msg=lambda text, key=key: key + text)


@patched
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_batch_are_those_of_its_images(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    together = gradients(model, loss(name, model, (0, 1)))
    first, second = (gradients(model, loss(name, model, (number,))) for number in (0, 1))
    with testreg.disabled(model):
        unpatched = gradients(model, loss(name, model, (0, 1)))
    assert_same(together, {key: first[key] + second[key] for key in together})
    assert any((together[key] - unpatched[key]).abs().max() > 1e-3 * unpatched[key].abs().max() for key in together)


@patched
@pytest.mark.parametrize("grad", [False, True])
def test_padding_does_not_matter(options: dict[str, Any], grad: bool) -> None:
    """Whatever is in the hidden patches, the others stay the same bit by bit, and no gradient comes from there."""
    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS, **options)
    shown, mask = images((0, 1), tiny.IMAGE), _mask((0, 1))
    loud = shown.clone()
    loud[1, :, 48:] *= 50  # the last row of patches
    loud[1, :, 32:48, 32:] *= -50
    visible = mask.view(2, 17)
    with torch.set_grad_enabled(grad):
        loud.requires_grad_(grad)
        before = model.forward_features(shown, attn_mask=mask)[visible]
        after = model.forward_features(loud, attn_mask=mask)[visible]
        everywhere = model.forward_features(loud)[visible]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not torch.allclose(everywhere, before, atol=0.1)  # it would matter
    if grad:
        after.square().sum().backward()
        assert loud.grad is not None
        changed = (loud.detach() != shown).expand_as(loud)
        assert loud.grad[changed].abs().max() == 0 < loud.grad[~changed].abs().max()


# Gradient checkpointing ----------------------------------------------------------------------------------------------

CHECKPOINTED = ["SigLIP 2, padded", "Idefics 3, padded", "Qwen2-VL, packed", "PaddleOCR-VL, packed", "Pixtral, packed"]


def checkpointing(model: Any) -> list[nn.Module]:
    """Turns it on; the list has a norm of the second block, once for each time that it is run."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs: list[nn.Module] = []
    block = find_tower(model).blocks[1].module
    inner = next(each for name, each in block.named_modules() if "norm" in name)
    inner.register_forward_hook(lambda module, args, output: runs.append(module))
    return runs


@patched
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_of_padded_and_packed_images_changes_nothing(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    expected = gradients(model, loss(name, model, (0, 1)))
    runs = checkpointing(model)
    recomputed = gradients(model, loss(name, model, (0, 1)))
    assert len(runs) == 2  # forward, and again in backward, where no block hands on registers
    assert_same(recomputed, expected)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_plain_model_is_right_behind_a_recomputation(name: str) -> None:
    """Recomputation leaves the layout that it ran with in the thread."""
    plain, clip = (testreg.patch(tiny.build(each), tiny.NEURONS).train() for each in ("timm_vit", "hf_clip"))
    batch = images((0, 1), tiny.IMAGE)
    run = lambda model: getattr(output := model(batch), "last_hidden_state", output)
    expected = [run(model).detach() for model in (plain, clip)]
    clip_gradients = gradients(clip, run(clip).square().sum())
    other = build(name)
    checkpointing(other)
    other_gradients = gradients(other, loss(name, other, (0, 1)))
    for model, value in zip((plain, clip), expected, strict=True):
        assert torch.equal(run(model), value)
        gradients(other, loss(name, other, (0, 1)))

    # One backward pass recomputes the blocks of both, those of the plain model last.
    runs = checkpointing(clip)
    clip.zero_grad()
    value = run(clip).square().sum()
    both = gradients(other, loss(name, other, (0, 1)) + value)
    assert len(runs) == 2
    assert_same(both, other_gradients)
    assert_same({key: each.grad for key, each in clip.named_parameters() if key in clip_gradients}, clip_gradients)


@pytest.mark.skipif(tiny.TRANSFORMERS_4, reason="its Idefics 3 gives flex attention a dense mask")
def test_recomputation_with_flex_attention_leaves_padding_out() -> None:
    """A BlockMask brings the layout as a tensor does. Attention itself is dense here: flex has no backward on CPUs."""
    name = "Idefics 3, padded"
    model = build(name)
    expected = gradients(model, loss(name, model, (0, 1)))
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

    def dense(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
        shown = create_mask(attention_mask.mask_mod, *attention_mask.shape, device="cpu")
        return F.scaled_dot_product_attention(query, key, value, shown).transpose(1, 2), None

    # transformers compiles the making of masks, which takes two minutes.
    with pytest.MonkeyPatch.context() as monkeypatch, torch.compiler.set_stance("force_eager"):
        monkeypatch.setitem(interface._global_mapping, "flex_attention", dense)
        model.set_attn_implementation("flex_attention")
        flexible = gradients(model, loss(name, model, (0, 1)))
        checkpointing(model)
        recomputed = gradients(model, loss(name, model, (0, 1)))
    assert_same(flexible, expected)
    assert_same(recomputed, expected)


# Threads, compilation, copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_except(["timm ViT, masked", "Qwen2-VL, packed"], "timm ViT, masked"))
@pytest.mark.parametrize("grad", [False, True])
def test_threads_with_different_masks_do_not_meet(name: str, grad: bool) -> None:
    model = build(name).eval()
    orders = [(0, 1), (1, 0), (1, 1)]

    def run(order: Sequence[int]) -> Tensor:
        with torch.set_grad_enabled(grad):
            return torch.cat(list(CASES[name].tokens(model, order))).detach()

    expected = [run(order) for order in orders]
    wrong: list[Any] = []
    start = threading.Barrier(len(orders))

    def work(index: int) -> None:
        start.wait()
        for _ in range(20):
            try:
                if not torch.equal(run(orders[index]), expected[index]):
                    wrong.append(index)
            except Exception as error:  # a thread would swallow it
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_a_masked_model_compiles_to_one_graph(grad: bool) -> None:
    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS, num_registers=2)
    torch.compiler.reset()
    compiled = torch.compile(model.forward_features, backend="eager", fullgraph=True)
    batch = images((0, 1), tiny.IMAGE)
    with torch.set_grad_enabled(grad):
        for mask in (_mask((0, 1)), _mask((1, 0)), None):
            torch.testing.assert_close(compiled(batch, attn_mask=mask), model.forward_features(batch, attn_mask=mask))


@pytest.mark.slow
def test_a_model_compiles_in_a_second_thread_after_a_masked_one() -> None:
    def compiled_features(mask: Tensor | None) -> Tensor:
        torch.compiler.reset()
        return torch.compile(model.forward_features, backend="eager", fullgraph=True)(batch, attn_mask=mask)

    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS)
    batch = images((0, 1), tiny.IMAGE)
    compiled_features(_mask((0, 1)))
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(compiled_features, None).result()
    torch.testing.assert_close(found, model.forward_features(batch))


@pytest.mark.parametrize("duplicate", slow_except(DUPLICATES, copy.deepcopy))
@pytest.mark.parametrize("name", CASES)
def test_copies_of_padded_and_packed_models_work(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = build(name, num_registers=2)
    value = loss(name, model, (0, 1))
    twin = duplicate(model)
    assert torch.equal(loss(name, twin, (0, 1)), value)
    testreg.unpatch(model)
    assert testreg.is_patched(twin)
    assert torch.equal(loss(name, twin, (0, 1)), value)
    testreg.unpatch(twin)
    assert torch.equal(loss(name, twin, (0, 1)), loss(name, model, (0, 1)))
    assert not torch.equal(loss(name, model, (0, 1)), value)


# Blocks with several MLPs, or one linear for attention and MLP --------------------------------------------------------

KNOWN = {each.name: each for each in (*timm_models.architectures(), *transformers_models.architectures())}


class ByHand:
    """The forward of an unpatched model with explicit registers: tokens behind all others, moved by `shift_by_hand`.

    `moves` says which input channels of which modules are moved, and with `split_neurons`, to which register.
    """

    def __init__(self, blocks: Sequence[nn.Module], moves: Mapping[nn.Module, Mapping[int, int]], **options: Any):
        self.blocks, self.registers = blocks, list[Tensor]()
        self.options = {"num_registers": 1, "max_over": "neuron", "zero": "patches"} | options
        split_neurons = self.options.pop("split_neurons", False)
        for module, units in moves.items():
            owners = units if split_neurons else dict.fromkeys(units)
            hook = lambda module, args, owners=owners: (shift_by_hand(args[0], owners, **self.options), *args[1:])
            module.register_forward_pre_hook(hook)

    def __call__(self, tokens: Tensor) -> Tensor:
        """From the tokens that enter the first block to those that leave the last; keeps the registers of each."""
        count = self.options["num_registers"]
        sequence = torch.cat([tokens, tokens.new_zeros(len(tokens), count, tokens.shape[-1])], 1)
        self.registers = []
        for block in self.blocks:
            sequence = block(sequence)
            self.registers.append(sequence[:, -count:])
        return sequence[:, :-count]


def entering(model: Any, batch: Tensor) -> Tensor:
    """The tokens that enter a timm model's first block."""
    return model.norm_pre(model._pos_embed(model.patch_embed(batch)))


def timm_model(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return randomise(KNOWN[name].build()).eval(), images((0, 1), *timm_models.image_size(name))


def test_neurons_are_numbered_through_both_mlps() -> None:
    model, batch = timm_model("vit_base_patch16_18x2_224")
    width = model.blocks[0].ffns[0].mlp.fc2.in_features
    assert find_tower(model).mlp_width == 2 * width
    twin = copy.deepcopy(model)
    first, second = ([block.ffns[i].mlp.fc2 for block in twin.blocks] for i in (0, 1))
    # The ranking goes to the registers in turns: 0 to the second MLP's 3, 1 to the first's 7, and again.
    moves = {second[0]: {3: 0}, first[0]: {7: 1}, second[1]: {3: 0, width - 1: 1}}
    by_hand = ByHand(twin.blocks, moves, num_registers=2, split_neurons=True, num_prefix=1)
    testreg.patch(model, {0: [width + 3, 7], 1: [width + 3, 2 * width - 1]}, num_registers=2, split_neurons=True)
    torch.testing.assert_close(model.forward_features(batch), twin.norm(by_hand(entering(twin, batch))))
    assert not torch.allclose(twin.forward_features(batch), twin.norm(by_hand(entering(twin, batch))), atol=1e-3)
    with pytest.raises(ValueError, match=f"unit {2 * width} of block 0 is out of range"):
        testreg.patch(testreg.unpatch(model), {0: [2 * width]})


def test_neurons_of_a_fused_projection_follow_the_channels_of_attention() -> None:
    model, batch = timm_model("vit_dpwee_patch16_reg1_gap_256")
    width = model.embed_dim
    assert find_tower(model).mlp_width == model.blocks[0].out_proj.in_features - width
    twin = copy.deepcopy(model)
    moves = {twin.blocks[0].out_proj: {width + 5: 0}, twin.blocks[1].out_proj: {width: 0}}
    by_hand = ByHand(twin.blocks, moves, num_prefix=1)
    testreg.patch(model, {0: [5], 1: [0]})
    torch.testing.assert_close(model.forward_features(batch), twin.norm(by_hand(entering(twin, batch))))
    assert not torch.allclose(testreg.unpatch(model)(batch), testreg.patch(model, {0: [5], 1: [0]})(batch), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "owner", "method"),
    [
        ("beit_base_patch16_224", "attn", "_get_rel_pos_bias"),
        ("vit_relpos_base_patch16_cls_224", "attn.rel_pos", "get_bias"),
    ],
)
@patched
def test_registers_have_no_relative_position(name: str, owner: str, method: str, options: dict[str, Any]) -> None:
    model, batch = timm_model(name)
    twin, count = copy.deepcopy(model), options.get("num_registers", 1)
    entry: list[Tensor] = []
    handle = twin.blocks[0].register_forward_pre_hook(lambda module, args: entry.append(args[0]))
    plain = twin.forward_features(batch)
    handle.remove()
    for block in twin.blocks:
        module = block.get_submodule(owner)
        original = getattr(module, method)
        padded = lambda *args, original=original: F.pad(original(*args), (0, count, 0, count))
        setattr(module, method, padded)
    moves = {twin.blocks[0].mlp.fc2: {3: 0, 17: count - 1}, twin.blocks[1].mlp.fc2: {5: 0, 14: count - 1}}
    by_hand = ByHand(twin.blocks, moves, num_prefix=1, **options)
    testreg.patch(model, {0: [3, 17], 1: [5, 14]}, **options)
    ours, expected = model.forward_features(batch), twin.norm(by_hand(entry[0]))
    torch.testing.assert_close(ours, expected)
    assert not torch.allclose(plain, ours, atol=1e-3)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    found, right = gradients(model, (ours * weights).sum()), gradients(twin, (expected * weights).sum())
    assert sum("rel_pos" in key or "relative" in key for key in found) >= len(model.blocks)
    assert_same(found, right)


CALIBRATED = {
    "vit_base_patch16_18x2_224": (64, 80),
    "vit_dpwee_patch16_reg1_gap_256": (64, 80),
    "naflexvit_base_patch16_gap": (64, 80),
    "vit_relpos_base_patch16_cls_224": (64, 80),
    "BeitModel [bias in each block]": (32, 32),
    "DPTModel": (32, 32),
    "RadioModel": (32, 32),
    "Siglip2VisionModel": (32, 32),
}


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_ranks_every_kind_of_tower(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(KNOWN[name].build()).eval()
    tower = find_tower(model)
    pictures = images(range(4), *CALIBRATED[name])
    norms = token_norms(tower, pictures)[-1]
    threshold = float(norms.median())  # random models have no outliers: half of the tokens stand for them
    options = {"threshold": threshold, "block": -1, "max_block": -1, "progress": False}
    neurons = testreg.calibrate(model, list(pictures), score="activation", top_k=50, held_out=0, **options)

    # Algorithm 1 in one line: each image's mean |activation| at its outliers, averaged over the images.
    hidden: list[list[Tensor]] = [[] for _ in tower.blocks]
    for index, block in enumerate(tower.blocks):
        for mlp in block.mlps:
            keep = lambda module, args, index=index, first=mlp.first: hidden[index].append(args[0][..., first:].abs())
            mlp.fc2.register_forward_pre_hook(keep)
    with torch.no_grad():
        tower.run(pictures)
    found = [torch.cat(each, -1)[i] for each in hidden for i in range(4)]  # (T, H), block by block
    outlier = norms > threshold
    means = torch.stack([each[outlier[i % 4]].mean(0) for i, each in enumerate(found)]).unflatten(0, (-1, 4)).mean(1)
    assert means.shape == (tower.depth, tower.mlp_width)
    assert neurons.ranking
    for block, unit, value in neurons.ranking:
        assert value == pytest.approx(float(means[block, unit]), rel=1e-3)
    assert all(first[2] >= second[2] for first, second in pairwise(neurons.ranking))

    by_contribution = testreg.calibrate(model, list(pictures), top_k=50, **options)  # ranks on two, measures on two
    assert by_contribution.calibration.verified_at[0].grid == tower.grid(pictures)
    assert 0 < by_contribution.calibration.verified_at[0].effect.change_patches < 1
    places = {(block, unit) for block, unit, _ in by_contribution.ranking}
    assert places <= {(block, unit) for block in range(tower.depth) for unit in range(tower.mlp_width)}
    if name == "vit_base_patch16_18x2_224":
        assert {unit < tower.mlp_width // 2 for _, unit in places} == {True, False}
    testreg.patch(model, by_contribution)  # and the list fits


# What the registers hold ---------------------------------------------------------------------------------------------


def test_registers_are_those_of_the_forward_by_hand() -> None:
    model = tiny.build("timm_vit")
    twin = copy.deepcopy(model)
    moves = {twin.blocks[1].mlp.fc2: {3: 0, 77: 1, 150: 0}, twin.blocks[2].mlp.fc2: {0: 1, 64: 0, 191: 1}}
    by_hand = ByHand(twin.blocks, moves, num_registers=2, split_neurons=True, num_prefix=1)
    testreg.patch(model, tiny.NEURONS, num_registers=2, split_neurons=True)
    batch = images((0, 1), tiny.IMAGE)
    with testreg.registers(model) as held:
        model(images((2, 3, 4), tiny.IMAGE))
        model(batch)
    by_hand(entering(twin, batch))
    assert [tuple(each.shape) for each in held] == [(2, 2, tiny.WIDTH)] * tiny.DEPTH
    for ours, expected in zip(held, by_hand.registers, strict=True):
        torch.testing.assert_close(ours, expected)

    recorded = list(held)
    model(images((5, 6), tiny.IMAGE))
    assert all(map(torch.equal, held, recorded))  # outside, nothing is recorded


def test_registers_of_a_sequence_first_model_are_batch_first() -> None:
    ours, expected = (tiny.build(name) for name in ("open_clip_sequence_first", "open_clip"))
    expected.load_state_dict(ours.state_dict())
    batch = images((0, 1, 2), tiny.IMAGE)
    lists = []
    for model in (ours, expected):
        testreg.patch(model, tiny.NEURONS, num_registers=2)
        with testreg.registers(model) as held:
            model.visual(batch)
        lists.append(held)
    assert [tuple(each.shape) for each in lists[0]] == [(3, 2, tiny.WIDTH)] * tiny.DEPTH
    torch.testing.assert_close(lists[0], lists[1])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_registers_of_padded_and_packed_images_are_those_of_each_alone(name: str, grad: bool) -> None:
    model = build(name, num_registers=2).eval()
    lists = []
    with torch.set_grad_enabled(grad):
        for numbers in ((0, 1), (0,), (1,)):
            with testreg.registers(model) as held:
                CASES[name].tokens(model, numbers)
            lists.append(held)
    depth = find_tower(model).depth
    assert len(lists[0]) == depth
    for both, first, second in zip(*lists, strict=True):
        assert both.shape[:2] == (2, 2)
        torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-4, atol=1e-4)


def test_registers_needs_a_patch_that_is_enabled() -> None:
    model = tiny.build("timm_vit")
    with pytest.raises(RuntimeError, match="the model is not patched"), testreg.registers(model):
        pass
    testreg.patch(model, tiny.NEURONS)
    with testreg.registers(model) as held:
        with testreg.disabled(model):
            model(images((0,), tiny.IMAGE))
        assert held == []
        model(images((0,), tiny.IMAGE))
    assert len(held) == tiny.DEPTH


def test_registers_nest() -> None:
    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS)
    with testreg.registers(model) as outer:
        with testreg.registers(model) as inner:
            model(images((0,), tiny.IMAGE))
        recorded = list(inner)
        assert len(recorded) == tiny.DEPTH
        assert all(map(torch.equal, outer, inner))
        model(images((1,), tiny.IMAGE))
    assert all(map(torch.equal, inner, recorded))
    assert len(outer) == tiny.DEPTH
    assert not torch.equal(outer[-1], inner[-1])


@pytest.mark.slow
def test_registers_of_a_model_that_was_compiled_before() -> None:
    torch.compiler.reset()
    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS)
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def lists() -> list[list[Tensor]]:
        compiled(images((0, 1), tiny.IMAGE))
        with testreg.registers(model) as held:
            for numbers in ((2, 3), (0, 1)):
                compiled(images(numbers, tiny.IMAGE))
        with testreg.registers(model) as expected:
            model(images((0, 1), tiny.IMAGE))
        return [held, expected]

    with ThreadPoolExecutor(1) as thread:  # of its own, in which nothing was recorded before
        held, expected = thread.submit(lists).result()
    assert len(held) == tiny.DEPTH
    torch.testing.assert_close(held, expected)


def test_registers_overlap() -> None:
    model = testreg.patch(tiny.build("timm_vit"), tiny.NEURONS)
    contexts = first, second = testreg.registers(model), testreg.registers(model)
    lists = [context.__enter__() for context in contexts]
    first.__exit__(None, None, None)
    model(images((0,), tiny.IMAGE))
    second.__exit__(None, None, None)
    assert [len(each) for each in lists] == [0, tiny.DEPTH]


# A family of your own ------------------------------------------------------------------------------------------------


class OwnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class OwnViT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 16, stride=16)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.trunk = nn.ModuleList(OwnBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def enter(self, batch: Tensor) -> Tensor:
        patches = self.embed(batch).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(batch), -1, -1), patches], 1)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.enter(batch)
        for block in self.trunk:
            x = block(x)
        return self.norm(x)


OWN = Family(name="mine", towers="OwnViT", blocks="trunk", fc2="mlp.2", patch_embed="embed")
OWN_NEURONS = {0: [3, 70], 1: [5, 127]}


@pytest.fixture
def table() -> Iterator[list[Family]]:
    """The table of families, restored afterwards."""
    before = list(FAMILIES)
    yield FAMILIES
    FAMILIES[:] = before


@pytest.fixture
def own(table: list[Family]) -> OwnViT:
    testreg.add_family(OWN)
    torch.manual_seed(0)
    model = OwnViT()
    for each in model.trunk:
        each.mlp[2].weight.data *= 10
    return model.eval()


@patched
def test_a_family_of_your_own(own: OwnViT, options: dict[str, Any]) -> None:
    batch, twin, keys = images((0, 1), 48), copy.deepcopy(own), list(own.state_dict())
    plain, count = own(batch), options.get("num_registers", 1)
    moves = {twin.trunk[0].mlp[2]: {3: 0, 70: count - 1}, twin.trunk[1].mlp[2]: {5: 0, 127: count - 1}}
    by_hand = ByHand(twin.trunk, moves, num_prefix=1, **options)

    assert testreg.patch(own, OWN_NEURONS, **options) is own
    with testreg.registers(own) as held:
        ours = own(batch)
    expected = twin.norm(by_hand(twin.enter(batch)))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(held, by_hand.registers)
    assert not torch.allclose(plain, ours, atol=0.01)
    assert list(own.state_dict()) == keys
    for duplicate in DUPLICATES:
        assert torch.equal(duplicate(own)(batch), ours)
    assert torch.equal(testreg.unpatch(own)(batch), plain)
    assert find_tower(own).grid(batch) == (3, 3)


def test_a_row_of_the_same_name_is_replaced_and_goes_first(own: OwnViT, table: list[Family]) -> None:
    count = len(table)
    assert table[0] is OWN
    testreg.add_family(other := replace(OWN, prefix=0))
    assert (len(table), table[0], OWN in table) == (count, other, False)
    assert find_tower(own).num_prefix == 0
    known = next(family for family in table if family.name == "timm VisionTransformer")
    testreg.add_family(replace(known, prefix=3))  # a row that testreg has
    assert len(table) == count
    assert find_tower(tiny.fresh("timm_vit")).num_prefix == 3


def test_unpickling_without_the_row_says_what_to_do(own: OwnViT, table: list[Family]) -> None:
    written = pickle.dumps(testreg.patch(own, OWN_NEURONS))
    table.remove(OWN)
    with pytest.raises(KeyError, match=r"no family 'mine': call testreg.add_family with its row before"):
        pickle.loads(written)
    testreg.add_family(OWN)
    assert testreg.is_patched(pickle.loads(written))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library": __name__, "blocks": "layers"}, "OwnViT has no blocks at layers"),
        ({"blocks": ("layers", "stages")}, "OwnViT has no blocks at layers or stages"),
        ({"blocks": "norm"}, "OwnViT has no blocks at norm"),
        ({"fc2": ("mlp.fc2", "mlp.w3")}, r"block 0 \(OwnBlock\) has no second MLP linear at mlp.fc2 or mlp.w3"),
        ({"fc2": "mlp.1"}, r"block 0 \(OwnBlock\) has no second MLP linear at mlp.1"),  # is there, but no linear
        ({"towers": "OtherViT"}, "no supported vision tower in OwnViT.* testreg.add_family"),
    ],
)
def test_rows_that_do_not_fit_say_where(own: OwnViT, changes: dict[str, Any], message: str) -> None:
    testreg.add_family(replace(OWN, **changes))
    before = {name: set(vars(module)) for name, module in own.named_modules()}
    with pytest.raises(ValueError, match=message):
        testreg.patch(own, OWN_NEURONS)
    assert {name: set(vars(module)) for name, module in own.named_modules()} == before


def test_a_row_without_patch_embed_cannot_tell_the_grid(own: OwnViT) -> None:
    testreg.add_family(replace(OWN, patch_embed=()))
    with pytest.raises(ValueError, match="the row of mine says neither patch_embed, a convolution, nor patch_size"):
        find_tower(own).grid(image(0, 48))
    own(images((0,), 48))  # patching needs none
    testreg.patch(own, OWN_NEURONS)


def test_the_flat_mask_of_flash_attention_is_padding() -> None:
    plain = Layout(num_registers=2)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    extended = [[1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]
    for given in (mask, mask.bool()):
        assert MASKS["attention_mask"](given, plain).tolist() == extended
        assert padded(None, plain, {"attention_mask": given}).valid.tolist() == extended
