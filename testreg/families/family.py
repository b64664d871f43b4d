"""`Family`: what testreg has to know about a kind of Vision Transformer, a row of the table of families.

Words: a *tower* is the vision transformer in a model; a *neuron* is a hidden channel of a block's MLP; a *register* is
a token that is added behind the others; *prefix* tokens (CLS, trained registers) come before the patches. Shapes: B
batch, T tokens, C width of a token, H neurons of a block, R registers, N patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from testreg.families.inputs import separate_images
from testreg.families.layout import Layout

Paths = str | tuple[str, ...]
"""A dotted attribute name, or several candidates, of which the first that exists is used."""

WINDOWS = "in most blocks attention stays within windows of the image, in which one register has no place"
"""Why the method does not fit SAM and similar architectures."""
STAGES = "patches are merged between stages, so that there is no sequence on which a register could ride"
"""Why the method does not fit Swin and similar architectures."""


FindLayout = Callable[[Any, Layout, Mapping[str, Any]], Layout]
"""Finds the layout of a block's tokens.

It gets the tower's module, the layout that a batch without padding would have, and the arguments that a block is called
with beside the tokens, by name.
"""


def run_plainly(tower: Any, images: Tensor) -> Any:
    """Run a tower that is called with images (B, 3, h, w) and no further arguments."""
    return tower(images)


@dataclass(frozen=True)
class Family:
    """One row of the table: where a family of towers keeps the parts that testreg needs.

    A tower is recognised by the name of its class, so that its library need not be imported. `testreg.add_family` adds
    a row for a model of your own. `name`, `towers`, `blocks` and `fc2` are enough to patch a plain ViT with a CLS
    token; to draw its maps, give `patch_embed` too.

    Example:
        >>> mine = testreg.Family(name="mine", towers="MyViT", blocks="blocks", fc2="mlp.2", patch_embed="embed")
    """

    name: str
    towers: Paths
    """Class names of the vision tower: the module that is called with images and owns the blocks."""
    blocks: Paths
    """The ModuleList or Sequential of blocks, in the tower."""
    fc2: Paths
    """Path in a block: the MLP's second linear, or the norm in front of it. Its *input* channels are the neurons."""
    patch_embed: Paths = ()
    """Path in the tower: the convolution that makes tokens of patches (its stride is the patch size), or a linear."""
    positions: Paths = ()
    """Path in the tower: the learned position embeddings that are added to the patches, a parameter (..., C) or an
    nn.Embedding, whose last rows are of the patches."""
    prefix: int | Callable[[Any], int] = 1
    """P, the number of tokens in front of the patches (CLS, distillation and trained register tokens), or a function
    that reads it from the tower."""
    trained_registers: Callable[[Any], int] = lambda tower: 0
    """Maps the tower to the number of trained registers. They are the last of the prefix tokens."""
    library: str | None = None
    """Top-level package that defines the class; None if people copy or download the code, so that it may be any."""
    requirements: Paths = ()
    """Paths of attributes, all of which the tower must have too. They tell apart classes of the same name, for rows
    without `library`."""
    scale: Paths = ()
    """Path in a block: the LayerScale vector (C,) on the MLP's output."""
    consumers: Paths = ()
    """Path in a block: a second module that gets the hidden activation as its first argument, e.g. experts."""
    fused: Paths = ()
    """Path in a block: a linear whose input is attention's output (C) followed by the hidden activation (H)."""
    parallel: Paths = ()
    """Path in a block: a ModuleList of MLPs that run in parallel. `fc2` and `scale` are then paths in each of them."""
    entry_norm: Paths = ()
    """Path in the tower: the norm between the embedding and the first block. New registers pass through it too."""
    attention: Paths = ()
    """Path in a block: the attention module. It is needed if attention may return its weights (B, heads, T, T) as
    second output, or if gradient checkpointing recomputes the block from within (transformers)."""
    appended: int = 0
    """Number of tokens that a block itself appends, behind the registers, while it computes attention."""
    bias: Paths = ()
    """Path in a block: a method that makes a relative position bias (..., T, T) for attention."""
    bias_count: str = ""
    """Name of that method's argument that is the number of tokens."""
    sequence_first: Callable[[Any], bool] = lambda tower: False
    """Maps the tower to True if its blocks get tokens as (T, B, C) instead of (B, T, C)."""
    block_arguments: Mapping[str, Callable[[Any, Layout], Any]] = field(default_factory=dict)
    """{name of a tensor that a block gets beside the tokens: function that extends it to the registers}. The usual
    masks need not be listed: see `extend.MASKS`."""
    layout: FindLayout | None = None
    """Finds where the tokens are, if they are not a batch, e.g. packed in a sequence. None for a batch, in which tokens
    that an attention mask hides from all others are padding."""
    patch_size: Callable[[Any], tuple[int, int]] | None = None
    """Maps the tower to the height and width of its patches in pixels; None if that is the stride of `patch_embed`."""
    grid: Callable[[Any, int, int], tuple[int, int]] | None = None
    """Maps the tower and an image's height and width to the rows and columns of patches; None if they follow from the
    patch size, without padding."""
    run: Callable[[Any, Tensor], Any] | None = run_plainly
    """Runs the tower on images (B, 3, h, w), of any size if the tower can, or on clips (B, frames, 3, h, w). None if it
    is not written how: the tower can then be patched, but not calibrated."""
    takes: Literal["images", "clips", "packed images"] = "images"
    """What the tower takes. "packed images": `run` gets a batch, but the blocks get all images in one sequence. Towers
    that take clips or packed images can be diagnosed and calibrated, but their maps cannot be drawn."""
    separate: Callable[[Any, Mapping[str, Any]], list[Tensor]] = separate_images
    """Maps the tower's configuration and what its processor returns to a list of the images (3, h, w) or clips
    (frames, 3, h, w) that `run` takes."""
    order: Callable[[Any, int, int], Tensor] | None = None
    """Maps the tower and the rows and columns of patches to the patches' indices (N,) in an image's sequence, row by
    row. None if the sequence has the patches row by row."""
    keeps_shape: bool = False
    """Whether the model's processor keeps the shape of images, so that images may not fit into one batch."""
    frames_apart: bool = False
    """Whether each frame of a clip is a sequence of its own, so that blocks get (B * frames, T, C)."""
