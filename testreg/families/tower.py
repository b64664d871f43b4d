"""`Tower`: a vision transformer that was found in a model, with its blocks, MLPs, and what is needed to run it.

A family is a kind of tower. testreg knows a table of families; a family's row in it is a `Family`.

Shapes: B batch, T tokens, C width of a token, H neurons (hidden channels of an MLP), N patches, P prefix tokens (CLS
and trained registers, in front of the patches).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.family import Family

Grid = tuple[int, ...]
"""How an image's patches are arranged, as (rows, columns); or a clip's, as (steps in time, rows, columns)."""


def convolved(embedding: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a convolution's output for an image. (If its stride is small, patches overlap.)"""
    padding = (0, 0) if isinstance(embedding.padding, str) else embedding.padding
    rows, columns = (
        1 + (pixels + 2 * padding[i] - embedding.kernel_size[i]) // embedding.stride[i]
        for i, pixels in enumerate((height, width))
    )
    return rows, columns


@dataclass(frozen=True)
class Mlp:
    """An MLP of a block. Its neurons are the channels of the hidden activation, the input of its second linear."""

    fc2: nn.Module
    """The module whose input is the hidden activation (B, T, H): the second linear, or the norm in front of it."""
    fc2_linear: nn.Linear
    """The second linear."""
    first: int
    """The input channel of `fc2` that is neuron 0. It is C if one linear takes the concatenation of attention's output
    (C channels) and the hidden activation (H channels); otherwise 0."""
    module: nn.Module | None
    """The whole MLP, which maps (..., C) to (..., C); None if the block has no module that can be called for that."""
    scale: nn.Parameter | None
    """The LayerScale vector (C,) on the MLP's output, if there is one."""
    consumers: tuple[nn.Module, ...]
    """All modules whose first argument is the hidden activation: `fc2`, and the experts of a mixture of experts."""

    @property
    def width(self) -> int:
        """H, the number of neurons."""
        return self.fc2_linear.in_features - self.first

    @property
    def columns(self) -> Tensor:
        """The weight (C, H) of the second linear: a neuron adds `columns[:, unit]` times its activation (normed, if a
        norm is in front) to the linear's output."""
        weight = self.fc2_linear.weight
        return weight[:, self.first :] if self.first else weight


@dataclass(frozen=True)
class Block:
    """One transformer block of a tower."""

    module: nn.Module
    mlps: tuple[Mlp, ...]
    """The block's MLP, or several in parallel. A neuron's index in the block, its unit, counts on from MLP to MLP."""
    attention: nn.Module | None
    """The attention module, if the family's row names it."""
    bias: tuple[nn.Module, str] | None
    """The module and the name of its method that makes a relative position bias, if there is one."""

    @property
    def width(self) -> int:
        """H, the number of neurons in all MLPs of the block."""
        return sum(mlp.width for mlp in self.mlps)

    def units_by_mlp(self, units: Sequence[int]) -> Iterator[tuple[Mlp, dict[int, int]]]:
        """Yield each MLP that has some of these neurons, with {number in the block: number in the MLP}."""
        first = 0
        for mlp in self.mlps:
            if own_units := {unit: unit - first for unit in units if first <= unit < first + mlp.width}:
                yield mlp, own_units
            first += mlp.width


