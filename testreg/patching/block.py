"""A block whose tokens have registers behind them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Tower
from testreg.families.extend import MASKS, padded
from testreg.patching.attention import carry_layout
from testreg.patching.forwards import begin, end
from testreg.patching.layout import Layout
from testreg.patching.override import Override
from testreg.patching.riding import (
    carried_sequence,
    carry,
    carry_nothing,
    check_shape,
    forward_of,
    keep_forward,
    mode_from_start,
    registers_for,
)
from testreg.patching.running import Forward, Mode, record, running, running_with_layout
from testreg.patching.shift import ShiftBefore
from testreg.patching.state import Patch
from testreg.patching.static import STATE
from testreg.patching.steering import check_target_fits


@dataclass(eq=False)
class RegisterBlock(Override):
    """A block that computes on the sequence of T tokens and R registers, and hands back the T tokens.

    Whatever is outside the blocks (pooling, heads, hidden states, hooks) sees the shapes it always saw.
    """

    patch: Patch
    plain: Layout
    """Where the tokens lie unless the arguments of a call say otherwise."""
    tower: Tower
    index: int
    shifts: tuple[ShiftBefore, ...]
    holders: frozenset[type[nn.Module]]
    """Classes of the modules that hold all blocks of the tower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters = _parameters(self.module)
        self.bare = self.plain.replace(num_registers=0)
        self.last = self.index == self.tower.depth - 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # one graph for each mode: dynamo guards on what decides it
            mode = self.patch.next_mode
            return self._with_registers(args, kwargs) if mode.has_registers else self._without(mode, args, kwargs)
        forward, replaced = self._forward_of(args[0] if args else kwargs.get(self.parameters[0]))
        outer, running.forward = running.forward, forward  # not a context manager: 5 microseconds a block
        try:
            if forward.mode.has_registers:
                out = self._with_registers(args, kwargs, replaced)
            else:
                out = self._without(forward.mode, args, kwargs)
                self._tell_next(forward, out)
        finally:
            running.forward = outer
        if self.last:
            end(forward)
        return out

    def _with_registers(self, args: tuple[Any, ...], kwargs: dict[str, Any], replaced: bool = False) -> Any:
        tokens, arguments = self._by_name(args, kwargs)
        if isinstance(tokens, torch.fx.Proxy):
            return self._as_one_node(tokens, arguments)
        layout = self._checked_layout(tokens, arguments, self.plain)
        if self.patch.static is not None:
            sequence = self._with_constants(tokens, layout, replaced)
        else:
            sequence = self._enter(tokens, layout) if self.index == 0 else self._arrive(tokens, layout, replaced)
        if arguments:
            arguments = {name: self._extended(name, value, layout) for name, value in arguments.items()}
        out = self._original(sequence, arguments, layout)
        return self._hand_on(out, sequence, layout)

    def _enter(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The tokens with registers of zeros; in CLIP-like towers these pass the norm before the blocks too."""
        return layout.extend(tokens, layout.dim, first_register(self.tower, tokens))

    def _arrive(self, tokens: Tensor, layout: Layout, replaced: bool) -> Tensor:
        """The tokens with the registers that the block before has left."""
        sequence = None if replaced else carried_sequence(tokens)
        if sequence is None:
            return layout.join(tokens, self._registers_for(tokens))
        if not tokens.requires_grad:
            return sequence
        registers = layout.registers(sequence)
        if not registers.requires_grad:
            raise RuntimeError(
                f"the gradient did not arrive at block {self.index} with the register: re-entrant gradient "
                "checkpointing drops it. Use use_reentrant=False"
            )
        # Whoever waits for the gradient of the tokens (FSDP, Grad-CAM, autograd.grad) must see it come by.
        return layout.join(tokens, registers)

    def _with_constants(self, tokens: Tensor, layout: Layout, replaced: bool) -> Tensor:
        """The tokens with static registers, whatever the block before has left."""
        states = getattr(self.module, STATE).to(tokens.dtype)  # (R, C)
        if layout.sequence_first:
            states = states.unsqueeze(1)
        sequence = None if replaced or layout.lengths is not None else carried_sequence(tokens)
        if sequence is None or torch.is_grad_enabled() or sequence.requires_grad:
            return layout.extend(tokens, layout.dim, states)
        sequence.narrow(layout.dim, tokens.shape[layout.dim], layout.num_registers).copy_(states)  # saves a copy
        return sequence

    def _registers_for(self, tokens: Tensor) -> Tensor:
        """The registers that the block before has left, for tokens that replace its own."""
        registers = None
        if running.forward is not None:
            registers = registers_for(tokens, running.forward, self.index)
        elif (traced := self.patch.traced) is not None and traced[0] == self.index - 1:
            check_shape(tokens, traced[1].shape, self.index)
            registers = traced[2].to(tokens.device, tokens.dtype)
        if registers is None:
            raise RuntimeError(
                f"the register did not arrive at block {self.index}: its tokens are not those that block "
                f"{self.index - 1} has just handed on in the same forward, nor in their place. Blocks that are called "
                "by hand are called in their order, one forward after the other. In a compiled model only hooks of "
                "the blocks may replace tokens: call the model uncompiled, or edit the tokens in place"
            )
        return registers

    def _without(self, mode: Mode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block on the T tokens alone: as it was, or with the neurons moved among them."""
        if not mode.is_patched:
            return self.original(*args, **kwargs)
        tokens, arguments = self._by_name(args, kwargs)
        if isinstance(tokens, torch.fx.Proxy):
            return self._as_one_node(tokens, arguments)
        layout = self._checked_layout(tokens, arguments, self.bare)
        if self.index == 0 and mode.target is not None:
            self._check_target(mode.target, tokens, layout)
        return self._original(tokens, arguments, layout)

    def _checked_layout(self, tokens: Any, arguments: dict[str, Any], plain: Layout) -> Layout:
        """Where the tokens of a call lie; an error if the block cannot be run on them."""
        self._check_tokens(tokens)
        self._check_shifts()
        layout = plain
        if arguments or self.tower.family.layout is not None:
            layout = (self.tower.family.layout or padded)(self.tower.module, plain, arguments)
        if self.index == 0:
            self._check_use(tokens, layout)
        return layout

    def _original(self, sequence: Tensor, arguments: dict[str, Any], layout: Layout) -> Any:
        if (layout is self.plain or layout is self.bare) and running.layout is None and running.recomputed is None:
            return self.original(sequence, **arguments)
        with running_with_layout(layout):
            return self.original(sequence, **arguments)

    def _hand_on(self, out: Any, entered: Tensor, layout: Layout) -> Any:
        """The block's output with the tokens alone. Those of all blocks but the last carry the registers along."""
        sequence, *rest = out if isinstance(out, tuple) else (out,)
        if sequence.ndim != entered.ndim:
            return out  # DINO's blocks can be asked for their attention weights instead of tokens
        self._check_length(sequence, entered)
        if running.recorders:
            record(self.patch, layout.registers(sequence), self.index)
        tokens = layout.tokens(sequence)
        if self.last:
            tokens = tokens.contiguous()
            if running.forward is not None:
                keep_forward(tokens, running.forward, self.index)
        else:
            carry(tokens, sequence, layout, running.forward, self.index)
        if running.forward is None:
            hooked = bool(self.module._forward_hooks) and not self.last
            traced = (self.index, tokens, layout.registers(sequence)) if hooked else None
            if traced is not self.patch.traced:
                self.patch.traced = traced
        return (tokens, *rest) if isinstance(out, tuple) else tokens

    def _forward_of(self, tokens: Any) -> tuple[Forward, bool]:
        """The forward that this block is part of, and whether someone has replaced the tokens."""
        if not isinstance(tokens, Tensor):
            return begin(self.patch, self.holders, self.patch.next_mode, object() if self.index else None), False
        if self.index == 0:
            return begin(self.patch, self.holders, mode_from_start(tokens, self.patch)), False
        return forward_of(tokens, self.patch, self.holders, self.index)

    def _tell_next(self, forward: Forward, out: Any) -> None:
        """Let the block's output tell the next block that there are no registers."""
        tokens = out[0] if isinstance(out, tuple) else out
        if isinstance(tokens, Tensor):
            if self.last:
                keep_forward(tokens, forward, self.index)
            else:
                carry_nothing(tokens, self.plain, forward, self.index)

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The tokens, and the other arguments by name."""
        if len(args) == 1 and not kwargs:
            return args[0], {}
        if len(args) > len(self.parameters):
            raise NotImplementedError(f"block {self.index} takes arguments without a name, which testreg does not know")
        # torch.compile takes any `strict` for True in older releases: so the lengths are made equal.
        arguments = dict(zip(self.parameters[: len(args)], args, strict=True)) | kwargs
        return arguments.pop(self.parameters[0]), arguments

    def _as_one_node(self, tokens: torch.fx.Proxy, arguments: dict[str, Any]) -> torch.fx.Proxy:
        """In a graph that torch.fx traces, a patched block is one node."""
        tracer: Any = tokens.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self.module), (tokens,), arguments)

    def _extended(self, name: str, value: Any, layout: Layout) -> Any:
        """An argument beside the tokens, with rows for the registers."""
        if name == "is_causal" and value:
            raise NotImplementedError("causal attention hides the register, the last token, from all others")
        if value is None:
            return None
        if (extend := self.tower.family.block_arguments.get(name) or MASKS.get(name)) is not None:
            extended = extend(value, layout)
            if layout is not self.plain:
                carry_layout(extended, layout)
            return extended
        if isinstance(value, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a tensor {name!r} beside the tokens, and {self.tower.family.name} "
                "does not say what the register has there: call the model without it, or under testreg.disabled(model)"
            )
        return value

    def _check_use(self, tokens: Tensor, layout: Layout) -> None:
        if (layout is self.plain or layout is self.bare) and not torch.compiler.is_compiling():
            self.patch.verified_use.check(tokens.shape[layout.dim] - self.patch.num_prefix, tokens)

    def _check_target(self, target: Tensor, tokens: Tensor, layout: Layout) -> None:
        if layout.lengths is not None:
            raise NotImplementedError(
                "images are packed in one sequence here, in which a target mask has no place: steer them one at a time "
                "with a tower that takes a batch"
            )
        num_images, num_tokens = layout.batch_first(tokens).shape[:2]
        patches = num_tokens - self.patch.num_prefix if layout.patches is None else int(layout.patches.sum())
        check_target_fits(target, num_images, patches)

    def _check_tokens(self, tokens: Any) -> None:
        if not isinstance(tokens, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a {type(tokens).__name__} of tokens (images of several sizes at "
                "once): call the model on one tensor at a time"
            )

    def _check_shifts(self) -> None:
        for shift in self.shifts:
            if shift.is_bypassed():
                raise RuntimeError(
                    f"the second MLP linear of block {self.index} was replaced by a {type(shift.current).__name__} "
                    "after testreg.patch(), so its neurons would stay: call testreg.unpatch(model) and patch it again"
                )

    def _check_length(self, sequence: Tensor, entered: Tensor) -> None:
        if sequence.shape != entered.shape:
            raise NotImplementedError(
                f"block {self.index} made {tuple(sequence.shape)} of {tuple(entered.shape)}: where tokens are merged "
                "or pruned, the register cannot be told from them"
            )


def first_register(tower: Tower, tokens: Tensor) -> Tensor:
    """The register (C,) that enters block 0, for tokens of this kind: zeros, or what CLIP's norm makes of zeros."""
    register = tokens.new_zeros(1, 1, tokens.shape[-1])
    if tower.entry_norm is not None:
        register = tower.entry_norm.forward(register).to(tokens.dtype)  # .forward: hooks saw this norm already
    return register.flatten()


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of its forward; a wrapper (FSDP) takes those of what it wraps."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = tuple(each.name for each in parameters if each.kind in kinds)[1:]  # without self
    children = list(module.children())
    if not names and len(children) == 1:
        return _parameters(children[0])
    return names or ("hidden_states",)
