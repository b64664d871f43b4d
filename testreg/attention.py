"""Attention to the patches, read off any model without touching it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families import Tower


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
        if func is F.scaled_dot_product_attention and args[0].shape == args[1].shape:
            query, key = args[0], args[1]
            query = query if self.of_all else query[:, :, :1]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            self._keep((query.float() @ key.float().transpose(-2, -1) * scale).softmax(-1))
        elif func is F.multi_head_attention_forward and args[0] is args[1]:
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
        self.rows.append((attention.mean(2) if self.of_all else attention[:, :, 0]).float())


@torch.no_grad()
def attention_to_patches(tower: Tower, images: Tensor, layer: int = -1) -> Tensor:
    """What the CLS token gives to each patch in a block: (B, heads, N), for images (B, 3, h, w).

    In towers without prefix tokens it is what the patches give on average. Rows do not sum to one: the rest goes to
    prefix tokens and registers.

    Raises:
        RuntimeError: the model computes attention in a way that cannot be observed from Python.
    """
    block, kept = tower.blocks[layer].module, list[Tensor]()
    with Recorder(of_all=tower.num_prefix == 0) as recorder:
        handles = [
            block.register_forward_pre_hook(lambda module, args: recorder.rows.clear()),
            block.register_forward_hook(lambda module, args, output: kept.extend(recorder.rows)),
        ]
        try:
            tower.run(images)
        finally:
            for handle in handles:
                handle.remove()
    if not kept:
        raise RuntimeError(
            f"saw no attention in block {layer} of {tower.family.name}: compiled or custom attention kernels cannot be "
            "observed"
        )
    rows, columns = tower.grid(images)
    attention = torch.cat(kept, 1)  # a block may attend several times, side by side
    return attention[..., tower.num_prefix : tower.num_prefix + rows * columns]


def entropy(attention: Tensor) -> Tensor:
    """Entropy (...,) in nats of attention (..., N), normalised over the patches: log N if spread evenly."""
    share = attention / attention.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)
