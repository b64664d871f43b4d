"""The recorder of attention, against a softmax written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from tiny import HF, IMAGE, NEURONS, PATCH, TIMM, build
from torch import Tensor, nn

import testreg
from testreg.families import find_tower
from testreg.measure.attention import AttentionRecorder, attention_to_patches

BATCH, HEADS, LENGTH, DEPTH = 2, 4, 5, 8


def of_the_first(num_tokens: int) -> slice:
    return slice(0, 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images() -> Tensor:
    return random(BATCH, 3, IMAGE, IMAGE, seed=7)


def shown(*hidden: int) -> Tensor:
    """A mask (B, 1, T, T) that hides tokens of the second image from all."""
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[1, :, :, list(hidden)] = False
    return mask


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bias": {"attn_mask": random(1, HEADS, LENGTH, LENGTH, seed=3)},
    "bias that is the same for all queries": {"attn_mask": random(BATCH, 1, 1, LENGTH, seed=3)},
    "mask": {"attn_mask": shown(3, 4)},
    "mask of minus infinity": {"attn_mask": torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~shown(4), -torch.inf)},
    "mask of two dimensions": {"attn_mask": CAUSAL},
    "image of nothing": {"attn_mask": shown(*range(LENGTH))},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("of_all", [True, False])
@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_fused_attention(case: str, keyword: bool, of_all: bool) -> None:
    """Its weights, times values that are an identity, are the output."""
    options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in CASES[case].items()
    }
    heads = 2 if "enable_gqa" in options else HEADS
    query, key = random(BATCH, HEADS, LENGTH, DEPTH), random(BATCH, heads, LENGTH, DEPTH, seed=1)
    value = torch.eye(LENGTH, dtype=torch.float64).expand(BATCH, heads, -1, -1)
    with AttentionRecorder(lambda num_tokens: slice(None) if of_all else slice(0, 1)) as recorder:
        if keyword:
            weights = F.scaled_dot_product_attention(query=query, key=key, value=value, **options)
        else:
            weights = F.scaled_dot_product_attention(query, key, value, options.pop("attn_mask", None), **options)
    (rows,) = recorder.recorded
    torch.testing.assert_close(rows, weights.mean(2) if of_all else weights[:, :, 0])


def test_attention_to_other_tokens_is_not_recorded() -> None:
    with AttentionRecorder(lambda num_tokens: slice(None)) as recorder:
        F.scaled_dot_product_attention(random(1, 2, 1, 4), random(1, 2, 5, 4), random(1, 2, 5, 4))
    assert not recorder.recorded


def test_the_weights_are_computed_precisely_within_autocast() -> None:
    query, key, value = (random(BATCH, HEADS, LENGTH, DEPTH, seed=seed).float() for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16), AttentionRecorder(of_the_first) as recorder:
        F.scaled_dot_product_attention(query, key, value)
    expected = (query.bfloat16().float() @ key.bfloat16().float().mT * DEPTH**-0.5).softmax(-1)[:, :, 0]
    exact = (query @ key.mT * DEPTH**-0.5).softmax(-1)[:, :, 0]
    (rows,) = recorder.recorded
    assert rows.dtype == torch.float32
    assert min((rows - each).abs().max() for each in (expected, exact)) < 1e-6


def multi_head(module: nn.MultiheadAttention, tokens: Tensor, **options: Any) -> Tensor:
    """Its weights (B, heads, T, T)."""
    return module(tokens, tokens, tokens, average_attn_weights=False, **options)[1]


def test_masked_multi_head_attention() -> None:
    torch.manual_seed(0)
    module, tokens = nn.MultiheadAttention(8, HEADS, batch_first=True).double(), random(BATCH, LENGTH, 8)
    for options in (
        {"attn_mask": ~CAUSAL},
        {"attn_mask": ~CAUSAL, "is_causal": True},
        {"key_padding_mask": ~shown(3)[:, 0, 0]},
    ):
        with AttentionRecorder(of_the_first) as recorder:
            module(tokens, tokens, tokens, need_weights=False, **options)
        torch.testing.assert_close(recorder.recorded, [multi_head(module, tokens, **options)[:, :, 0]])


# Towers --------------------------------------------------------------------------------------------------------------


def entering_attention(block: Any) -> list[Tensor]:
    """Filled, when the tower runs, with what enters the attention of a block of timm."""
    entered: list[Tensor] = []
    block.norm1.register_forward_hook(lambda module, args, output: entered.append(output))
    return entered


def softmax_of_timm(attention: Any, tokens: Tensor, bias: Tensor | float) -> Tensor:
    """(B, heads, T, T)"""
    q_bias = getattr(attention, "q_bias", None)
    packed = attention.qkv.bias if q_bias is None else torch.cat([q_bias, attention.k_bias, attention.v_bias])
    query, key, _ = F.linear(tokens, attention.qkv.weight, packed).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return (query @ key.mT * query.shape[-1] ** -0.5 + bias).softmax(-1)


@torch.no_grad()
def test_the_maps_of_timm_beit_have_its_bias() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("beit_base_patch16_224", **TIMM).double().eval()
    block = model.blocks[2]
    block.attn.relative_position_bias_table.normal_()
    entered = entering_attention(block)
    drawn = attention_to_patches(find_tower(model), images(), block=2)
    expected = softmax_of_timm(block.attn, entered[0], block.attn._get_rel_pos_bias())
    torch.testing.assert_close(drawn, expected[:, :, 0, 1:])


@torch.no_grad()
def test_the_maps_of_a_masked_tower_have_its_mask() -> None:
    model: Any = build("timm_vit").double()
    block, length = model.blocks[2], (IMAGE // PATCH) ** 2 + 1
    mask = torch.ones(BATCH, 1, length, length, dtype=torch.bool)
    mask[1, :, :, 4:9] = False
    entered = entering_attention(block)
    with AttentionRecorder(of_the_first) as recorder:
        model.forward_features(images(), attn_mask=mask)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert len(recorder.recorded) == len(model.blocks)
    torch.testing.assert_close(recorder.recorded[2], softmax_of_timm(block.attn, entered[0], bias)[:, :, 0])
    assert (recorder.recorded[2][1, :, 4:9] == 0).all()


@pytest.mark.parametrize("patched", [False, True])
@torch.no_grad()
def test_the_maps_of_transformers_beit_are_those_that_it_gives_itself(patched: bool) -> None:
    torch.manual_seed(0)
    config = transformers.BeitConfig(**HF, use_relative_position_bias=True, use_mask_token=False)
    model: Any = transformers.BeitModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            parameter.normal_()
    if patched:
        testreg.patch(model, NEURONS)
    model.set_attn_implementation("sdpa")
    drawn = attention_to_patches(find_tower(model), images(), block=2)
    model.set_attn_implementation("eager")
    expected = model(images(), output_attentions=True).attentions[2]
    torch.testing.assert_close(drawn, expected[:, :, 0, 1:].to(drawn.dtype), rtol=1e-5, atol=1e-6)
