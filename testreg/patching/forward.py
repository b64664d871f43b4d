"""The life of a forward through a patched tower.

1. Block 0 is called with T tokens: a `Forward` begins in this thread. Its mode is decided (with registers, steered onto
   patches, as the model was), and holds to its end, whatever `testreg.disabled` and `testreg.steered` do meanwhile.
2. The block appends R registers of zeros to the tokens, and calls the block's own forward on the T+R (`block`).
3. In front of the second MLP linear, before any hook on it, the register neurons are moved to the registers (`fc2`).
4. The block hands on T tokens. They carry the registers as an attribute, a `Handoff`: no state is left on the module.
5. Hooks of the block run. If one puts other tokens in the place of these, the registers are given to what it returns.
6. Block i takes the registers that its tokens carry. That is what recomputation by gradient checkpointing (the tokens
   it saved are the same tensor), other threads and interleaved forwards need.
7. Tokens that carry nothing were put there between the blocks. They get what block i-1 left in the forward of this
   thread, if their shape is the same, and an error if that is not certain.
8. The last block hands on tokens that carry nothing, and the forward is over.

The state belongs to the thread (`running`), not to the model. Compiled code has none of it but what tokens carry.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from testreg.patching.layout import Layout

CARRIED = "_testreg_carried"  # attribute of the tokens between two blocks: a `Handoff`, or registers if compiled
_START = "_testreg_start"  # attribute of the tokens that enter block 0: a `StartMode`


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


@dataclass(eq=False)
class Forward:
    """One pass through the blocks of a patched tower."""

    patch: object
    mode: Mode
    index: int = -1
    """The last of its blocks that has handed on tokens."""
    shape: tuple[int, ...] = ()
    """The shape of these tokens."""
    handoff: Callable[[], Handoff | None] = lambda: None
    """A weak reference to what they carry. They keep it alive, and so does their autograd graph."""
    kept: Tensor | None = None
    """The registers (B, R, C) again, where no autograd graph keeps them."""
    is_over: bool = False
    is_certain: bool = True
    """Whether tokens that carry nothing can only be of this forward: no other was left unfinished in front of it."""


class _Unsaved:
    """An attribute of a tensor that is not saved or copied with it: an empty set stands in its place."""

    def __reduce__(self) -> Any:
        return set, ()  # torch.load takes it without trust


class Handoff(_Unsaved):
    """What the tokens between two blocks carry: the forward they belong to, and its registers (B, R, C), if any.

    Where no gradient is taken, and the tokens are a view of the T+R that the block made, as of one image, they carry
    these too, and the next block need not join them: whoever edits the tokens in place edits both.
    """

    def __init__(self, forward: Forward, registers: Tensor | None, sequence: Tensor | None = None) -> None:
        self.forward, self.registers, self.sequence = forward, registers, sequence

    def take_sequence(self, tokens: Tensor, layout: Layout) -> Tensor | None:
        """The T+R tokens, if `tokens` are still a view of them; once, so that kept tokens do not keep both alive."""
        sequence, self.sequence = self.sequence, None
        if sequence is None or torch.is_grad_enabled() or not tokens.is_set_to(layout.tokens(sequence)):
            return None
        return sequence


class StartMode(_Unsaved):
    """What the tokens that enter block 0 carry: the mode of their forward, for gradient checkpointing."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode


@dataclass(eq=False)
class Call:
    """One call of a block, its hooks included."""

    block: object
    patch: object
    arrived: object
    """Its first argument, before hooks have seen it."""
    outer: Call | None
    """The call of a block in which a hook has started this forward."""
    before: Forward | None
    """The forward of this thread that had not ended when the block was called."""
    forward: Forward | None = None
    """The forward that the block is part of; None until its `forward` is entered."""
    tokens: Tensor | None = None
    """The tokens that it hands on, before hooks have seen them."""
    length: int = 0
    """T+R, of all images if they are packed, while the block computes with registers; else 0."""


@dataclass(eq=False)
class Hooked:
    """A module inside of a block, while hooks that see no registers run on it."""

    module: object
    rejoin: Callable[[Any], Any]
    """Puts the registers back onto what the module gets, and later onto what it gives."""


