"""Observe the attention that a model computes, while it runs.

Three ways to compute it are recognised: `F.scaled_dot_product_attention` (fused), `nn.MultiheadAttention`, and a
softmax that is multiplied with values.

Shapes: B images, S queries, T keys and values, C width, D width of a head; n selected queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TokenSelection = slice | Tensor
"""Which of the tokens are selected: a slice, or their numbers (n,)."""

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """A call of `F.scaled_dot_product_attention`, by its arguments.

    Queries are (B, heads, S, D), keys and values (B, heads, T, D). With `enable_gqa` (grouped queries), keys and values
    have fewer heads, each of which serves several heads of the queries.
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
    """How many keys and values at the end are not of tokens (such as `bias_k` of nn.MultiheadAttention)."""

    @property
    def is_self_attention(self) -> bool:
        """Whether there are as many queries as keys of tokens."""
        return self.num_queries == self.num_tokens - self.appended

    @property
    def num_queries(self) -> int:
        return self.query.shape[-2]

    @property
    def num_images(self) -> int:
        return len(self.query)

    @property
    def num_tokens(self) -> int:
        """T, the number of keys, appended ones included."""
        return self.key.shape[-2]

    @property
    def values(self) -> Tensor:
        """The values (B, heads, T, D), for each head of the queries."""
        return self._for_each_head(self.value)

    @property
    def projections(self) -> tuple[Tensor, Tensor, Tensor]:
        """The queries (B, S, C), keys and values (B, T, C), with all heads side by side in C.

        Keys and values of grouped queries have fewer heads, hence a smaller C.
        """
        query, key, value = (each.transpose(1, 2).flatten(2) for each in (self.query, self.key, self.value))
        return query, key, value

    def weights(self, queries: TokenSelection) -> Tensor:
        """The attention weights (B, heads, n, T) of some queries, before dropout, in float32 or a larger dtype."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:, :, queries], self._for_each_head(self.key)
        with torch.autocast(query.device.type, enabled=False):
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            logits = (query.to(dtype) * scale) @ key.to(dtype).transpose(-2, -1)
        masks = self._masks(queries)
        if not masks:
            return logits.softmax(-1)
        for mask in masks:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
        # A query that may attend to no key has zero weights, not NaN.
        return logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)

    def _masks(self, queries: TokenSelection) -> list[Tensor]:
        """The masks of some queries: bool masks say which keys they may attend to, others are added to their logits."""
        masks = []
        if self.is_causal:
            shape = self.query.shape[-2], self.num_tokens
            masks.append(self.query.new_ones(shape, dtype=torch.bool).tril()[queries])
        if self.attn_mask is not None:
            masks.append(self.attn_mask[..., queries, :] if self.attn_mask.shape[-2] > 1 else self.attn_mask)
        return masks

    def _for_each_head(self, tensor: Tensor) -> Tensor:
        """Keys or values, repeated for each head of the queries if several of these share them."""
        return tensor.repeat_interleave(self.query.shape[1] // tensor.shape[1], 1) if self.enable_gqa else tensor


@dataclass(frozen=True, eq=False)
class UnfusedAttention:
    """Attention that is computed as a softmax, and a product of its weights with values."""

    all_weights: Tensor
    """The attention weights of all queries, (B, heads, S, T), as they are multiplied with the values, so after
    dropout."""
    values: Tensor | None
    """The values (B, heads, T, D); None if no product with the weights was seen."""

    projections = None
    """None, since the queries and keys are not seen."""

    @property
    def is_self_attention(self) -> bool:
        """Whether there are as many queries as keys."""
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

    def weights(self, queries: TokenSelection) -> Tensor:
        """The attention weights (B, heads, n, T) of some queries, in float32 or a larger dtype."""
        weights = self.all_weights[:, :, queries]
        return weights.to(torch.promote_types(weights.dtype, torch.float32))


Attention = FusedAttention | UnfusedAttention
"""An attention that was observed. Attention of nn.MultiheadAttention is turned into a `FusedAttention`."""


class AttentionObserver(TorchFunctionMode):
    """Calls `on_attention` with each attention that is computed within the context. The model's outputs do not change.

    Of `F.scaled_dot_product_attention` and nn.MultiheadAttention, only those weights are computed that `on_attention`
    asks for.
    """

    def __init__(self, on_attention: Callable[[Attention], object]) -> None:
        super().__init__()
        self.on_attention = on_attention
        self.pending_weights: Tensor | None = None
        """The output (B, heads, S, T) of a softmax, until it is multiplied with values."""

    def end(self) -> None:
        """Say that a part of the model has ended: a softmax whose product was not seen is reported without values."""
        self._report_pending(None)

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
                self.on_attention(fused)
        elif func is F.multi_head_attention_forward:
            of_module = attention_of_module(*args, **kwargs)
            if of_module is not None:
                self.on_attention(of_module)
        out = func(*args, **kwargs)
        if func in SOFTMAX and out.ndim == 4:
            self._report_pending(None)
            self.pending_weights = out
        elif self.pending_weights is not None and args and args[0] is self.pending_weights:
            if func in MATMUL:
                self._report_pending(args[1])
            elif isinstance(out, Tensor) and out.shape == self.pending_weights.shape:  # after dropout, or a cast
                self.pending_weights = out
        return out

    def _report_pending(self, values: Tensor | None) -> None:
        """Report the pending softmax, if there is one, with the values that it is multiplied with."""
        weights, self.pending_weights = self.pending_weights, None
        if weights is not None:
            self.on_attention(UnfusedAttention(weights, values))


def attention_of_module(
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
    """The attention that nn.MultiheadAttention computes from queries (S, B, C), keys and values (T, B, C).

    The parameters are those of `F.multi_head_attention_forward`. Returns None if the tokens have no batch dimension.
    """
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
            if each is not None:  # (1, 1 or B, C)
                projected[index] = torch.cat([projected[index], each.expand(-1, query.shape[1], -1)])
        appended += 0 if extra[0] is None else len(extra[0])
    mask: Tensor | None = None
    if attn_mask is not None:  # (S, T) or (B * heads, S, T)
        attn_mask = _as_addend(attn_mask, query)
        mask = attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.ndim == 3 else attn_mask
    if key_padding_mask is not None:  # (B, T)
        padding = _as_addend(key_padding_mask, query)[:, None, None]
        mask = padding if mask is None else mask + padding
    if mask is not None:
        mask = F.pad(mask, (0, appended))
    query, key, value = (each.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for each in projected)
    return FusedAttention(query, key, value, mask, appended=appended)


def _as_addend(mask: Tensor, query: Tensor) -> Tensor:
    """A mask of nn.MultiheadAttention as what is added to logits: a bool mask becomes -inf where it is true; others are
    returned as they are."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)
