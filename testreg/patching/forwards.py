"""Which forward a block is called in.

A forward is one pass through the blocks: it begins at block 0 and ends with the last block. It belongs to the thread
and to the function call that it began in, its *home*: the innermost method of the tower, or of a part that holds all
blocks, that was running then; in a loop over the blocks that someone wrote, the function with that loop. When the home
has returned or raised, its forward is over. So a hidden state that someone puts between two blocks finds the forward
that it is put into, and what an abandoned forward has left is never taken for that of another.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn

from testreg.patching.running import Forward, Home, Mode, is_recomputing, running


def is_running(forward: Forward) -> bool:
    """Whether the forward goes on in this thread."""
    return (
        forward in running.forwards
        and forward.backward == torch._C._current_graph_task_id()
        and forward.home in _homes()
    )


def is_latest(forward: Forward) -> bool:
    """Whether the forward is the last that has begun in this thread; it is running then, or was abandoned."""
    return bool(running.forwards) and forward is running.forwards[-1]


def end(forward: Forward) -> None:
    """Forget a forward: its last block is through."""
    running.forwards = tuple(each for each in running.forwards if each is not forward)


def begin(patch: object, holders: frozenset[type[nn.Module]], mode: Mode, origin: object | None = None) -> Forward:
    """A forward that begins in this thread, or goes on in it if it has an origin."""
    if running.forwards:
        homes = set(_homes())
        running.forwards = tuple(each for each in running.forwards if each.home in homes)
    forward = Forward(patch, mode, _home(holders))
    if origin is not None:
        forward.origin = origin
    elif not is_recomputing():
        for recorder in running.recorders:
            if recorder.patch is patch:
                recorder.restart(forward.origin)
    running.forwards = (*running.forwards, forward)
    return forward


def forward_behind(patch: object, index: int) -> Forward | None:
    """The forward of this thread in which a block comes next; None if there is none, or more than one."""
    backward = torch._C._current_graph_task_id()
    of_patch = [each for each in running.forwards if each.patch is patch and each.backward == backward]
    for home in _homes() if of_patch else ():  # a forward within a hook of another comes before that
        if here := [each for each in of_patch if each.home == home]:
            waiting = [each for each in here if each.index == index - 1]
            return waiting[0] if len(waiting) == 1 else None
    return None


def _home(holders: frozenset[type[nn.Module]]) -> Home:
    """The call in which the blocks are called one after the other."""
    of_holders, outermost = _codes(holders), None
    by_hand = None
    for frame in _frames():
        outermost = frame
        if frame.f_code in of_holders:
            return id(frame), frame.f_code
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if by_hand is None and package not in ("torch", "testreg"):
            by_hand = id(frame), frame.f_code
    assert outermost is not None
    return by_hand or (id(outermost), outermost.f_code)


@functools.cache
def _codes(holders: frozenset[type[nn.Module]]) -> frozenset[CodeType]:
    """The code of all methods of some modules, but for those that every module has."""
    classes = {base for holder in holders for base in holder.__mro__ if base not in nn.Module.__mro__}
    functions = (value for each in classes for value in vars(each).values() if isinstance(value, FunctionType))
    return frozenset(code for function in functions for code in _unwrapped(function))


def _unwrapped(function: Any) -> Iterator[CodeType]:
    """The code of a function, and of those that decorators have wrapped."""
    while isinstance(function, FunctionType):
        yield function.__code__
        function = getattr(function, "__wrapped__", None)


def _homes() -> Iterator[Home]:
    """The calls of this thread that are running, the innermost first."""
    return ((id(frame), frame.f_code) for frame in _frames())


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