@dataclass(eq=False)
class Recorder:
    """The list that `testreg.registers` fills: registers of one patch, of one forward of a thread."""

    patch: object
    recorded: list[Tensor] = field(default_factory=list)
    forward: Forward | None = None


class Running(threading.local):
    """The state of one thread."""

    call: Call | None
    """The call of a block that the thread is in; None outside of blocks, and while they are compiled."""
    forward: Forward | None
    """The forward that is between two blocks."""
    hooked: Hooked | None
    """The module whose hooks run, under `testreg.hooks_without_registers`."""
    moves: int
    """How many times the neurons in front of a second linear were moved, in the block that runs."""
    layout: Layout | None
    """The layout of the block that runs, if it is padded or packed."""
    recomputed: Layout | None
    """The layout of a padded or packed block whose inside gradient checkpointing recomputes (transformers 5)."""
    compiled: tuple[object, int, tuple[int, ...], Tensor] | None
    """Patch, index, shape of the tokens and registers of a compiled block whose hooks may replace its tokens."""
    recorders: tuple[Recorder, ...]
    steered: tuple[tuple[object, Mode], ...]
    """The `testreg.steered` blocks that are open, with the patch of each, the innermost last."""

    def __init__(self) -> None:
        # No defaults of the class: compiled code would not see what replaces them.
        self.call = None
        self.forward = None
        self.hooked = None
        self.moves = 0
        self.layout = None
        self.recomputed = None
        self.compiled = None
        self.recorders = ()
        self.steered = ()


running = Running()


def can_share(sequence: Tensor) -> bool:
    """Whether the next block may take a block's T+R tokens as they are: plain memory, which no graph or trace sees."""
    return (
        not torch.is_grad_enabled()
        and type(sequence) is Tensor
        and (sequence.is_cpu or sequence.is_cuda)
        and not torch.jit.is_tracing()
        and not torch._C._functorch.is_functorch_wrapped_tensor(sequence)
    )


