"""The patch of a tower: what `patch` was told, and the overrides that it put on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from testreg.neurons import RegisterNeurons, shown
from testreg.patching.notices import VerifiedUse
from testreg.patching.override import REFUSALS, Override
from testreg.patching.running import is_recomputing, running

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all"]

MAX_REGISTERS = 256  # as many as an image of 224 pixels has patches

_PATCH = "_testreg_patch"  # attribute of a patched tower
_counting = threading.Lock()  # not on the patch: a lock can be neither copied nor pickled


def check_options(num_registers: int, max_over: str, zero: str) -> None:
    """Raise ValueError unless `patch` can be called with these."""
    if num_registers < 1:
        raise ValueError(f"num_registers must be at least 1, got {num_registers}")
    if num_registers > MAX_REGISTERS:
        raise ValueError(f"num_registers must be at most {MAX_REGISTERS}, got {shown(num_registers)}: 1 to 4 do")
    if max_over not in ("neuron", "layer"):
        raise ValueError(f"max_over must be 'neuron' or 'layer', got {max_over!r}")
    if zero not in ("patches", "all"):
        raise ValueError(f"zero must be 'patches' or 'all', got {zero!r}")


def find_patch(model: nn.Module) -> Patch | None:
    """The patch of a model, or of a tower in it; None if there is none."""
    patches = (module.__dict__.get(_PATCH) for module in model.modules())
    return next((patch for patch in patches if patch is not None), None)


@dataclass(eq=False)
class Patch:
    """What `patch` did to a tower; kept on it until `unpatch`."""

    tower: nn.Module
    neurons: RegisterNeurons
    num_registers: int
    max_over: MaxOver
    zero: Zero
    num_prefix: int
    disabled_by: int = 0
    """How many `disabled` blocks are open, in all threads."""
    traced: tuple[int, Tensor, Tensor] | None = None
    """While a forward is compiled: a block whose tokens a hook may replace, these, and their registers (B, R, C)."""

    def __post_init__(self) -> None:
        self.overrides: list[Override] = []
        self.verified_use = VerifiedUse(self.neurons)

    def install(self, overrides: Iterable[Override]) -> None:
        self.overrides = list(overrides)  # all are made before the first is installed
        for override in self.overrides:
            override.install()
        vars(self.tower).update(REFUSALS, **{_PATCH: self})

    def remove(self) -> None:
        if any(not override.installed() for override in self.overrides):
            raise RuntimeError(
                "a forward that testreg.patch() replaced was replaced again by someone else (accelerate hooks, an "
                "adapter): remove that first, then unpatch"
            )
        for override in reversed(self.overrides):
            override.remove()
        for name in (_PATCH, *REFUSALS):
            delattr(self.tower, name)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that make the same patch again."""
        return {"num_registers": self.num_registers, "max_over": self.max_over, "zero": self.zero}

    @property
    def owner(self) -> dict[tuple[int, int], int]:
        """The register of each neuron (block, unit): in the order of the ranking, each goes to the next register."""
        return {(block, unit): i % self.num_registers for i, (block, unit, _) in enumerate(self.neurons.ranking)}

    @property
    def enabled(self) -> bool:
        """Whether the block that this thread is in has registers.

        An MLP or attention that is called by itself, outside its block, gets tokens without registers. It is inside
        although nothing says so where it is compiled, and where a backward pass recomputes the block from within.
        """
        if running.forward is not None:
            return running.forward.has_registers
        return self.disabled_by == 0 and (torch.compiler.is_compiling() or is_recomputing())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the `with` block, forwards that start have no registers."""
        with _counting:
            self.disabled_by += 1
        try:
            yield
        finally:
            with _counting:
                self.disabled_by -= 1

    def __getstate__(self) -> dict[str, Any]:
        # The `disabled` block in which a copy is made does not end for the copy.
        return {**self.__dict__, "disabled_by": 0, "traced": None}
