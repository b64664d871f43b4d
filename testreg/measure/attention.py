"""Attention to the patches, read off any model without touching it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Tower
from testreg.families.kernels import attention_kernel
from testreg.measure.hooks import recording_inputs, recording_outputs
from testreg.measure.tokens import attends_to_itself, module_projections

Query = Literal["cls", "pool", "mean"]
Rows = slice | Tensor  # which of the queries: a slice, or their numbers (n,)
# Kernels that do not go through torch.nn.functional.
UNSEEN = ("flash_attention_2", "flash_attention_3", "flex_attention")
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Recorder(TorchFunctionMode):
    """Sees every attention that is computed while it is active: fused, in nn.MultiheadAttention, or by a softmax.

    Keeps what the first token (or the one of this number) gives to each token (B, heads, T), or, if `of_all`, what all
    tokens (or `queries` alone) give on average.
    """

    def __init__(self, of_all: bool, *, queries: slice = slice(None), token: int = 0) -> None:
        super().__init__()
        self.of_all, self.queries, self.token = of_all, queries, token
        self.rows: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            row = slice(None) if self.of_all else slice(self.token, self.token + 1 or None)
            weights = fused_weights(*args, **kwargs, rows=row)
            if weights is not None:
                self._keep(weights, 0)
        elif func is F.multi_head_attention_forward and attends_to_itself(*args, **kwargs):
            asked = kwargs.get("need_weights", True)
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self._keep(weights, self.token)
            return out, weights.mean(1) if asked else None
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and out.shape[-1] == out.shape[-2]:
            self._keep(out, self.token)
        return out

    def _keep(self, attention: Tensor, row: int) -> None:
        """Of attention (B, heads, queries, T), one row or the mean."""
        precise = attention.to(torch.promote_types(attention.dtype, torch.float32))
        self.rows.append(precise[:, :, self.queries].mean(2) if self.of_all else precise[:, :, row])


class PoolRecorder(TorchFunctionMode):
    """Sees attention of other queries to tokens while it is active: that of a head which pools by attention.

    Keeps what these queries give, on average, to each token (B, heads, T).
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            weights = fused_weights(*args, **kwargs, rows=slice(None), to_others=True)
            if weights is not None:
                self.rows.append(weights.mean(2))
        elif func is F.multi_head_attention_forward and not attends_to_itself(*args, **kwargs):
            asked = kwargs.get("need_weights", True)
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self.rows.append(weights.mean(2))
            return out, weights.mean(1) if asked else None
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and out.shape[-1] != out.shape[-2]:
            self.rows.append(out.mean(2))
        return out


