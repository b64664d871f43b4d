"""The registry: every architecture that is checked, built with random weights and without a download."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

MODULES = ("timm_models", "open_clip_models", "transformers_models", "others")


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


@functools.cache
def registry() -> dict[tuple[str, str], Architecture]:
    """All architectures, by library and name."""
    known: dict[tuple[str, str], Architecture] = {}
    for module in MODULES:
        for each in importlib.import_module(f"coverage.{module}").architectures():
            assert known.setdefault((each.library, each.name), each) is each, f"two are called {each.name}"
    return known


def label(name: str, options: Mapping[str, Any]) -> str:
    """The name, and the options that set a model apart from others of that name."""

    def word(value: Any) -> str:
        if isinstance(value, functools.partial):  # a block class, and what is pre-set on it
            return f"{value.func.__name__}({', '.join(value.keywords)})"
        return getattr(value, "__name__", str(value))

    return ", ".join([name, *(f"{option}={word(value)}" for option, value in options.items())])


def image(number: int, height: int, width: int | None = None) -> Tensor:
    """The random image (3, h, w) of this number: the same one in whatever batch it is."""
    return torch.randn(3, height, width or height, generator=torch.Generator().manual_seed(number))


def images(numbers: Sequence[int], height: int, width: int | None = None) -> Tensor:
    """A batch (B, 3, h, w) of random images."""
    return torch.stack([image(number, height, width) for number in numbers])


def padded_patches(pictures: Iterable[Tensor], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of different sizes as patches (B, N, p * p * 3), padded to the longest.

    Returns:
        The patches; their rows and columns (B, N, 2), -1 where there is none; and which of them (B, N) there are.
    """
    patches, places = [], []
    for picture in pictures:
        cut, (rows, columns) = batch_patchify(picture[None], (side, side))
        patches.append(cut[0])
        places.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)))
    positions = pad_sequence(places, batch_first=True, padding_value=-1)
    return pad_sequence(patches, batch_first=True), positions, (positions >= 0).all(-1)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters.

    Libraries start layer scales at 1e-5, and biases, position tables and class tokens at zero: a block would add next
    to nothing, and a part that is handled wrongly would not be seen in the outputs. CoCa leaves one matrix as it found
    it in memory.
    """
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter += 0.3 * torch.randn_like(parameter)
        elif parameter.numel():
            fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            parameter.normal_(std=fan_in**-0.5)
    return model
