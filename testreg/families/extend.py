"""Extends the arguments that a block gets beside the tokens by the registers, and says where the tokens then lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from testreg.families.layout import Layout


def extend_rope(rotations: tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., T, D) of rotary embeddings, and identities for the registers, which have no position."""
    cosine, sine = rotations
    return layout.extend(cosine, -2, 1.0), layout.extend(sine, -2, 0.0)


def extend_bias(bias: Tensor, layout: Layout) -> Tensor:
    """A relative position bias (..., T, T), with rows and columns of zeros for the registers."""
    return layout.extend(layout.extend(bias, -2, 0.0), -1, 0.0)


def extend_token_mask(mask: Any, layout: Layout) -> Any:
    """A mask on attention, which shows the registers to everyone."""
    return layout.extend_mask(mask)


def extend_transformers_mask(mask: Any, layout: Layout) -> Any:
    """The same; for flash attention it is (B, T), 0 at padding."""
    return layout.extend(mask, -1, 1.0) if _is_flat(mask) else layout.extend_mask(mask)


MASKS = {"attention_mask": extend_transformers_mask, "attn_mask": extend_token_mask}
"""Arguments of blocks that are masks on attention in all families."""


def padded(tower: Any, plain: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of a padded batch: tokens that the mask hides from everyone are padding."""
    if (mask := arguments.get("attention_mask")) is not None and _is_flat(mask):
        return plain.replace(valid=plain.extend(mask.bool(), -1, True))
    for name in MASKS:
        if (mask := arguments.get(name)) is not None:
            return plain.replace(valid=plain.validity(mask))
    return plain


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2


def unchanged(extra: Any, layout: Layout) -> Any:
    """A tensor that has no row for each token."""
    return extra


def extend_cu_seqlens(ends: Tensor, layout: Layout) -> Tensor:
    """Cumulative lengths (images + 1,) of packed images, counting the registers."""
    return ends + layout.num_registers * torch.arange(len(ends), device=ends.device, dtype=ends.dtype)


def packed(tower: Any, plain: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of packed images, if the arguments tell the block where each image ends."""
    ends = arguments.get("cu_seqlens")
    return plain if ends is None else plain.replace(lengths=ends.diff().tolist())


def extend_max_length(length: int, layout: Layout) -> int:
    """Tokens of the longest image in a packed sequence."""
    return length + layout.num_registers


PACKED: Mapping[str, Callable[[Any, Layout], Any]] = {
    "cu_seqlens": extend_cu_seqlens,
    "max_seqlen": extend_max_length,
    "position_embeddings": extend_rope,
}
"""What blocks get beside the tokens of packed images."""
