"""Extends the tensors that a block gets beside the tokens (masks, rotary embeddings, lengths) to the added registers.

A register is an extra token. A `Layout` knows where the registers go among the T tokens of an image; the functions
`padded` and `packed` find the layout from a block's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from testreg.families.layout import Layout


def extend_rope(rotations: tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Extend rotary embeddings (cosines, sines), each (..., T, D), to registers, which have no position: 1 and 0."""
    cosine, sine = rotations
    return layout.extend(cosine, -2, 1.0), layout.extend(sine, -2, 0.0)


def extend_bias(bias: Tensor, layout: Layout) -> Tensor:
    """A relative position bias (..., T+R, T+R), from (..., T, T): the bias to and from registers is 0."""
    return layout.extend(layout.extend(bias, -2, 0.0), -1, 0.0)


def extend_token_mask(mask: Any, layout: Layout) -> Any:
    """An attention mask in which all tokens may attend to the registers."""
    return layout.extend_mask(mask)


def extend_transformers_mask(mask: Any, layout: Layout) -> Any:
    """The same for masks of transformers, which for flash attention are (B, T), with 0 for padding."""
    return layout.extend(mask, -1, 1.0) if _is_flat(mask) else layout.extend_mask(mask)


MASKS = {"attention_mask": extend_transformers_mask, "attn_mask": extend_token_mask}
"""{name of an argument that is an attention mask in every family: how it is extended to the registers}."""


def padded(tower: Any, default_layout: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of a padded batch: tokens that no token may attend to are padding.

    Args:
        tower: not used; it is there since every family's function that finds a layout gets it.
        default_layout: the layout of a batch without padding.
        arguments: the block's arguments beside the tokens, by name.
    """
    if (mask := arguments.get("attention_mask")) is not None and _is_flat(mask):
        return default_layout.replace(valid=default_layout.extend(mask.bool(), -1, True))
    for name in MASKS:
        if (mask := arguments.get(name)) is not None:
            return default_layout.replace(valid=default_layout.validity(mask))
    return default_layout


def _is_flat(mask: Any) -> bool:
    """Whether a mask is (B, T): one value for each token, not for each pair of tokens."""
    return isinstance(mask, Tensor) and mask.ndim == 2


def unchanged(extra: Any, layout: Layout) -> Any:
    """The argument as it is: for arguments that do not depend on the number of tokens."""
    return extra


def extend_cu_seqlens(ends: Tensor, layout: Layout) -> Tensor:
    """Cumulative lengths (images + 1,) of images that are packed in one sequence, with the registers of each image."""
    return ends + layout.num_registers * torch.arange(len(ends), device=ends.device, dtype=ends.dtype)


def packed(tower: Any, default_layout: Layout, arguments: Mapping[str, Any]) -> Layout:
    """The layout of images that are packed in one sequence: "cu_seqlens" in the arguments tells where each image ends.

    Without that argument it is `default_layout`, the layout of a batch.
    """
    ends = arguments.get("cu_seqlens")
    return default_layout if ends is None else default_layout.replace(lengths=ends.diff().tolist())


def extend_max_length(length: int, layout: Layout) -> int:
    """The number of tokens of the longest image in a packed sequence, with its registers."""
    return length + layout.num_registers


PACKED: Mapping[str, Callable[[Any, Layout], Any]] = {
    "cu_seqlens": extend_cu_seqlens,
    "max_seqlen": extend_max_length,
    "position_embeddings": extend_rope,
}
"""{name of an argument that most blocks for packed images get: how it is extended to the registers}."""