class SampleRecorder(TorchFunctionMode):
    """Sees every attention of tokens to themselves while it is active, of some queries alone.

    Where attention is fused, as it mostly is, no weights are computed but those of these queries.

    Args:
        queries: which they are (n,), from the number of tokens T.
        see: called with the weights (B, heads, n, T) of each attention, before dropout, and the values
            (B, heads, T, D), or None where these were not seen.
    """

    def __init__(self, queries: Callable[[int], Tensor], see: Callable[[Tensor, Tensor | None], object]) -> None:
        super().__init__()
        self.queries, self.see = queries, see
        self.unfused: Tensor | None = None  # weights (B, heads, T, T), until they are multiplied with the values

    def end(self) -> None:
        """What is running has ended: weights that wait for their values wait in vain."""
        if self.unfused is not None:
            self._see_unfused(None)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see_fused(*args, **kwargs)
        elif func is F.multi_head_attention_forward and attends_to_itself(*args, **kwargs):
            return self._see_module(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4 and out.shape[-1] == out.shape[-2]:
            self.end()
            self.unfused = out
        elif self.unfused is not None and args and args[0] is self.unfused:
            if func in MATMUL:
                self._see_unfused(args[1])
            elif isinstance(out, Tensor) and out.shape == self.unfused.shape:  # dropout, another dtype
                self.unfused = out
        return out

    def _see_unfused(self, value: Tensor | None) -> None:
        assert self.unfused is not None
        weights, self.unfused = self.unfused[:, :, self.queries(self.unfused.shape[-1])], None
        self.see(weights.to(torch.promote_types(weights.dtype, torch.float32)), value)

    def _see_fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        weights = fused_weights(query, key, value, *args, **kwargs, rows=self.queries(key.shape[-2]))
        if weights is not None:
            self.see(weights, value.repeat_interleave(weights.shape[1] // value.shape[1], 1))

    def _see_module(self, *args: Any, **kwargs: Any) -> Any:
        """What nn.MultiheadAttention gives, of tokens (T, B, C)."""
        named = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given = named.arguments
        rows = self.queries(len(given["query"]))
        if all(given.get(name) is None for name in ("attn_mask", "key_padding_mask", "bias_k")):
            projected = module_projections(*args, **kwargs, rows=rows)
            query, key, value = (each.unflatten(-1, (given["num_heads"], -1)).transpose(1, 2) for each in projected)
            self.see(_softmax(query, key), value)
            return F.multi_head_attention_forward(*args, **kwargs)
        asked = given.get("need_weights", True)
        given.update(need_weights=True, average_attn_weights=False)
        out, weights = F.multi_head_attention_forward(*named.args, **named.kwargs)
        assert weights is not None
        self.see(weights[:, :, rows].float(), None)
        return out, weights.mean(1) if asked else None


def fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rows: Rows,
    to_others: bool = False,
) -> Tensor | None:
    """The weights (B, heads, n, T) of some queries behind `F.scaled_dot_product_attention`, before dropout; None unless
    tokens attend to themselves, or, if `to_others`, to others."""
    length = key.shape[-2]
    if query.ndim != 4 or (query.shape[-2] == length) == to_others:
        return None
    visible = query.new_ones(length, length, dtype=torch.bool).tril()[rows] if is_causal else None
    if attn_mask is not None and attn_mask.shape[-2] > 1:
        attn_mask = attn_mask[..., rows, :]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return _softmax(query[:, :, rows], key, scale, (visible, attn_mask))


def _softmax(query: Tensor, key: Tensor, scale: float | None = None, masks: tuple[Tensor | None, ...] = ()) -> Tensor:
    """The weights (B, heads, n, T) that queries (B, heads, n, D) give keys, with masks of what is shown or of what is
    added."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
    given = [mask for mask in masks if mask is not None]
    if not given:
        return logits.softmax(-1)
    for mask in given:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
    # A token that sees nothing gives nothing.
    return logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)


@torch.no_grad()
def attention_to_patches(tower: Tower, images: Tensor, block: int = -1, query: Query | None = None) -> Tensor:
    """What a query gives to each patch in a block: (B, heads, N), for images (B, 3, h, w).

    Queries are those of `testreg.attention`; None: CLS, or in towers without prefix tokens the mean of the patches.
    Rows do not sum to one: the rest goes to prefix tokens and registers.

    Raises:
        RuntimeError: the model computes attention in a way that cannot be observed from Python.
    """
    query = query or ("cls" if tower.num_prefix else "mean")
    patches = tower.patches(images)
    with attention_kernel(tower.module, "sdpa", instead_of=UNSEEN):
        if query == "pool":
            kept = pooling(tower, images)
        else:
            kept = _attending(tower, images, block, Recorder(of_all=query == "mean", queries=patches))
    if not kept:
        where = "by which it pools" if query == "pool" else f"in block {block}"
        raise RuntimeError(
            f"saw no attention {where} of {tower.family.name}: compiled or custom attention kernels cannot be observed"
        )
    if any(len(each) != len(images) for each in kept):  # images that are packed in one sequence
        return torch.cat([attention_to_patches(tower, image, block, query) for image in images.split(1)])
    attention = torch.cat(kept, 1)  # a block may attend several times, side by side
    return attention[..., patches]


def _attending(tower: Tower, images: Tensor, block: int, recorder: Recorder) -> list[Tensor]:
    """What is recorded in a block, for images (B, 3, h, w)."""
    module, kept = tower.blocks[block].module, list[Tensor]()
    with (
        recorder,
        recording_inputs([module], lambda index, tokens: recorder.rows.clear()),
        recording_outputs([module], lambda index, tokens: kept.extend(recorder.rows)),
    ):
        tower.run(images)
    return kept


@torch.no_grad()
def pooling(tower: Tower, images: Tensor) -> list[Tensor]:
    """What the query that pools the last block's tokens by attention gives to each; empty if there is no such head."""
    last = tower.blocks[-1].module
    with PoolRecorder() as recorder, recording_outputs([last], lambda index, tokens: recorder.rows.clear()):
        tower.run_with_head(images)
    return [rows for rows in recorder.rows if rows.shape[-1] == tower.patches(images).stop][:1]


def entropy(attention: Tensor) -> Tensor:
    """Entropy (...,) in nats of attention (..., N), normalised over the patches: log N if spread evenly."""
    share = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)
