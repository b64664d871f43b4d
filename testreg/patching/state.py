"""The patch of a tower: what `patch` was told, and the overrides that it put on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.neurons import RegisterNeurons
from testreg.neurons.notices import VerifiedUse
from testreg.patching.forward import UNPATCHED, Mode, is_recomputing, running
from testreg.patching.override import REFUSALS, Part
from testreg.records.options import MaxOver, Start, Zero
from testreg.static import StaticRegisters

STATE = "testreg_state"  # buffer of a block: its registers (R, C), if they are constants
_PATCH = "_testreg_patch"  # attribute of a patched tower


def find_patch(model: nn.Module) -> Patch | None:
    """The patch of a model, or of a tower in it; None if there is none."""
    patches = (module.__dict__.get(_PATCH) for module in model.modules())
    return next((patch for patch in patches if patch is not None), None)


def patch_of(model: nn.Module) -> Patch:
    """The patch of a patched model: its neurons and options. Raises RuntimeError if there is none."""
    if (patch := find_patch(model)) is None:
        raise RuntimeError("the model is not patched")
    return patch


@dataclass(eq=False)
class Patch:
    """What `patch` did to a tower; kept on it until `unpatch`."""

    tower: nn.Module
    neurons: RegisterNeurons
    num_registers: int
    split_neurons: bool
    max_over: MaxOver
    zero: Zero
    start: Start
    num_prefix: int
    target: Tensor | None = None
    """(B, h, w) bool, the patches that take the register's place; `testreg.steered` overrides them."""
    static: StaticRegisters | None = None
    """The registers, if they are constants."""
    disabled_by: int = 0
    """How many `testreg.disabled` contexts are open, in all threads."""
    warns_outside: bool = True
    """Whether to warn of a second linear that is called outside its block; False once it was done."""

    def __post_init__(self) -> None:
        self.overrides: list[Part] = []
        self.verified_use = VerifiedUse(self.neurons)
        no_register_tokens = self.target is not None or (self.static is not None and self.static.form == "bias")
        self.default_mode = Mode(has_registers=not no_register_tokens, target=self.target)

    def install(self, overrides: Iterable[Part]) -> None:
        self.overrides = list(overrides)  # if making one fails, none is installed yet
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
        """The arguments, beside neurons and target, that make the same patch again, for JSON; of static registers, only
        the form."""
        names = "num_registers", "split_neurons", "max_over", "zero", "start"
        options = {name: getattr(self, name) for name in names}
        return options if self.static is None else {**options, "static": self.static.form}

    @property
    def entry_block(self) -> int:
        """The block that registers enter: the first one, or the first that has register neurons if they start as the
        mean patch. The blocks in front of it are not changed."""
        return 0 if self.start == "zeros" else min(self.neurons.by_block(), default=0)

    @property
    def mode_for_new_forward(self) -> Mode:
        """The mode of a forward that starts now in this thread."""
        if self.disabled_by > 0:
            return UNPATCHED
        mode = self.default_mode
        for patch, steered in running.steered:
            if patch is self:
                mode = steered
        return mode

    @property
    def current_mode(self) -> Mode:
        """The mode of the forward that this thread is in; unpatched outside a block.

        So an MLP or attention that is called by itself computes as in the unpatched model. Compiled code does not know
        which block it is part of, nor does a backward pass that recomputes the inside of one: they take the mode for
        new forwards.
        """
        forward = None if running.call is None else running.call.forward
        if forward is not None and forward.patch is self:
            return forward.mode
        return self.mode_for_new_forward if torch.compiler.is_compiling() or is_recomputing() else UNPATCHED

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made within a `disabled` context is not disabled, since nothing would end that for it.
        return {**self.__dict__, "disabled_by": 0}
