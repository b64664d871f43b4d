"""The registry of all architectures that are checked. They are built with random weights, without a download."""

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
    """A model that users can build by name."""

    library: str
    """timm, open_clip, transformers, torchvision or hub."""
    name: str
    """Its name in the library, with options that set it apart."""
    build: Callable[[], nn.Module]
    """Builds the model with random weights, with fewer and smaller blocks if the library allows it."""
    run: Callable[[nn.Module, Sequence[int]], Mapping[str, Any]]
    """Runs the model on the images with these numbers. Returns {name: a public output}, which may be nested."""


@functools.cache
def registry() -> dict[tuple[str, str], Architecture]:
    """All architectures, {(library, name): architecture}."""
    architectures_: dict[tuple[str, str], Architecture] = {}
    for module in MODULES:
        for each in importlib.import_module(f"coverage.{module}").architectures():
            assert architectures_.setdefault((each.library, each.name), each) is each, f"two are called {each.name}"
    return architectures_


def label(name: str, options: Mapping[str, Any]) -> str:
    """The name of a model with its options, in words."""

    def word(value: Any) -> str:
        if isinstance(value, functools.partial):  # a class of blocks with preset arguments
            return f"{value.func.__name__}({', '.join(value.keywords)})"
        return getattr(value, "__name__", str(value))

    return ", ".join([name, *(f"{option}={word(value)}" for option, value in options.items())])


def image(number: int, height: int, width: int | None = None) -> Tensor:
    """The random image (3, h, w) of this number. It is the same in all batches."""
    return torch.randn(3, height, width or height, generator=torch.Generator().manual_seed(number))


def images(numbers: Sequence[int], height: int, width: int | None = None) -> Tensor:
    """A batch (B, 3, h, w) of random images."""
    return torch.stack([image(number, height, width) for number in numbers])


def padded_patches(pictures: Iterable[Tensor], side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images of different sizes as patches of `side` pixels, padded to the largest number of patches.

    Returns:
        The pixels of the patches (B, N, p * p * 3); their rows and columns (B, N, 2), -1 for padding; and which of them
        are no padding (B, N).
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
    """Give every parameter a random value that has an effect on the outputs. Returns the model.

    Libraries initialise layer scales with 1e-5, and biases, position embeddings and class tokens with zero. With these,
    blocks would add next to nothing, and errors would not show in the outputs. (CoCa leaves one matrix uninitialised.)
    """
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter += 0.3 * torch.randn_like(parameter)
        elif parameter.numel():
            fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            parameter.normal_(std=fan_in**-0.5)
    return model
