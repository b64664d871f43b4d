"""The state of the forward that a thread is in the middle of. It belongs to the thread, not to the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from testreg.patching.layout import Layout


@dataclass(frozen=True, eq=False)
class Mode:
    """What a forward computes, from its first block to its last."""

    is_patched: bool = True
    """Whether register neurons are moved, or silenced."""
    has_registers: bool = True
    """Whether the blocks see T+R tokens."""
    target: Tensor | None = None
    """(B, h, w) or (1, h, w) bool, the patches that the neurons are moved to; None: they are not steered."""


AS_IT_WAS = Mode(is_patched=False, has_registers=False)

Home = tuple[int, CodeType]
"""A function call that runs: its frame by identity alone, since a reference would keep all of its variables alive."""


@dataclass(eq=False)
class Forward:
    """One pass of a thread through the blocks of a patched tower."""

    patch: object
    mode: Mode
    """It ends as it began, whether `testreg.disabled` or `testreg.steered` begin or end meanwhile."""
    home: Home
    """The function call that calls the blocks."""
    origin: object = field(default_factory=object)
    """Identifies the forward: also its parts in another thread, and those that checkpointing recomputes, have it."""
    backward: int = field(default_factory=lambda: torch._C._current_graph_task_id())
    """The number of the backward pass that recomputes this forward; -1: none does."""
    index: int = -1
    """The last of its blocks that has handed on its tokens."""
    handed: Callable[[], Any] | None = None
    """A weak reference to what that block handed on (`riding.Handed`)."""
    kept: Tensor | None = None
    """The registers (B, R, C) of that block, detached, if somebody dropped its tokens to put others in their place."""
    shape: tuple[int, ...] = ()
    """The shape of its tokens."""


@dataclass(eq=False)
class Recorder:
    """The list that `testreg.registers` fills: registers of one patch, of one forward of a thread."""

    patch: object
    recorded: list[Tensor] = field(default_factory=list)
    origin: object = None
    """The `Forward.origin` of the forward that is recorded."""

    def restart(self, origin: object) -> None:
        self.recorded.clear()
        self.origin = origin


class Running(threading.local):
    """The state of one thread."""

    forwards: tuple[Forward, ...]
    """Those that have begun, the latest last. An abandoned one stays, without activations, until the next begins."""
    forward: Forward | None
    """That of the block that runs; None outside blocks, and while they are compiled."""
    layout: Layout | None
    """The layout of the block that runs, if it is padded or packed."""
    recomputed: Layout | None
    """The layout of the padded or packed block that gradient checkpointing recomputes from within."""
    recorders: tuple[Recorder, ...]
    steered: tuple[tuple[object, Mode], ...]
    """The `testreg.steered` blocks that are open, with the patch of each, the innermost last."""

    def __init__(self) -> None:
        # No defaults of the class: compiled code would not see what replaces them.
        self.forwards = ()
        self.forward = None
        self.layout = None
        self.recomputed = None
        self.recorders = ()
        self.steered = ()


running = Running()


def layout_now(plain: Layout) -> Layout:
    """The layout of the block that this thread is in."""
    return running.layout or running.recomputed or plain


@contextmanager
def running_with_layout(layout: Layout) -> Iterator[None]:
    """Within the `with` block this thread is in a block of that layout."""
    outer, running.layout = running.layout, layout
    running.recomputed = None  # left by a backward pass
    try:
        yield
    finally:
        running.layout = outer


def is_recomputing() -> bool:
    """Whether this thread is in a backward pass: a block that runs there is recomputed by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def record(patch: object, registers: Tensor, index: int) -> None:
    """Give the registers that a block leaves to the recorders of this thread that hold those of its forward."""
    for recorder in running.recorders:
        if recorder.patch is patch and (running.forward is None or recorder.origin is running.forward.origin):
            recorder.recorded[index : index + 1] = [registers]


@contextmanager
def recording(patch: object) -> Iterator[list[Tensor]]:
    """Within the `with` block the list gets the registers that each block of the patch leaves behind."""
    recorder = Recorder(patch)
    running.recorders = (*running.recorders, recorder)
    try:
        yield recorder.recorded
    finally:
        running.recorders = tuple(each for each in running.recorders if each is not recorder)
