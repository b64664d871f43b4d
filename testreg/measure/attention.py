"""Attention to the patches, read off any model without touching it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Tower
from testreg.measure.hooks import recording_inputs, recording_outputs


class Recorder(TorchFunctionMode):
    """Sees every attention that is computed while it is active: fused, in nn.MultiheadAttention, or by a softmax.

    Keeps what the first token gives to each token (B, heads, T), or, if `of_all`, what all tokens give on average.
    """

    def __init__(self, of_all: bool) -> None:
        super().__init__()
        self.of_all = of_all
        self.rows: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            weights = fused_weights(*args, **kwargs, of_all=self.of_all)
            if weights is not None:
                self._keep(weights)
        elif func is F.multi_head_attention_forward and _attends_to_itself(*args, **kwargs):
            asked = kwargs.get("need_weights", True)
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            assert weights is not None
            self._keep(weights)
            return out, weights.mean(1) if asked else None
        out = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax) and out.ndim == 4 and out.shape[-1] == out.shape[-2]:
            self._keep(out)
        return out

    def _keep(self, attention: Tensor) -> None:
        """(B, heads, queries, T)"""
        precise = attention.to(torch.promote_types(attention.dtype, torch.float32))
        self.rows.append(precise.mean(2) if self.of_all else precise[:, :, 0])


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
    of_all: bool,
) -> Tensor | None:
    """The weights (B, heads, T, T) behind `F.scaled_dot_product_attention`, before dropout; None unless tokens attend
    to themselves.

    Not `of_all`: those of the first token alone, (B, heads, 1, T).
    """
    length = key.shape[-2]
    if query.ndim != 4 or query.shape[-2] != length:
        return None
    visible = query.new_ones(length, length, dtype=torch.bool).tril() if is_causal else None
    if not of_all:
        query, visible = query[:, :, :1], None if visible is None else visible[:1]
        attn_mask = None if attn_mask is None else attn_mask[..., :1, :]
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * scale
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        logits = logits + attn_mask
    for shown in (visible, attn_mask):
        if shown is not None and shown.dtype is torch.bool:
            logits = logits.masked_fill(~shown, -torch.inf)
    # A token that sees nothing gives nothing.
    return logits.softmax(-1).masked_fill(logits.isneginf().all(-1, keepdim=True), 0)


def _attends_to_itself(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> bool:
    return query is key


@torch.no_grad()
def attention_to_patches(tower: Tower, images: Tensor, block: int = -1) -> Tensor:
    """What the CLS token gives to each patch in a block: (B, heads, N), for images (B, 3, h, w).

    In towers without prefix tokens it is what the patches give on average. Rows do not sum to one: the rest goes to
    prefix tokens and registers.

    Raises:
        RuntimeError: the model computes attention in a way that cannot be observed from Python.
    """
    module, kept = tower.blocks[block].module, list[Tensor]()
    with (
        Recorder(of_all=tower.num_prefix == 0) as recorder,
        recording_inputs([module], lambda index, tokens: recorder.rows.clear()),
        recording_outputs([module], lambda index, tokens: kept.extend(recorder.rows)),
    ):
        tower.run(images)
    if not kept:
        raise RuntimeError(
            f"saw no attention in block {block} of {tower.family.name}: compiled or custom attention kernels cannot be "
            "observed"
        )
    attention = torch.cat(kept, 1)  # a block may attend several times, side by side
    return attention[..., tower.patches(images)]


def entropy(attention: Tensor) -> Tensor:
    """Entropy (...,) in nats of attention (..., N), normalised over the patches: log N if spread evenly."""
    share = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)
