"""A vision tower that was found in a model, and the parts of it that the method touches."""

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
"""Rows and columns of an image's patches; of a clip's, how many there are in time, rows and columns."""


def convolved(embedding: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of what a convolution makes of an image: its patches overlap if the stride was made smaller."""
    padding = (0, 0) if isinstance(embedding.padding, str) else embedding.padding
    rows, columns = (
        1 + (pixels + 2 * padding[i] - embedding.kernel_size[i]) // embedding.stride[i]
        for i, pixels in enumerate((height, width))
    )
    return rows, columns


@dataclass(frozen=True)
class Mlp:
    """An MLP of a block."""

    fc2: nn.Module
    """Takes the hidden activation (B, T, H): the second linear, or the norm in front of it."""
    fc2_linear: nn.Linear
    """The second linear itself."""
    first: int
    """Input channel of `fc2` that is neuron 0: above 0 if attention's output (C) comes in front."""
    module: nn.Module | None
    """Holds `fc2` and maps (..., C) to (..., C); None where the block keeps no such module."""
    scale: nn.Parameter | None
    consumers: tuple[nn.Module, ...]
    """Whatever takes the hidden activation as its first argument: `fc2`, and in a mixture the experts."""

    @property
    def width(self) -> int:
        """H, the number of neurons."""
        return self.fc2_linear.in_features - self.first

    @property
    def columns(self) -> Tensor:
        """(C, H): `columns[:, unit]` is what a neuron writes, before LayerScale."""
        weight = self.fc2_linear.weight
        return weight[:, self.first :] if self.first else weight


@dataclass(frozen=True)
class Block:
    """One transformer block of a tower, with the parts of it that the method touches."""

    module: nn.Module
    mlps: tuple[Mlp, ...]
    """One MLP, or several side by side, whose neurons are numbered through."""
    attention: nn.Module | None
    bias: tuple[nn.Module, str] | None
    """Module and name of the method that makes a relative position bias, if there is one."""

    @property
    def width(self) -> int:
        """H, the neurons of all its MLPs."""
        return sum(mlp.width for mlp in self.mlps)

    def units_by_mlp(self, units: Sequence[int]) -> Iterator[tuple[Mlp, dict[int, int]]]:
        """Each MLP that has some of the block's `units`, with these: {unit of the block: unit of the MLP}."""
        first = 0
        for mlp in self.mlps:
            if own := {unit: unit - first for unit in units if first <= unit < first + mlp.width}:
                yield mlp, own
            first += mlp.width


@dataclass(frozen=True)
class Tower:
    """A vision tower found in a model: `family` applied to `module`."""

    family: Family
    path: str
    """Name of the tower inside the model that was searched; "" if it is the model."""
    module: nn.Module
    blocks: tuple[Block, ...]
    num_prefix: int
    """P, the tokens in front of the patches."""
    embedding: nn.Conv2d | nn.Conv3d | nn.Linear | None
    """The convolution that makes patches into tokens, if there is one."""
    entry_norm: nn.Module | None
    sequence_first: bool
    """Whether the blocks see (T, B, C)."""

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm behind the blocks, which the tower calls on all tokens or on what it pools; None if there is none.

        Of several, it is the one nested least, and of these the one that comes first among the modules.
        """
        inside = {module for block in self.blocks for module in block.module.modules()}
        behind, norms = False, list[tuple[int, nn.Module]]()
        for name, module in self.module.named_modules():
            behind |= module is self.blocks[0].module
            shape = getattr(getattr(module, "weight", None), "shape", None)
            if behind and module not in inside and "Norm" in type(module).__name__ and shape == (self.width,):
                norms.append((name.count("."), module))
        return min(norms, key=lambda each: each[0])[1] if norms else None

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def width(self) -> int:
        """C, the channels of a token."""
        return self.blocks[0].mlps[0].fc2_linear.out_features

    @property
    def mlp_width(self) -> int:
        """H, the number of neurons of a block."""
        return self.blocks[0].width

    def run(self, images: Tensor) -> Any:
        """What the tower gives for images (B, 3, h, w), or clips (B, frames, 3, h, w), which are brought to its device
        and dtype.

        Raises:
            ValueError: it does not take a batch of these, or makes other tokens of them than its grid of patches.
        """
        if self.family.run is None:
            self.check_runs()
        assert self.family.run is not None
        if self.family.takes == "clips" and images.ndim != 5:
            raise self.takes_no_images()
        with self._checking_tokens(images):
            return self.family.run(self.module, images.to(self.device, self.dtype))

    def check_runs(self) -> None:
        """Raise ValueError unless the tower takes a batch of images, and its maps can be drawn."""
        if self.family.run is None or self.family.takes != "images":
            raise self.takes_no_images()

    def takes_no_images(self) -> ValueError:
        """The error to raise where it is given images, or is to be drawn."""
        does = {
            "images": "so testreg cannot run it by itself: neither calibrate nor draw it. It can be patched with given "
            "neurons",
            "clips": f"but clips (B, {self.num_frames}, 3, h, w): testreg diagnoses, calibrates and patches it, and "
            "draws no maps of it",
            "packed images": "but packs them in one sequence: testreg diagnoses, calibrates and patches it, and draws "
            "no maps of it",
        }
        name = f"{type(self.module).__name__} ({self.family.name})"
        return ValueError(f"{name} takes no batch of images (B, 3, h, w), {does[self.family.takes]}")

    @property
    def num_frames(self) -> int | None:
        """The frames of a clip; None of a tower that takes images."""
        return self.module.config.num_frames if self.family.takes == "clips" else None  # type: ignore

    def separate(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """What a processor of transformers returns, as the images (3, h, w) or clips that it is of, one by one."""
        return self.family.separate(getattr(self.module, "config", None), inputs)

    def run_with_head(self, images: Tensor) -> Any:
        """The same, and the head that follows the blocks, which `run` may leave out."""
        if self.family.run is None or not hasattr(self.module, "forward_head"):
            return self.run(images)
        with self._checking_tokens(images):
            return self.module(images.to(self.device, self.dtype))

    @contextmanager
    def _checking_tokens(self, images: Tensor) -> Iterator[None]:
        """Within the context, block 0 refuses tokens that are not those of the prefix and the grid of the images."""

        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else next(iter(kwargs.values()))
            if not isinstance(tokens, Tensor):
                return
            grid, number = self.sequence_grid(images), self._num_sequences(images)
            seen, expected = tokens.numel() // tokens.shape[-1], number * (self.num_prefix + math.prod(grid))
            if seen != expected:
                height, width = images.shape[-2:]
                raise ValueError(
                    f"{type(self.module).__name__} makes {seen} tokens of {number} images of {height} x {width} "
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
        """Within the block the tower is in eval mode."""
        training = {module: module.training for module in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training[self.module])
            for module, was_training in training.items():  # a part of it may have been frozen
                module.training = was_training

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """The weight that meets the images first: a tower may be of mixed precision."""
        if self.embedding is not None:
            return self.embedding.weight
        return next(each for each in self.module.parameters() if each.is_floating_point())

    @property
    def num_trained_registers(self) -> int:
        """How many of the prefix tokens are trained registers: the last."""
        return self.family.trained_registers(self.module)

    def batch_first(self, tokens: Tensor) -> Tensor:
        """What the blocks see, or a part of it, as (B, T, ...): a view."""
        return tokens.transpose(0, 1) if self.sequence_first else tokens

    def arranged(self, tokens: Tensor, images: Tensor) -> Tensor:
        """The tokens (..., C) of a batch of images or clips, as blocks or a part of them see them, as (B, T, C).

        Behind the prefix are the patches as they lie in the grid, and behind these registers and whatever else. Of a
        clip whose frames are sequences of their own, the prefix is the mean over the frames.
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
        """Where in the sequence of an image the patches are, row by row (N,); None if they come so."""
        if self.family.order is None:
            return None
        rows, columns = self.grid(images)
        return self.family.order(self.module, rows, columns).to(self.device)

    def _num_sequences(self, images: Tensor) -> int:
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
        """Rows and columns of patches of images (..., h, w); of clips (..., frames, 3, h, w), how many there are in
        time, rows and columns."""
        in_space = self.rows_and_columns(images)
        return in_space if self.family.takes != "clips" else (images.shape[-4] // self.frames_per_patch, *in_space)

    def sequence_grid(self, images: Tensor) -> Grid:
        """The same of one sequence that the blocks see: of an image, of a clip, or of a frame if these are apart."""
        grid = self.grid(images)
        return grid[1:] if self.family.frames_apart else grid

    @property
    def frames_per_patch(self) -> int:
        """How many frames of a clip a patch is of."""
        return self.embedding.stride[0] if isinstance(self.embedding, nn.Conv3d) else 1

    def rows_and_columns(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (..., h, w), or of the frames of clips."""
        height, width = images.shape[-2:]
        if self.family.grid is not None:
            return self.family.grid(self.module, height, width)
        if isinstance(self.embedding, nn.Conv2d) and self.family.patch_size is None:
            return convolved(self.embedding, height, width)
        rows, columns = self.patch_size
        return height // rows, width // columns

    def patches(self, images: Tensor) -> slice:
        """The tokens that are patches, without prefix and registers."""
        return slice(self.num_prefix, self.num_prefix + math.prod(self.grid(images)))
