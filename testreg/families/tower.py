"""A vision tower that was found in a model, and the parts of it that the method touches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.family import Family


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
    embedding: nn.Conv2d | nn.Linear | None
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
        """What the tower gives for images (B, 3, h, w), which are brought to its device and dtype.

        Raises:
            ValueError: it does not take a batch of images, or makes other tokens of them than its grid of patches.
        """
        self.check_runs()
        assert self.family.run is not None
        with self._checking_tokens(images):
            return self.family.run(self.module, images.to(self.device, self.dtype))

    def check_runs(self) -> None:
        """Raise ValueError unless the tower takes a batch of images."""
        if self.family.run is None:
            raise ValueError(
                f"{type(self.module).__name__} ({self.family.name}) takes no batch of images (B, 3, h, w), so testreg "
                "cannot run it by itself: neither calibrate nor draw it. It can be patched with given neurons"
            )

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
            rows, columns = self.grid(images)
            seen, expected = tokens.numel() // tokens.shape[-1], len(images) * (self.num_prefix + rows * columns)
            if seen != expected:
                height, width = images.shape[-2:]
                raise ValueError(
                    f"{type(self.module).__name__} makes {seen} tokens of {len(images)} images of {height} x {width} "
                    f"pixels, and its patch embedding says {expected}: {self.num_prefix} prefix tokens and a grid of "
                    f"{rows} x {columns} for each. Its embedding was changed in a way that testreg does not know, so "
                    "that tokens cannot be laid out as a map"
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

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        if self.family.patch_size is not None:
            return self.family.patch_size(self.module)
        if not isinstance(self.embedding, nn.Conv2d):
            raise ValueError(f"the row of {self.family.name} says neither patch_embed, a convolution, nor patch_size")
        rows, columns = self.embedding.stride
        return rows, columns

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (..., h, w)."""
        height, width = images.shape[-2:]
        if self.family.grid is not None:
            return self.family.grid(self.module, height, width)
        if isinstance(self.embedding, nn.Conv2d) and self.family.patch_size is None:
            return convolved(self.embedding, height, width)
        rows, columns = self.patch_size
        return height // rows, width // columns

    def patches(self, images: Tensor) -> slice:
        """The tokens that are patches, without prefix and registers."""
        rows, columns = self.grid(images)
        return slice(self.num_prefix, self.num_prefix + rows * columns)
