"""What rides with the tokens from one patched block to the next.

A patched block hands on a view of its T tokens. The view carries the whole sequence of T+R tokens as an attribute: so
nothing is copied and no state is left on the module, and threads, recomputation in gradient checkpointing and
re-entrant calls do not meet. A forward without registers carries a False instead: `testreg.disabled` never meets a
forward halfway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from testreg.patching.layout import Layout
from testreg.patching.running import is_recomputing

_CARRIED = "_testreg_carried"  # attribute of the tokens between two blocks: the whole sequence, or False
_DECIDED = "_testreg_decided"  # attribute of the tokens that enter block 0: whether that forward has registers


def carry(tokens: Tensor, sequence: Tensor, layout: Layout) -> None:
    """Let the tokens of a block carry the sequence, registers included, to the next block."""
    setattr(tokens, _CARRIED, sequence)
    if not torch.compiler.is_compiling() and tokens.grad_fn is not None:
        # For whoever hands on another tensor. A copy, so that the graph does not keep the memory of the sequence.
        metadata: Any = tokens.grad_fn.metadata
        metadata[_CARRIED] = layout.registers(sequence)


def carry_nothing(tokens: Tensor) -> None:
    """Let the tokens tell the next block that this forward has no registers."""
    setattr(tokens, _CARRIED, False)
    if tokens.grad_fn is not None:
        metadata: Any = tokens.grad_fn.metadata
        metadata[_CARRIED] = False


def carried_sequence(tokens: Tensor) -> Tensor | None:
    """The sequence, registers included, that the tokens carry; None if they are another tensor than was handed on."""
    carried = getattr(tokens, _CARRIED, None)
    return carried if isinstance(carried, Tensor) else None


def carried_registers(tokens: Tensor) -> Tensor | bool | None:
    """The registers (B, R, C) behind a tensor that autograd functions of Python made; False: a forward without any.

    FSDP2 and full backward hooks put such functions around a block; they return what they are given.
    """
    if torch.compiler.is_compiling():
        return None
    node, output = tokens.grad_fn, tokens.output_nr
    while isinstance(node, torch.autograd.function.BackwardCFunction) and output < len(node.next_functions):
        node, output = node.next_functions[output]
    return None if node is None else node.metadata.get(_CARRIED)  # type: ignore[attr-defined]


def has_registers_from_start(tokens: Tensor, now: bool) -> bool:
    """Whether the forward that starts with these tokens has registers: `now` decides.

    Gradient checkpointing that recomputes block 0 gets the answer that was given in the forward.
    """
    if is_recomputing():
        return getattr(tokens, _DECIDED, now)
    if torch.is_grad_enabled():
        setattr(tokens, _DECIDED, now)
    return now


def has_registers_further(tokens: Tensor, now: bool) -> bool:
    """Whether the forward that these tokens come from has registers; `now` decides if they do not tell."""
    carried = getattr(tokens, _CARRIED, None)
    if carried is None:
        carried = carried_registers(tokens)
    return now if carried is None else carried is not False