@dataclass(frozen=True)
class Tower:
    """A vision transformer found in a model, and its parts. `testreg.families.find_tower` makes it."""

    family: Family
    """The row of the table of families that describes this kind of tower."""
    path: str
    """The dotted name of the tower in the model that was searched; "" if the model is the tower."""
    module: nn.Module
    blocks: tuple[Block, ...]
    num_prefix: int
    """P, the number of tokens in front of the patches."""
    embedding: nn.Conv2d | nn.Conv3d | nn.Linear | None
    """The convolution or linear that makes tokens of patches, if the family's row names it."""
    entry_norm: nn.Module | None
    """The norm between the embedding and the first block, if there is one."""
    sequence_first: bool
    """Whether the blocks get tokens as (T, B, C) instead of (B, T, C)."""

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last block, which the tower applies to all tokens or to pooled ones; None if none.

        It is found by its place and shape: a module that is listed after the first block among the tower's modules, is
        in no block, has "Norm" in its class name, and a weight (C,). Of several such modules, it is the least nested
        one, and the first of these.
        """
        inside = {module for block in self.blocks for module in block.module.modules()}
        is_behind_blocks, norms = False, list[tuple[int, nn.Module]]()
        for name, module in self.module.named_modules():
            is_behind_blocks |= module is self.blocks[0].module
            shape = getattr(getattr(module, "weight", None), "shape", None)
            if is_behind_blocks and module not in inside and "Norm" in type(module).__name__ and shape == (self.width,):
                norms.append((name.count("."), module))
        return min(norms, key=lambda each: each[0])[1] if norms else None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """C, the channels of a token."""
        return self.blocks[0].mlps[0].fc2_linear.out_features

    @property
    def mlp_width(self) -> int:
        """H, the number of neurons in each block."""
        return self.blocks[0].width

    def run(self, images: Tensor) -> Any:
        """Run the tower on images (B, 3, h, w) or clips (B, frames, 3, h, w), and return its output.

        The images are moved to the tower's device and dtype first.

        Raises:
            ValueError: the tower does not take such a batch, or it makes another number of tokens than `grid` says.
        """
        if self.family.run is None:
            self.check_runs()
        assert self.family.run is not None
        if self.family.takes == "clips" and images.ndim != 5:
            raise self.no_images_error()
        with self._checking_tokens(images):
            return self.family.run(self.module, images.to(self.device, self.dtype))

    def check_runs(self) -> None:
        """Raise ValueError unless the tower takes a batch of images, so that its maps can be drawn."""
        if self.family.run is None or self.family.takes != "images":
            raise self.no_images_error()

    def no_images_error(self) -> ValueError:
        """The error to raise if the tower takes no batch of images, but should be run on one or drawn."""
        explanation = {
            "images": "so testreg cannot run it by itself: neither calibrate nor draw it. It can be patched with given "
            "neurons",
            "clips": f"but clips (B, {self.num_frames}, 3, h, w): testreg diagnoses, calibrates and patches it, and "
            "draws no maps of it",
            "packed images": "but packs them in one sequence: testreg diagnoses, calibrates and patches it, and draws "
            "no maps of it",
        }
        name = f"{type(self.module).__name__} ({self.family.name})"
        return ValueError(f"{name} takes no batch of images (B, 3, h, w), {explanation[self.family.takes]}")

    @property
    def num_frames(self) -> int | None:
        """The number of frames of a clip; None if the tower takes images."""
        return self.module.config.num_frames if self.family.takes == "clips" else None  # type: ignore

    def separate(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The images (3, h, w) or clips (frames, 3, h, w), one by one, in what a processor of transformers returns."""
        return self.family.separate(getattr(self.module, "config", None), inputs)

    def run_with_head(self, images: Tensor) -> Any:
        """The same as `run`, but also with the head that follows the blocks, which `run` may leave out."""
        if self.family.run is None or not hasattr(self.module, "forward_head"):
            return self.run(images)
        with self._checking_tokens(images):
            return self.module(images.to(self.device, self.dtype))

    @contextmanager
    def _checking_tokens(self, images: Tensor) -> Iterator[None]:
        """Within the `with` block, block 0 raises ValueError unless it gets P + N tokens for each sequence."""

        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(tokens, Tensor):
                return
            grid, number = self.sequence_grid(images), self._num_sequences(images)
            num_tokens, expected = tokens.numel() // tokens.shape[-1], number * (self.num_prefix + math.prod(grid))
            if num_tokens != expected:
                height, width = images.shape[-2:]
                raise ValueError(
                    f"{type(self.module).__name__} makes {num_tokens} tokens of {number} images of {height} x {width} "
                    f"pixels, and its patch embedding says {expected}: {self.num_prefix} prefix tokens and a grid of "
                    f"{' x '.join(map(str, grid))} for each. Its embedding was changed in a way that testreg does not "
                    "know, so that tokens cannot be laid out as a map"
                )

        handle = self.blocks[0].module.register_forward_pre_hook(check, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the `with` block, the tower is in eval mode; then each module gets back the mode that it had."""
        training = {module: module.training for module in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training[self.module])
            for module, was_training in training.items():  # some modules may have been in eval mode before
                module.training = was_training

    @property
    def device(self) -> torch.device:
        """The device of the first weight that images meet."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first weight that images meet."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """The first weight that images meet. Images need its dtype; others may differ in a tower of mixed precision."""
        if self.embedding is not None:
            return self.embedding.weight
        return next(each for each in self.module.parameters() if each.is_floating_point())

    @property
    def num_trained_registers(self) -> int:
        """How many of the prefix tokens are trained registers. They are the last ones of the prefix."""
        return self.family.trained_registers(self.module)

    def batch_first(self, tokens: Tensor) -> Tensor:
        """Tokens as blocks get or return them, viewed as (B, T, ...)."""
        return tokens.transpose(0, 1) if self.sequence_first else tokens

    def arranged(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The tokens (B, T, C) of a batch of images or clips, from tokens (..., C) as blocks or their parts get them.

        The order is: the prefix, the patches row by row, then all others, e.g. test-time registers. For a clip whose
        frames are separate sequences, the prefix is the mean over the frames, and others are left out.
        """
        tokens = self.batch_first(tokens)
        if self.family.frames_apart:
            number = math.prod(self.sequence_grid(images))
            frames = tokens.unflatten(0, (len(images), -1))  # (B, frames, T, C)
            prefix, patches, _ = frames.split([self.num_prefix, number, frames.shape[2] - self.num_prefix - number], 2)
            return torch.cat([prefix.mean(1), patches.flatten(1, 2)], 1)
        if self.family.takes == "packed images":
            tokens = tokens.reshape(len(images), -1, tokens.shape[-1])
        if (order := self.order(images)) is not None:
            tokens = torch.cat([tokens[:, order], tokens[:, len(order) :]], 1)
        return tokens

    def order(self, images: Tensor) -> Tensor | None:
        """The indices (N,) of the patches in an image's sequence, row by row; None if the sequence has this order."""
        if self.family.order is None:
            return None
        rows, columns = self.grid(images)
        return self.family.order(self.module, rows, columns).to(self.device)

    def _num_sequences(self, images: Tensor) -> int:
        """The number of sequences that the blocks get: one for each image or clip, or for each frame of each clip."""
        return len(images) * images.shape[1] if self.family.frames_apart else len(images)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        if self.family.patch_size is not None:
            return self.family.patch_size(self.module)
        if not isinstance(self.embedding, nn.Conv2d | nn.Conv3d):
            raise ValueError(f"the row of {self.family.name} says neither patch_embed, a convolution, nor patch_size")
        *_, rows, columns = self.embedding.stride
        return rows, columns

    def grid(self, images: Tensor) -> Grid:
        """How the patches of each image (..., h, w) or clip (..., frames, 3, h, w) are arranged, see `Grid`."""
        in_space = self.rows_and_columns(images)
        return in_space if self.family.takes != "clips" else (images.shape[-4] // self.frames_per_patch, *in_space)

    def sequence_grid(self, images: Tensor) -> Grid:
        """How the patches of one of the blocks' sequences are arranged: `grid`, or that of a frame if each frame of a
        clip is a separate sequence."""
        grid = self.grid(images)
        return grid[1:] if self.family.frames_apart else grid

    @property
    def frames_per_patch(self) -> int:
        """How many frames of a clip one patch covers."""
        return self.embedding.stride[0] if isinstance(self.embedding, nn.Conv3d) else 1

    def rows_and_columns(self, images: Tensor) -> tuple[int, int]:
        """The rows and columns of patches in images (..., h, w), or in each frame of clips."""
        height, width = images.shape[-2:]
        if self.family.grid is not None:
            return self.family.grid(self.module, height, width)
        if isinstance(self.embedding, nn.Conv2d) and self.family.patch_size is None:
            return convolved(self.embedding, height, width)
        rows, columns = self.patch_size
        return height // rows, width // columns

    def patches(self, images: Tensor) -> slice:
        """The slice of tokens, in the order of `arranged`, that are patches: behind the prefix, before all others."""
        return slice(self.num_prefix, self.num_prefix + math.prod(self.grid(images)))
