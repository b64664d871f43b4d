"""The life of a forward through a patched tower.

1. The entry block is called with T tokens: a `Forward` begins. The entry block is block 0 if registers start as zeros.
   If they start as the mean of their image's patches, it is the first block with register neurons, and the blocks in
   front of it are not changed. The mode of the forward is decided (with registers, steered onto patches, or unpatched),
   and holds to its end, whatever `testreg.disabled` and `testreg.steered` do meanwhile. With gradients, these first
   tokens are marked with their forward, for gradient checkpointing that recomputes the block.
2. The block appends R registers to the tokens (zeros, means, or static states), and calls the block's own forward on
   the T+R (block.py).
3. In front of the second MLP linear, before any hook on it, the register neurons are moved to the registers (fc2.py).
4. The block hands on T tokens. They carry the registers as an attribute, a `Handoff`: no state is left on the module.
5. Hooks of the block run. If one puts other tokens in the place of these, the registers are given to what it returns.
6. Block i takes the registers that its tokens carry. So gradient checkpointing can recompute a block (it calls it with
   the tensor that the block first got), and forwards can run in other threads or interleaved. If a hook in front of the
   block puts other tokens in the place of these, the registers are given to them.
7. Tokens that carry nothing were computed by code between the blocks. Nothing tells which forward they belong to, so it
   is an error if the block needs registers.
8. The last block hands on tokens that carry nothing, and the forward is over.

What is known of a running block belongs to the thread (`running`), not to the model. Compiled code knows only what the
tokens carry. A `patch` is what `testreg.patch` puts on a tower (`state.Patch`), not a patch of an image.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testreg.families.layout import Layout

CARRIED = "_testreg_carried"  # attribute of the tokens between blocks: a `Handoff`, or registers if compiled
STARTED = "_testreg_started"  # attribute of the tokens at the entry block: a `Handoff` without registers


@dataclass(frozen=True, eq=False)
class Mode:
    """What a forward computes, from the block that registers enter to the last."""

    is_patched: bool = True
    """Whether the forward changes the activations of the register neurons: it moves them or silences them."""
    has_registers: bool = True
    """Whether the blocks see T+R tokens."""
    target: Tensor | None = None
    """The patches that neurons are steered onto, a bool mask (B, h, w) or (1, h, w); None if they are not steered."""


UNPATCHED = Mode(is_patched=False, has_registers=False)


@dataclass(eq=False)
class Forward:
    """One pass through the blocks of a patched tower."""

    patch: object
    mode: Mode


@dataclass(eq=False)
class Handoff:
    """What tokens carry from one block to the next: the forward they belong to, and its registers (B, R, C), if any."""

    forward: Forward
    registers: Tensor | None
    shape: tuple[int, ...]
    """The shape that the tokens must have at the next block, also those that take their place."""

    def __reduce__(self) -> Any:
        return set, ()  # a saved or copied tensor carries an empty set instead: torch.load takes it with weights_only


@dataclass(eq=False)
class Call:
    """One call of a block, its hooks included."""

    block: object
    argument: object
    """The tokens that the block was called with, before hooks have seen them."""
    forward: Forward | None = None
    """The forward that this call is part of; None until the block's `forward` method is entered."""
    tokens: Tensor | None = None
    """The tokens that it hands on, before hooks have seen them."""


