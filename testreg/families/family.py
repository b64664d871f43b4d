"""What has to be known about a family of Vision Transformers: one `Family`, a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from testreg.patching.layout import Layout

Paths = str | tuple[str, ...]
"""Dotted attribute names; of several candidates the first that exists is used."""


WINDOWS = "in most blocks attention stays within windows of the image, in which one register has no place"
"""Why the method does not fit SAM and its kin."""


def listed(paths: Paths) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def find_part(root: nn.Module, paths: Paths) -> Any:
    """What the first existing path leads to; an Identity stands for a part that was left out."""
    for path in listed(paths):
        node: object = root
        for name in path.split("."):
            node = getattr(node, name, None)
        if node is not None and not isinstance(node, nn.Identity):
            return node
    return None


def run_plainly(tower: Any, images: Tensor) -> Any:
    """A tower that needs to be told nothing but the images."""
    return tower(images)


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
    """What a mask hides from everyone is padding."""
    if (mask := arguments.get("attention_mask")) is not None and _is_flat(mask):
        return replace(plain, valid=plain.extend(mask.bool(), -1, True))
    for name in MASKS:
        if (mask := arguments.get(name)) is not None:
            return replace(plain, valid=plain.validity(mask))
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
    """Images are packed in a sequence if a block is told where each ends."""
    ends = arguments.get("cu_seqlens")
    return plain if ends is None else replace(plain, lengths=ends.diff().tolist())


def extend_max_length(length: int, layout: Layout) -> int:
    """Tokens of the longest image in a packed sequence."""
    return length + layout.num_registers


PACKED: Mapping[str, Callable[[Any, Layout], Any]] = {
    "cu_seqlens": extend_cu_seqlens,
    "max_seqlen": extend_max_length,
    "position_embeddings": extend_rope,
}
"""What blocks get beside the tokens of packed images."""


@dataclass(frozen=True)
class Family:
    """One row of the table: where a family keeps the parts that the method touches.

    A tower is recognised by the name of its class, so that no library need be imported. `testreg.add_family` adds a
    row for a model of your own: `name`, `towers`, `blocks` and `down` are enough to patch a plain ViT that has a CLS
    token, with `patch_embed` to draw it too.
    """

    name: str
    towers: Paths
    """Class names of the vision tower: the module that is called with images and owns the blocks."""
    blocks: Paths
    """The ModuleList or Sequential of blocks, in the tower."""
    fc2: Paths
    """The MLP's second linear, in a block; or the norm in front of it. Its *input* channels are the neurons."""
    patch_embed: Paths = ()
    """The convolution that makes patches into tokens, in the tower: its stride is the patch size."""
    prefix: int | Callable[[Any], int] = 1
    """Number of tokens in front of the patches (CLS, distillation and trained register tokens)."""
    library: str | None = None
    """Top-level package that defines the class; None where the code is vendored (torch.hub) and any package will do."""
    requirements: Paths = ()
    """What the tower must have besides, where several classes of vendored code share a name."""
    fc1: Paths = ()
    """The MLP's first linear, in a block. For planting only, as the next two."""
    query_key: Paths = ()
    """Attention's input projections, in a block: one packed weight (3C, C), or the weights of query and key."""
    num_heads: Paths = ()
    scale: Paths = ()
    """LayerScale vector on the MLP's output, in a block."""
    consumers: Paths = ()
    """Another module, in a block, whose first argument is the hidden activation too."""
    fused: Paths = ()
    """One linear, in a block, for attention's output (C) and the hidden activation (H), in this order."""
    parallel: Paths = ()
    """ModuleList of several MLPs that a block runs side by side: `down`, `up` and `scale` are then paths in each."""
    entry_norm: Paths = ()
    """Norm between the embedding and the first block, in the tower: the zero token passes through it too."""
    attention: Paths = ()
    """Attention module, in a block, if it may return its weights (B, heads, T, T) as the second of its outputs, or if
    gradient checkpointing recomputes the block from within (transformers)."""
    appended: int = 0
    """Tokens that a block itself appends, behind the registers, while it attends."""
    bias: Paths = ()
    """Method, in a block, that makes a relative position bias (..., T, T) for attention."""
    bias_count: str = ""
    """Argument of that method that counts the tokens."""
    sequence_first: Callable[[Any], bool] = lambda tower: False
    """True where blocks see (T, B, C)."""
    block_arguments: Mapping[str, Callable[[Any, Layout], Any]] = field(default_factory=dict)
    """Tensors that a block gets beside the tokens, by name, and how they are extended to the registers. Masks are
    known: see `MASKS`."""
    layout: Callable[[Any, Layout, Mapping[str, Any]], Layout] = padded
    """From the tower and a block's arguments, where the tokens lie: padded to one length, or packed in a sequence."""
    patch_size: Callable[[Any], tuple[int, int]] | None = None
    """Height and width in pixels of a tower's patches, where the stride of `patch_embed` does not tell."""
    grid: Callable[[Any, int, int], tuple[int, int]] | None = None
    """Rows and columns of patches of an image of a height and width, where the tower pads images to whole patches."""
    run: Callable[[Any, Tensor], Any] | None = run_plainly
    """Runs the tower on images (B, 3, h, w), of any size if it can; None where it takes something else (videos,
    packed patches): it can be patched then, but not calibrated."""

    def __reduce__(self) -> tuple[Callable[[str], Family], tuple[str]]:
        # A row holds functions: patched models are pickled with its name.
        from testreg.families.table import family_named

        return family_named, (self.name,)
