"""Static registers, and the safetensors file that holds them.

*Registers* are the extra tokens of a patched model, onto which the activations of register neurons are moved. They are
*static* if their states are constants, and are not computed from the image.

Shapes: L blocks, R registers, C width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from testreg.families import Tower, compare_weights
from testreg.files import check_format, plain, regular_file, replacing, shown
from testreg.neurons import RegisterNeurons
from testreg.records.options import Start

FORMAT = "testreg-static"
VERSION = 1
SUFFIX = ".static.safetensors"
_KEYS = {"format", "version", "neurons", "form", "start", "model", "images"}

Form = Literal["token", "bias"]
"""What static registers are in a model, see `StaticRegisters.form`."""


@dataclass(frozen=True, eq=False, repr=False)
class StaticRegisters:
    """The states in which registers enter each block, averaged over images: constants (arXiv 2506.08010, A.2).

    `testreg.make_static` makes them. With `testreg.patch(model, neurons, static=...)` they take the place of the
    registers that a patched model computes. They fit only the weights and the register neurons that they were made
    with.

    Example:
        >>> static = testreg.make_static(model, images, neurons, progress=False)
        >>> static
        StaticRegisters: 1 register for 4 blocks of width 48, as tokens
          of timm:vit_base_patch16_clip_224...: 4 neurons
          means over 45 images of Tensor at 64 x 64
        >>> static.save("neurons.json")  # beside it: neurons.static.safetensors
        >>> testreg.StaticRegisters.load("neurons.json").states.equal(static.states)
        True

    Raises:
        ValueError: the states have another shape, or are not finite; the form is unknown.
    """

    states: Tensor
    """The state of each register in the input of each block, (L, R, C), float32."""
    neurons: Mapping[int, Sequence[int]]
    """The register neurons, {block: units}."""
    form: Form = "token"
    """"token": each block gets R extra tokens with these states. "bias": each attention gets a key and a value that are
    computed from the state, and there is no token. This needs nn.MultiheadAttention, and R = 1."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint, as in `RegisterNeurons.model`."""
    images: Mapping[str, Any] = field(default_factory=dict)
    """The images over which the states were averaged: their number, source and size in pixels."""
    start: Start = "zeros"
    """How the averaged registers started: as "zeros" in block 0, or as the "mean" of their image's patches in the first
    block that has register neurons. In front of that block, states are zeros that are not used."""

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or not self.states.numel() or not self.states.is_floating_point():
            raise ValueError(
                f"the states of registers are (L, R, C), got {self.states.dtype} {tuple(self.states.shape)}"
            )
        if self.states.device.type != "meta" and not self.states.isfinite().all():
            raise ValueError("the states of registers are not all finite")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be 'token' or 'bias', got {shown(self.form)}")
        if self.start not in get_args(Start):
            raise ValueError(f"start must be 'zeros' or 'mean', got {shown(self.start)}")

    def __repr__(self) -> str:
        depth, count, width = self.states.shape
        form = "as tokens" if self.form == "token" else "as a key and a value in each attention"
        neurons, name = sum(map(len, self.neurons.values())), plain(self.model.get("name", "an unknown checkpoint"))
        size = " x ".join(map(str, self.images.get("image_size") or ()))
        lines = [
            f"{type(self).__name__}: {count} register{'s' * (count != 1)} for {depth} blocks of width {width}, {form}",
            f"of {name}: {neurons} neurons",
        ]
        if number := self.images.get("number"):
            at = f" at {size}" if size else ""
            lines.append(f"means over {number} images of {plain(self.images.get('source', 'unknown'))}{at}")
        return "\n  ".join(lines)

    @property
    def digest(self) -> str:
        """A short hash of the states."""
        return hashlib.sha256(self.states.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    @property
    def num_registers(self) -> int:
        """The number of registers, R."""
        return self.states.shape[1]

    def check_fits(self, tower: Tower, neurons: RegisterNeurons, num_registers: int, start: Start) -> None:
        """Raise ValueError unless the states fit this tower, and these neurons, number of registers and start."""
        depth, num_static, width = self.states.shape
        expected = tower.depth, tower.width
        if (depth, width) != expected:
            raise ValueError(
                f"these static registers are for {depth} blocks of width {width}, and this model has {expected[0]} of "
                f"{expected[1]}"
            )
        if num_static != num_registers:
            raise ValueError(
                f"there are {num_static} static registers: pass num_registers={num_static}, got {num_registers}"
            )
        if start != self.start:
            raise ValueError(f"these static registers are of registers with start={self.start!r}, not {start!r}")
        if compare_weights(str(self.model.get("fingerprint")), tower) == "other":
            raise ValueError(
                f"these static registers are of {plain(self.model.get('name', 'another checkpoint'))}, whose weights "
                "are not those of this model: make them with testreg.make_static(model, images)"
            )
        if _sorted(self.neurons) != _sorted(neurons.by_block()):
            raise ValueError(
                "these static registers were made with other register neurons than those given: make them anew with "
                "testreg.make_static(model, images, neurons)"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file. An existing file is replaced only once the new one is complete.

        The path of a neuron JSON, such as `neurons.json`, stands for the file `neurons.static.safetensors` beside it.
        """
        description = {
            "format": FORMAT,
            "version": VERSION,
            "form": self.form,
            "start": self.start,
            "neurons": {str(block): list(units) for block, units in self.neurons.items()},
            "model": dict(self.model),
            "images": dict(self.images),
        }
        with replacing(companion(path)) as temporary:
            save_file({"states": self.states.contiguous()}, temporary, {FORMAT: json.dumps(description)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StaticRegisters:
        """Read a file that `save` has written; `path` is understood as in `save`.

        Raises:
            OSError: there is no such file, or it is not a regular file.
            ValueError: the file is damaged, or has no static registers.
        """
        file = regular_file(companion(path))
        source = plain(file, longest=None)
        try:
            with safe_open(file, "pt") as opened:
                text, names = (opened.metadata() or {}).get(FORMAT, "null"), opened.keys()
                states = opened.get_tensor("states") if "states" in names else torch.empty(0)
            data = check_format(
                json.loads(text), FORMAT, VERSION, _KEYS, source=source, expected="a file of static registers"
            )
            neurons = {int(block): [int(unit) for unit in units] for block, units in data["neurons"].items()}
            return cls(
                states,
                neurons,
                data["form"],
                model=dict(data["model"]),
                images=dict(data["images"]),
                start=data.get("start", "zeros"),
            )
        except SafetensorError as error:
            raise ValueError(f"{source} is damaged or truncated: {error}") from None
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{source} is no valid file of static registers: {plain(error)}") from None


AnyStatic = StaticRegisters | str | os.PathLike[str] | None
"""What `testreg.patch` takes as static registers: the registers, the path of their file, or None for none."""


def resolve_static(static: AnyStatic) -> StaticRegisters | None:
    """The static registers that the argument `static` of `patch` stands for.

    Raises OSError, TypeError or ValueError if the argument is not valid.
    """
    if static is None or isinstance(static, StaticRegisters):
        return static
    if not isinstance(static, str | os.PathLike):
        raise TypeError(f"static must be a StaticRegisters, a path or None, got {type(static).__name__}")
    return StaticRegisters.load(static)


def companion(path: str | os.PathLike[str]) -> Path:
    """The file of static registers that a path stands for: the file beside a neuron JSON, or else the path itself."""
    file = Path(path)
    return file.with_suffix(SUFFIX) if file.suffix == ".json" else file


def _sorted(neurons: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """The neurons with sorted units, without blocks that have none, so that two lists can be compared."""
    return {block: sorted(units) for block, units in neurons.items() if units}
