"""Small numbers by simulation: what each linear reads is rounded to few values, and computed with as float.

Registers are rounded in the same tensor as all tokens, or apart from them, with a range of their own, or not at all.
Constants that are not rounded are the same as keys and values in front of each attention, held in float.

Shapes: B images, T tokens, R registers behind these, C channels of a linear's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

PLAIN = "plain"  # the name of the network as it is
PERCENTILE = 99.99
Scale = Literal["largest", "percentile", "image", "token"]
SCALES: Mapping[Scale, str] = {
    "largest": "static: one for a tensor, up to the largest value on other photographs",
    "percentile": f"static: one for a tensor, up to the {PERCENTILE}th percentile of an image, mean over the others",
    "image": "dynamic: one for a tensor of one image",
    "token": "dynamic: one for a token",
}

Place = Literal["together", "apart", "float"]
"""Where registers are: in one tensor with all tokens, in one of their own, or in none that is rounded."""


@dataclass(frozen=True)
class Network:
    """A network, and what becomes of its registers when it is quantised."""

    model: nn.Module
    registers: int = 0
    """The last tokens that linears read."""
    place: Place = "together"
    before_registers: frozenset[str] = frozenset()
    """The names of the linears in blocks that registers do not enter."""


Ranges = Mapping[str, Mapping[Scale, tuple[Tensor, Tensor]]]
"""Of each linear by its name, of each static scale: the least and the largest value."""


@dataclass(frozen=True)
class Setting:
    """How a network is quantised."""

    bits: int
    scale: Scale | None
    """None leaves activations as they are."""
    symmetric: bool = False
    """Whether the range is that of the largest magnitude, to both sides of 0."""
    weights: bool = False
    """Whether weights have as few bits, symmetric, with a scale for each output channel."""

    @property
    def name(self) -> str:
        what = {"activations": self.scale is not None, "weights": self.weights}
        said = f"{self.bits} bit {' and '.join(name for name, is_so in what.items() if is_so)}"
        return said if self.scale is None else f"{said}, {self.scale}, {'' if self.symmetric else 'a'}symmetric"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def reading(network: Network, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Within the context linears read what `change` makes of their name and input."""
    place = network.place

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
        def changed(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            (tokens,) = inputs
            count = 0 if name in network.before_registers else network.registers
            if not count or place == "together" or tokens.ndim < 3:
                return change(name, tokens)
            tokens, registers = tokens[:, :-count], tokens[:, -count:]
            registers = change(f"{name}, registers", registers) if place == "apart" else registers
            return torch.cat([change(name, tokens).to(registers.dtype), registers], 1)

        return changed

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears(network.model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ranges_of(network: Network, run: Callable[[], object]) -> Ranges:
    """The static ranges of all linears over what `run` has the model read."""
    seen: dict[str, list[Tensor]] = {}

    def look(name: str, tokens: Tensor) -> Tensor:
        values = tokens.detach().float().flatten(1)
        tail = max(1, round(values.shape[1] * (1 - PERCENTILE / 100)))
        high, low = values.topk(tail).values, -(-values).topk(tail).values
        seen.setdefault(name, []).append(torch.stack([low[:, 0], high[:, 0], low[:, -1], high[:, -1]]))
        return tokens

    with reading(network, look):
        run()
    found: dict[str, dict[Scale, tuple[Tensor, Tensor]]] = {}
    for name, parts in seen.items():
        low, high, low_percentile, high_percentile = torch.cat(parts, 1)
        found[name] = {
            "largest": (low.min(), high.max()),
            "percentile": (low_percentile.mean(), high_percentile.mean()),
        }
    return found


@contextmanager
def quantised(network: Network, setting: Setting, ranges: Ranges) -> Iterator[None]:
    """Within the context the model computes with small numbers."""

    def change(name: str, tokens: Tensor) -> Tensor:
        rows = tokens.float().flatten(0, -2) if setting.scale == "token" else tokens.float().flatten(1)
        if setting.scale in ("image", "token"):
            low, high = rows.aminmax(dim=1)
        else:
            low, high = (bound.expand(len(rows)) for bound in ranges[name][setting.scale])
        return rounded(rows, low, high, setting).view(tokens.shape)

    kept: dict[nn.Linear, Tensor] = {}
    if setting.weights:
        for linear in linears(network.model).values():
            kept[linear] = linear.weight.data
            low, high = linear.weight.data.aminmax(dim=1)
            linear.weight.data = rounded(linear.weight.data, low, high, Setting(setting.bits, None, symmetric=True))
    try:
        if setting.scale is None:
            yield
        else:
            with reading(network, change):
                yield
    finally:
        for linear, weight in kept.items():
            linear.weight.data = weight


def rounded(rows: Tensor, low: Tensor, high: Tensor, setting: Setting) -> Tensor:
    """Rows (n, k), each with the values that a range of its own (n,) leaves it; 0 is one of them."""
    if setting.symmetric:
        least, largest = -(2 ** (setting.bits - 1)), 2 ** (setting.bits - 1) - 1
        low, high = torch.zeros_like(low), torch.maximum(low.abs(), high.abs())
    else:
        least, largest = 0, 2**setting.bits - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / largest).clamp(min=torch.finfo(torch.float32).eps)
    return torch.fake_quantize_per_channel_affine(rows, scale, (-low / scale).round().int(), 0, least, largest)
