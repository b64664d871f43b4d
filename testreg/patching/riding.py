"""What rides with the tokens from one patched block to the next.

A patched block hands on a view of its T tokens. The view carries the whole sequence of T+R tokens as an attribute: so
nothing is copied and no state is left on the module, and threads, recomputation in gradient checkpointing and
re-entrant calls do not meet. A forward without registers carries a False instead: `testreg.disabled` never meets a
forward halfway.

Where someone puts another tensor in the place of the tokens (a hook that returns one, an adapter, a move to another
device), the forward knows the registers (`forwards`): they are copied, and only then.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from testreg.patching.forwards import begin, forward_behind, is_latest, is_running
from testreg.patching.layout import Layout
from testreg.patching.running import AS_IT_WAS, Forward, Mode, is_recomputing
from testreg.patching.state import Patch

_CARRIED = "_testreg_carried"  # attribute of the tokens between two blocks: the whole sequence, or False
_HANDED = "_testreg_handed"  # attribute of the tokens between two blocks, unless these are compiled: a `Handed`
_REPLACES = "_testreg_replaces"  # attribute of what has taken the place of the tokens: a `Replacement`
_DECIDED = "_testreg_decided"  # attribute of the tokens that enter block 0: a `Decided`


class _Unsaved:
    """Rides on a tensor, but is not saved or copied with it: an empty set stands in its place."""

    def __reduce__(self) -> Any:
        return set, ()  # torch.load takes it without trust


class Handed(_Unsaved):
    """Links the tokens that a block hands on to the forward that they belong to.

    It is deleted together with the tokens. If that happens before the next block of the forward is called, another
    tensor has taken their place, and the registers are kept for that one.
    """

    def __init__(self, forward: Forward, index: int, tokens: Tensor, sequence: Tensor | None, layout: Layout) -> None:
        self.forward, self.index, self.sequence, self.layout = forward, index, sequence, layout
        self.arrived = False
        forward.index, forward.shape, forward.handed, forward.kept = index, tuple(tokens.shape), weakref.ref(self), None
        setattr(tokens, _HANDED, self)

    def registers(self) -> Tensor:
        """The registers (B, R, C) that belong to the tokens."""
        assert self.sequence is not None
        return self.layout.registers(self.sequence)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing():  # modules are gone by then
            return
        unclaimed = not self.arrived and self.sequence is not None and self.forward.index == self.index
        if unclaimed and is_running(self.forward):
            self.forward.kept = self.registers().detach()


class Decided(_Unsaved):
    """Tells what the forward that began with the tokens is."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode


class Replacement(_Unsaved):
    """The registers that were found for a tensor which took the place of tokens, by forward.

    They are remembered because gradient checkpointing asks for them a second time.
    """

    def __init__(self) -> None:
        self.found = weakref.WeakKeyDictionary[Forward, Tensor | None]()


def is_carrying(tokens: Tensor) -> bool:
    """Whether these are the T tokens that a block hands on, whose registers ride beside them."""
    return getattr(tokens, _CARRIED, None) is not None


def carry(tokens: Tensor, sequence: Tensor, layout: Layout, forward: Forward | None, index: int) -> None:
    """Let the tokens of a block carry the sequence, registers included, to the next block of the forward."""
    setattr(tokens, _CARRIED, sequence)
    if forward is not None:
        Handed(forward, index, tokens, sequence, layout)
        if tokens.grad_fn is not None:
            # For what is made of the tokens. A copy, so that the graph does not keep the memory of the sequence.
            _metadata(tokens)[_CARRIED] = forward, index, layout.registers(sequence)


def carry_nothing(tokens: Tensor, layout: Layout, forward: Forward, index: int) -> None:
    """Let the tokens tell the next block that this forward has no registers."""
    setattr(tokens, _CARRIED, False)
    Handed(forward, index, tokens, None, layout)
    keep_forward(tokens, forward, index)


def keep_forward(tokens: Tensor, forward: Forward, index: int) -> None:
    """Keep the forward alive as long as the graph of its tokens is."""
    if tokens.grad_fn is not None:
        _metadata(tokens)[_CARRIED] = forward, index, None


def _metadata(tokens: Tensor) -> dict[Any, Any]:
    return tokens.grad_fn.metadata  # type: ignore[union-attr, return-value]


def carried_sequence(tokens: Tensor) -> Tensor | None:
    """The sequence, registers included, that the tokens carry; None if they are another tensor than was handed on."""
    carried = getattr(tokens, _CARRIED, None)
    return carried if isinstance(carried, Tensor) else None


def mode_from_start(tokens: Tensor, patch: Patch) -> Mode:
    """The mode of the forward that starts with these tokens.

    Gradient checkpointing that recomputes block 0 gets the answer that was given in the forward.
    """
    now = patch.next_mode
    if is_recomputing():
        decided = getattr(tokens, _DECIDED, None)
        return decided.mode if isinstance(decided, Decided) else now
    if torch.is_grad_enabled():
        setattr(tokens, _DECIDED, Decided(now))
    return now


