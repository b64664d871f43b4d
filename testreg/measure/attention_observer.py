"""Attention that torch computes, seen from Python: fused, of nn.MultiheadAttention, or a softmax and a product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rows = slice | Tensor  # which of the tokens: a slice, or their numbers (n,)

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """One `F.scaled_dot_product_attention`, by its arguments.

    They are queries (B, heads, S, D), and keys and values (B, heads, T, D), or of fewer heads for grouped queries.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    appended: int = 0
    """Keys and values behind those of the tokens (`bias_k` of nn.MultiheadAttention)."""

    @property
    def is_of_tokens_to_themselves(self) -> bool:
        return self.num_queries == self.num_tokens - self.appended

    @property
    def num_queries(self) -> int:
        return self.query.shape[-2]

    @property
    def num_images(self) -> int:
        return len(self.query)

    @property
    def num_tokens(self) -> int:
        """T, the number of keys, with those that are appended."""
        return self.key.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """The values (B, heads, T, D), one for each head of the queries."""
        return self._of_heads(self.value)

    @property
    def projections(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The queries, keys and values (B, T, C), heads joined."""
        query, key, value = (each.transpose(1, 2).flatten(2) for each in (self.query, self.key, self.value))
        return query, key, value

    def weights(self, rows: Rows) -> Tensor:
        """What some queries give to the keys, (B, heads, n, T), before dropout, in float32 at least."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:, :, rows], self._of_heads(self.key)
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            logits = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
        masks = self._masks(rows)
        if not masks:
            return logits.softmax(-1)
        for mask in masks:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
        # A token that sees nothing gives nothing.
        return logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)

    def _masks(self, rows: Rows) -> list[Tensor]:
        """Masks of what the queries see (bool), or of what is added to their logits."""
        masks = []
        if self.is_causal:
            shape = self.query.shape[-2], self.num_tokens
            masks.append(self.query.new_ones(shape, dtype=torch.bool).tril()[rows])
        if self.attn_mask is not None:
            masks.append(self.attn_mask[..., rows, :] if self.attn_mask.shape[-2] > 1 else self.attn_mask)
        return masks

    def _of_heads(self, tensor: Tensor) -> Tensor:
        """Keys or values of groups of heads, for each head of the queries."""
        return tensor.repeat_interleave(self.query.shape[1] // tensor.shape[1], 1) if self.enable_gqa else tensor


@dataclass(frozen=True, eq=False)
class UnfusedAttention:
    """What a softmax has computed, and what it is multiplied with."""

    all_weights: Tensor
    """(B, heads, S, T)."""
    values: Tensor | None
    """The values (B, heads, T, D); None where these were not seen."""

    projections = None
    """The queries and keys are not seen."""

    @property
    def is_of_tokens_to_themselves(self) -> bool:
        return self.num_queries == self.num_tokens

    @property
    def num_queries(self) -> int:
        return self.all_weights.shape[-2]

    @property
    def num_images(self) -> int:
        return len(self.all_weights)

    @property
    def num_tokens(self) -> int:
        """T, the number of keys."""
        return self.all_weights.shape[-1]

    def weights(self, rows: Rows) -> Tensor:
        """What some queries give to the keys, (B, heads, n, T), in float32 at least."""
        weights = self.all_weights[:, :, rows]
        return weights.to(torch.promote_types(weights.dtype, torch.float32))


Attention = FusedAttention | UnfusedAttention


class AttentionObserver(TorchFunctionMode):
    """Calls `see` with each attention that is computed while it is active. What the model computes stays as it is.

    No weights are computed but those that are asked for, where attention is fused or of nn.MultiheadAttention.
    """

    def __init__(self, see: Callable[[Attention], object]) -> None:
        super().__init__()
        self.see = see
        self.waiting: Tensor | None = None  # weights (B, heads, S, T) of a softmax, not yet multiplied with the values

    def end(self) -> None:
        """What is running has ended: weights that wait for their values wait in vain."""
        self._see_waiting(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        if error is None:
            self.end()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            fused = FusedAttention(*args, **kwargs)
            if fused.query.ndim == 4:
                self.see(fused)
        elif func is F.multi_head_attention_forward:
            of_module = fused_of_module(*args, **kwargs)
            if of_module is not None:
                self.see(of_module)
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4:
            self._see_waiting(None)
            self.waiting = out
        elif self.waiting is not None and args and args[0] is self.waiting:
            if func in MATMUL:
                self._see_waiting(args[1])
            elif isinstance(out, Tensor) and out.shape == self.waiting.shape:  # dropout, another dtype
                self.waiting = out
        return out

    def _see_waiting(self, values: Tensor | None) -> None:
        weights, self.waiting = self.waiting, None
        if weights is not None:
            self.see(UnfusedAttention(weights, values))


def fused_of_module(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *args: Any,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    **kwargs: Any,
) -> FusedAttention | None:
    """What nn.MultiheadAttention computes from queries (S, B, C), keys and values (T, B, C); None where it takes one
    image without a batch."""
    if query.ndim != 3:
        return None
    weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if in_proj_weight is None else in_proj_weight.chunk(3)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    projected = [
        F.linear(tokens, weight, bias)
        for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    appended = 0
    for extra in ((bias_k, bias_v), (torch.zeros_like(projected[1][:1]),) * 2 if add_zero_attn else (None, None)):
        for index, each in enumerate(extra, start=1):
            if each is not None:  # (R, 1 or B, C)
                projected[index] = torch.cat([projected[index], each.expand(-1, query.shape[1], -1)])
        appended += 0 if extra[0] is None else len(extra[0])
    mask: Tensor | None = None
    if attn_mask is not None:  # (S, T) or (B * heads, S, T)
        attn_mask = _added(attn_mask, query)
        mask = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.ndim == 3 else attn_mask
    if key_padding_mask is not None:  # (B, T)
        padding = _added(key_padding_mask, query)[:, None, None]
        mask = padding if mask is None else mask + padding
    if mask is not None:
        mask = F.pad(mask, (0, appended))
    query, key, value = (each.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for each in projected)
    return FusedAttention(query, key, value, mask, appended=appended)


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """What nn.MultiheadAttention adds to logits: of a bool mask, -inf where it is true."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)
