"""What has to be known about a family of Vision Transformers: one `Family`, a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar

from torch import Tensor

from testreg.families.inputs import separate_images

Paths = str | tuple[str, ...]
"""Dotted attribute names; of several candidates the first that exists is used."""

WINDOWS = "in most blocks attention stays within windows of the image, in which one register has no place"
"""Why the method does not fit SAM and its kin."""
STAGES = "patches are merged between stages, so that there is no sequence on which a register could ride"
"""Why it does not fit Swin and its kin."""


class Layout(Protocol):
    """What a row is told of where the tokens of a forward lie, and where the registers go among them."""

    @property
    def num_registers(self) -> int: ...

    def extend(self, rows: Tensor, dim: int, value: float | Tensor) -> Tensor:
        """`rows` of the tokens along `dim`, with rows of `value` for the registers."""

    def extend_mask(self, mask: Any) -> Any:
        """A mask on attention, in which everyone sees the registers."""

    def validity(self, mask: Any) -> Tensor:
        """Which tokens (B, T+R) a mask on attention shows to anyone: the others are padding."""

    def replace(
        self, *, lengths: list[int] | None = None, valid: Tensor | None = None, patches: Tensor | None = None
    ) -> Self:
        """A copy with other `lengths` of packed images, other `valid` tokens (no padding), or other `patches`."""


L = TypeVar("L", bound=Layout)


class FindLayout(Protocol):
    """Gives the layout of the tokens, from the tower, the layout of a plain batch, and the arguments of a block."""

    def __call__(self, tower: Any, plain: L, arguments: Mapping[str, Any], /) -> L: ...


def run_plainly(tower: Any, images: Tensor) -> Any:
    """Run a tower that takes images (B, 3, h, w) and nothing else."""
    return tower(images)


@dataclass(frozen=True)
class Family:
    """One row of the table: where a family keeps the parts that the method touches.

    A tower is recognised by the name of its class, so that no library need be imported. `testreg.add_family` adds a
    row for a model of your own: `name`, `towers`, `blocks` and `fc2` are enough to patch a plain ViT that has a CLS
    token, with `patch_embed` to draw it too.

    Example:
        >>> mine = testreg.Family(name="mine", towers="MyViT", blocks="blocks", fc2="mlp.2", patch_embed="embed")
    """

    name: str
    towers: Paths
    """Class names of the vision tower: the module that is called with images and owns the blocks."""
    blocks: Paths
    """The ModuleList or Sequential of blocks, in the tower."""
    fc2: Paths
    """The MLP's second linear, in a block; or the norm in front of it. Its *input* channels are the neurons."""
    patch_embed: Paths = ()
    """The convolution that makes patches into tokens, in the tower: its stride is the patch size. Or a linear."""
    positions: Paths = ()
    """The learned position embeddings that are added to the patches, in the tower: a parameter (..., C) or an
    nn.Embedding, the patches' rows last."""
    prefix: int | Callable[[Any], int] = 1
    """Number of tokens in front of the patches (CLS, distillation and trained register tokens)."""
    trained_registers: Callable[[Any], int] = lambda tower: 0
    """How many of these are trained registers: the last."""
    library: str | None = None
    """Top-level package that defines the class; None where the code is vendored (torch.hub) and any package will do."""
    requirements: Paths = ()
    """What the tower must have besides, where several classes of vendored code share a name."""
    scale: Paths = ()
    """LayerScale vector on the MLP's output, in a block."""
    consumers: Paths = ()
    """Another module, in a block, whose first argument is the hidden activation too."""
    fused: Paths = ()
    """One linear, in a block, for attention's output (C) and the hidden activation (H), in this order."""
    parallel: Paths = ()
    """ModuleList of several MLPs that a block runs side by side: `fc2` and `scale` are then paths in each."""
    entry_norm: Paths = ()
    """Norm between the embedding and the first block, in the tower: the zero token passes through it too."""
    attention: Paths = ()
    """Attention module, in a block, if it may return its weights (B, heads, T, T) as the second of its outputs, or if
    gradient checkpointing recomputes the block from within (transformers)."""
    appended: int = 0
    """Number of tokens that a block itself appends, behind the registers, while it attends."""
    bias: Paths = ()
    """Method, in a block, that makes a relative position bias (..., T, T) for attention."""
    bias_count: str = ""
    """Argument of that method that counts the tokens."""
    sequence_first: Callable[[Any], bool] = lambda tower: False
    """True where blocks see (T, B, C)."""
    block_arguments: Mapping[str, Callable[[Any, Layout], Any]] = field(default_factory=dict)
    """Tensors that a block gets beside the tokens, by name, and how they are extended to the registers. Masks are
    known: see `extend.MASKS`."""
    layout: FindLayout | None = None
    """From the tower and a block's arguments, where the tokens lie, e.g. packed in a sequence; None: they are a batch,
    in which what a mask hides from everyone is padding."""
    patch_size: Callable[[Any], tuple[int, int]] | None = None
    """Height and width in pixels of a tower's patches, where the stride of `patch_embed` does not tell."""
    grid: Callable[[Any, int, int], tuple[int, int]] | None = None
    """Rows and columns of patches of an image of a height and width, where the tower pads images to whole patches."""
    run: Callable[[Any, Tensor], Any] | None = run_plainly
    """Runs the tower on images (B, 3, h, w), of any size if it can, or on clips (B, frames, 3, h, w); None where nobody
    has written how: it can be patched then, but not calibrated."""
    takes: Literal["images", "clips", "packed images"] = "images"
    """What the tower takes. Packed images are a batch for `run` too, but one sequence for the blocks. Clips and packed
    images are diagnosed and calibrated on, but not drawn."""
    separate: Callable[[Any, Mapping[str, Any]], list[Tensor]] = separate_images
    """From the tower's configuration and what its processor returns, the images (3, h, w) or clips (frames, 3, h, w)
    that `run` takes, one by one."""
    order: Callable[[Any, int, int], Tensor] | None = None
    """Of the tower, and rows and columns of patches: where in an image's sequence the patches are, row by row, (N,).
    None: they come row by row."""
    keeps_shape: bool = False
    """Whether its processor keeps the shape of images, so that one batch may not fit all."""
    frames_apart: bool = False
    """Whether each frame of a clip is a sequence of its own: blocks see (B * frames, T, C)."""