def forward_of(tokens: Tensor, patch: Patch, holders: frozenset[type[nn.Module]], index: int) -> tuple[Forward, bool]:
    """The forward in which a block behind the first gets these tokens, and whether they replace what was handed on.

    Tokens of a forward that runs belong to it. All others replace those that the block before has handed on in the
    forward from which the block is called. If there is none, they come from another thread or process, from a compiled
    block, or from a forward that a backward pass recomputes.
    """
    handed = _handed(tokens)
    if handed is not None and handed.forward.patch is patch and _goes_on(handed.forward):
        handed.arrived = True
        return handed.forward, False
    copied = handed is None and hasattr(tokens, _HANDED)
    if (forward := forward_behind(patch, index)) is not None:
        replaces = handed is not None or copied or not hasattr(tokens, _CARRIED)  # a compiled block hands on no more
        if replaces and not forward.mode.has_registers and torch.is_grad_enabled():
            _replacement(tokens).found[forward] = None
        return forward, replaces
    if (forward := _recomputed(tokens, handed, patch)) is not None:
        return begin(patch, holders, forward.mode, forward.origin), True
    if handed is not None:
        handed.arrived = True
        return begin(patch, holders, handed.forward.mode, handed.forward.origin), False
    carried, now = getattr(tokens, _CARRIED, None), patch.next_mode
    if carried is not None and (carried is False) == now.has_registers:
        now = AS_IT_WAS if carried is False else Mode()
    return begin(patch, holders, now, object()), carried is None


def _goes_on(forward: Forward) -> bool:
    """Whether the forward goes on: it is running, or it was abandoned last, and its tokens are used again."""
    return is_latest(forward) or is_running(forward)


def registers_for(tokens: Tensor, forward: Forward, index: int) -> Tensor | None:
    """The registers (B, R, C) of the forward, for tokens that take the place of those that a block has handed on.

    Gradients of the registers flow back where those of the tokens do. None if another block came before.

    Raises:
        RuntimeError: the tokens have another shape than those whose place they take.
    """
    if is_recomputing():
        for earlier, found in list(_replacement(tokens).found.items()):
            if earlier.origin is forward.origin:
                return found
    if forward.index != index - 1:
        return None
    check_shape(tokens, forward.shape, index)
    handed = None if forward.handed is None else forward.handed()
    registers = forward.kept if handed is None else handed.registers()
    if registers is None:
        return None
    connected = _registers_in_graph(tokens, forward, index - 1)
    registers = (registers.detach() if connected is None else connected).to(tokens.device, tokens.dtype)
    if handed is not None:
        handed.arrived = True
    if torch.is_grad_enabled():
        _replacement(tokens).found[forward] = registers
    return registers


def check_shape(tokens: Tensor, handed_on: tuple[int, ...], index: int) -> None:
    """Raise RuntimeError if tokens that replace others have another shape."""
    if tuple(tokens.shape) != tuple(handed_on):
        raise RuntimeError(
            f"the register did not arrive at block {index}: block {index - 1} handed on tokens {tuple(handed_on)}, and "
            f"{tuple(tokens.shape)} came. Where tokens are merged, pruned or added between the blocks, the register "
            "cannot follow them: do it outside of the blocks, or under testreg.disabled(model)"
        )


def _handed(tokens: Tensor) -> Handed | None:
    handed = getattr(tokens, _HANDED, None)
    return handed if isinstance(handed, Handed) else None


def _replacement(tokens: Tensor) -> Replacement:
    replacement = getattr(tokens, _REPLACES, None)
    if not isinstance(replacement, Replacement):
        replacement = Replacement()
        setattr(tokens, _REPLACES, replacement)
    return replacement


def _recomputed(tokens: Tensor, handed: Handed | None, patch: object) -> Forward | None:
    """The forward in which the tokens took the place of others, if a backward pass recomputes it."""
    replacement = getattr(tokens, _REPLACES, None)
    if not isinstance(replacement, Replacement) or not is_recomputing():
        return None
    forwards = [each for each in replacement.found if each.patch is patch]
    own = handed is not None and handed.sequence is not None and handed.sequence.requires_grad
    if len(forwards) + own > 1:
        raise RuntimeError(
            "gradient checkpointing cannot tell which of several forwards it recomputes, since the same tensor was put "
            "between their blocks: put a clone of it into each"
        )
    return forwards[0] if forwards else None


def _registers_in_graph(tokens: Tensor, forward: Forward, index: int) -> Tensor | None:
    """The registers (B, R, C) that a block left, if the tokens were made of what it handed on; with their gradient."""
    seen: set[Any] = {None}
    nodes: deque[Any] = deque([tokens.grad_fn])
    while nodes:
        if (node := nodes.popleft()) in seen:
            continue
        seen.add(node)
        if (found := node.metadata.get(_CARRIED)) is None:
            nodes.extend(each for each, _ in node.next_functions)
        elif found[0] is forward and found[1] == index:
            return found[2]
    return None