def is_recomputing() -> bool:
    """Whether this thread is in a backward pass: a block that runs there is recomputed by gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def begin(patch: object, tokens: object, mode: Mode, before: Forward | None) -> Forward:
    """The forward that begins with the tokens that enter block 0; it has the mode for new forwards.

    If gradient checkpointing recomputes block 0, the mode is that of the first time.
    """
    if isinstance(tokens, Tensor):
        if is_recomputing():
            start = getattr(tokens, _START, None)
            mode = start.mode if isinstance(start, StartMode) else mode
        elif torch.is_grad_enabled():
            setattr(tokens, _START, StartMode(mode))
    forward = Forward(patch, mode, is_certain=before is None or before.is_over)
    if not is_recomputing():
        for recorder in running.recorders:
            if recorder.patch is patch:
                recorder.recorded.clear()
                recorder.forward = forward
    return forward


def hand_on(
    tokens: Tensor, forward: Forward, index: int, registers: Tensor | None, sequence: Tensor | None = None
) -> None:
    """Let tokens that a block hands on carry the registers, or the whole sequence, to the next block."""
    handoff = Handoff(forward, registers, sequence)
    setattr(tokens, CARRIED, handoff)
    forward.index, forward.shape, forward.handoff = index, tuple(tokens.shape), weakref.ref(handoff)
    forward.kept = None
    if registers is not None and not registers.requires_grad:
        forward.kept = registers
    elif tokens.grad_fn is not None:
        metadata: Any = tokens.grad_fn.metadata
        metadata[CARRIED] = handoff  # what is made of the tokens has their graph


def carried(tokens: object, patch: object) -> Handoff | None:
    """What tokens carry from a block of this patch to the next; None if they are others than a block handed on."""
    handoff = getattr(tokens, CARRIED, None)
    return handoff if isinstance(handoff, Handoff) and handoff.forward.patch is patch else None


def has_no_registers(tensor: Tensor) -> bool:
    """Whether this is of T tokens: a block has handed it on, or a hook sees it that sees no registers."""
    return getattr(tensor, CARRIED, None) is not None or running.hooked is not None


def arrive(tokens: Tensor, call: Call, index: int) -> tuple[Forward, Tensor | None] | None:
    """The forward of the tokens that arrive at a block, and their registers; None if neither can be told.

    Raises:
        RuntimeError: the tokens have another shape than those whose place they take.
    """
    own, before = carried(call.arrived, call.patch), call.before
    waiting = None
    if before is not None and before.patch is call.patch and before.index == index - 1:
        waiting = before if is_recomputing() or not before.is_over else None
    # Tokens of a forward that is over are an activation that somebody kept: it takes the place of the waiting one's.
    if own is not None and (waiting is None or not own.forward.is_over or is_recomputing()):
        forward, registers = own.forward, own.registers
    elif waiting is not None and waiting.is_certain:
        left = waiting.handoff()
        forward, registers = waiting, waiting.kept if left is None else left.registers
    else:
        if waiting is not None and waiting.mode.has_registers:
            check_shape(tokens, waiting.shape, index)
        return None
    if tokens is call.arrived and own is not None and own.forward is forward:
        if tokens.grad_fn is not None and registers is not None and not registers.requires_grad:
            raise RuntimeError(
                f"the gradient did not arrive at block {index} with the register: re-entrant gradient checkpointing "
                "drops it. Use use_reentrant=False"
            )
        return forward, registers
    if forward.mode.has_registers:
        check_shape(tokens, forward.shape if own is None else call.arrived.shape, index)  # type: ignore[attr-defined]
    other = carried(tokens, call.patch)
    if other is not None and other.forward is forward:  # an earlier state of the same forward
        return forward, other.registers
    return forward, registers_for(tokens, registers)


def leave(out: Any, call: Call) -> Any:
    """What a block hands on once its hooks have run: if they put other tokens in place, these carry the registers."""
    tokens, forward = first_of(out), call.forward
    if call.tokens is None or tokens is call.tokens or not isinstance(tokens, Tensor) or forward is None:
        return out
    if forward.mode.has_registers and tokens.shape != call.tokens.shape:
        return out  # the next block says so
    own = carried(tokens, call.patch)
    if own is None or own.forward is not forward:
        own = carried(call.tokens, call.patch)
    assert own is not None
    view = tokens.view_as(tokens)  # whoever made the tensor may put it into other forwards too
    hand_on(view, forward, forward.index, registers_for(tokens, own.registers))
    return with_first(out, view)


def registers_for(tokens: Tensor, registers: Tensor | None) -> Tensor | None:
    """Registers for tokens that take the place of others: on their device, in their dtype, with or without gradient."""
    if registers is None:
        return None
    return (registers if tokens.requires_grad else registers.detach()).to(tokens.device, tokens.dtype)


def check_shape(tokens: Tensor, handed_on: tuple[int, ...], index: int) -> None:
    """Raise RuntimeError if tokens that replace others have another shape."""
    if tuple(tokens.shape) != tuple(handed_on):
        raise RuntimeError(
            f"the register did not arrive at block {index}: block {index - 1} handed on tokens {tuple(handed_on)}, and "
            f"{tuple(tokens.shape)} came. Where images leave the batch, or tokens are merged, pruned or added between "
            "the blocks, the register cannot follow them: do it outside of the blocks, or under "
            "testreg.disabled(model)"
        )


def first_of(out: Any) -> Any:
    """The tokens among what a block gets or gives."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def with_first(out: Any, tokens: Tensor) -> Any:
    """The same, with other tokens."""
    return made_as(out, [tokens, *out[1:]]) if isinstance(out, (tuple, list)) else tokens


def made_as(out: Any, parts: list[Any]) -> Any:
    """A list, a tuple or a named tuple of these parts, as `out` is one."""
    return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)


def layout_now(default: Layout) -> Layout:
    """The layout of the block that this thread is in."""
    return running.layout or running.recomputed or default


@contextmanager
def running_with_layout(layout: Layout) -> Iterator[None]:
    """Within the `with` block this thread is in a block of that layout."""
    outer, running.layout = running.layout, layout
    running.recomputed = None  # left by a backward pass
    try:
        yield
    finally:
        running.layout = outer


def record(patch: object, registers: Tensor, index: int) -> None:
    """Give the registers that a block leaves to the recorders of this thread that hold those of its forward."""
    for recorder in running.recorders:
        if recorder.patch is patch and (running.call is None or recorder.forward is running.call.forward):
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
