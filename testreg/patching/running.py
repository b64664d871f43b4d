"""What the forward that a thread is in the middle of is like. Nothing of it is kept on the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from testreg.patching.layout import Layout


class Running(threading.local):
    """The state of one thread. Outside patched blocks all of it is empty, save the recorders."""

    has_registers: bool | None = None
    """Whether the block that runs has its registers; None outside blocks, and while they are compiled."""
    layout: Layout | None = None
    """The layout of the block that runs, if it is padded or packed."""
    recomputed: Layout | None = None
    """The layout of the padded or packed block that gradient checkpointing recomputes from within."""
    recorders: tuple[tuple[object, list[Tensor]], ...] = ()
    """The lists that `testreg.registers` fills in this thread, each with the patch that it belongs to."""


running = Running()


def layout_now(plain: Layout) -> Layout:
    """The layout of the block that this thread is in."""
    return running.layout or running.recomputed or plain


@contextmanager
def running_with_registers(has_registers: bool) -> Iterator[None]:
    """Within the `with` block this thread is in a block that has registers, or has none."""
    outer, running.has_registers = running.has_registers, has_registers
    try:
        yield
    finally:
        running.has_registers = outer


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


def forget_recorded(patch: object) -> None:
    """Empty the lists of a patch when a forward starts, so that none holds registers of two forwards."""
    if not is_recomputing():
        for owner, recorded in running.recorders:
            if owner is patch:
                recorded.clear()


@contextmanager
def recording(patch: object) -> Iterator[list[Tensor]]:
    """Within the `with` block the list gets the registers that each block of the patch leaves behind."""
    recorder = patch, list[Tensor]()
    running.recorders = (*running.recorders, recorder)
    try:
        yield recorder[1]
    finally:
        running.recorders = tuple(each for each in running.recorders if each is not recorder)