class Running(threading.local):
    """The state of one thread."""

    call: Call | None
    """The call of a block that the thread is in; None outside of blocks, and while they are compiled."""
    moves: int
    """The number of calls of a second linear in the current block that have moved neurons so far."""
    layout: Layout | None
    """The layout of the innermost patched block that the thread is in."""
    recomputed: Layout | None
    """The layout of a block, if gradient checkpointing recomputes what is inside the block without calling the block
    itself (transformers 5)."""
    compiled: tuple[object, int, tuple[int, ...], Tensor] | None
    """What a compiled block hands on, if its hooks may replace it: the patch, the block's index, the shape of the
    tokens, and the registers."""
    recorders: tuple[Any, ...]
    """The `register.Recorder` of each `testreg.registers` context that is open."""
    steered: tuple[tuple[object, Mode], ...]
    """The patch and the mode of each `testreg.steered` context that is open, the innermost last."""

    def __init__(self) -> None:
        # If these were defaults of the class, compiled code would still read them after the instance was given others.
        self.call = None
        self.moves = 0
        self.layout = None
        self.recomputed = None
        self.compiled = None
        self.recorders = ()
        self.steered = ()


running = Running()


def is_recomputing() -> bool:
    """Whether this thread is in a backward pass: a block that runs there is recomputed by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def layout_now(default: Layout) -> Layout:
    """The layout of the block that this thread is in; `default` if it is in none."""
    return running.layout or running.recomputed or default


def carried(tokens: object, patch: object) -> Handoff | None:
    """What tokens carry from one block of this patch to the next; None if no block of it has handed them on."""
    handoff = getattr(tokens, CARRIED, None)
    return handoff if isinstance(handoff, Handoff) and handoff.forward.patch is patch else None


def begin(patch: object, mode: Mode, tokens: object) -> Forward:
    """Begin a forward in this mode, with the tokens at the entry block.

    If gradient checkpointing recomputes that block, the forward has the mode in which the block first ran instead.
    """
    if is_recomputing():
        start = getattr(tokens, STARTED, None)
        return Forward(patch, start.forward.mode if isinstance(start, Handoff) else mode)
    forward = Forward(patch, mode)
    if torch.is_grad_enabled() and isinstance(tokens, Tensor):
        setattr(tokens, STARTED, Handoff(forward, None, tokens.shape))
    for recorder in running.recorders:
        recorder.begin(forward)
    return forward


def carry_through_hooks(out: Any, call: Call) -> Any:
    """Attach the registers to the tokens that hooks return, if the hooks have replaced the tokens of the block."""
    tokens = first_of(out)
    if call.tokens is None or tokens is call.tokens or not isinstance(tokens, Tensor):
        return out
    view = tokens.view_as(tokens)  # the hook may return the same tensor in other forwards too
    handoff: Handoff = getattr(call.tokens, CARRIED)
    setattr(view, CARRIED, Handoff(handoff.forward, registers_for(tokens, handoff), handoff.shape))
    return with_first(out, view)


def registers_for(tokens: Tensor, handoff: Handoff) -> Tensor | None:
    """The registers for tokens that take the place of those that carried `handoff`, or are these.

    They are those of the tokens themselves if these are of an earlier block in the same forward. They are on the device
    and in the dtype of the tokens, and detached if the tokens need no gradient.
    """
    own = carried(tokens, handoff.forward.patch)
    registers = handoff.registers if own is None or own.forward is not handoff.forward else own.registers
    if registers is None:
        return None
    return (registers if tokens.requires_grad else registers.detach()).to(tokens.device, tokens.dtype)


def take_left_by_compiled(patch: object, index: int, tokens: Any) -> Tensor | None:
    """The registers that compiled block `index` left for tokens that carry nothing, which a hook has put in place of
    its own; None if it left none for them."""
    left, running.compiled = running.compiled, None
    if left is None or left[0] is not patch or left[1] != index or not isinstance(tokens, Tensor):
        return None
    is_for_them = tuple(tokens.shape) == left[2] and getattr(tokens, CARRIED, None) is None
    return left[3].to(tokens.device, tokens.dtype) if is_for_them else None


def first_of(out: Any) -> Any:
    """The tokens in the input or output of a block, which may be a tuple that begins with them."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def with_first(out: Any, tokens: Tensor) -> Any:
    """The input or output of a block with other tokens in it."""
    if not isinstance(out, (tuple, list)):
        return tokens
    parts = [tokens, *out[1:]]
    return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
