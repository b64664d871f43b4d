"""Every architecture that `scripts/coverage.py` checks, built with random weights and without a download."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Absent(Exception):
    """The installed release of a library does not have the architecture yet."""


@dataclass(frozen=True)
class Architecture:
    """One model that a user can build by name."""

    library: str
    """timm, open_clip, transformers, torchvision or hub."""
    name: str
    """What the library calls it."""
    build: Callable[[], nn.Module]
    """The model with random weights, at reduced depth and size where the library lets one."""
    run: Callable[[nn.Module, Sequence[int]], Mapping[str, Any]]
    """Every public output of the model for the images of these numbers: name -> tensors, nested in anything."""


def image(number: int, height: int, width: int | None = None) -> Tensor:
    """The random image (3, h, w) of this number: the same one in whatever batch it is."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(3, height, width or height, generator=generator)


def images(numbers: Sequence[int], height: int, width: int | None = None) -> Tensor:
    """A batch (B, 3, h, w) of random images."""
    return torch.stack([image(number, height, width) for number in numbers])


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters.

    Libraries start layer scales at 1e-5, and biases, position tables and class tokens at zero: a block would add next
    to nothing, and a part that is handled wrongly would not be seen in the outputs. CoCa leaves one matrix as it found
    it in memory.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 0:
                continue
            if parameter.ndim < 2:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
                parameter.normal_(std=fan_in**-0.5)
    return model


def every() -> Iterator[Architecture]:
    """All architectures, of all libraries."""
    from architectures import open_clip, others, timm, transformers_vision, transformers_vlm

    for module in (timm, open_clip, transformers_vision, transformers_vlm, others):
        yield from module.architectures()
