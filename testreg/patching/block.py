"""A patched block, which appends registers to its tokens; `patching.forward` tells how they reach the next block."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from testreg.families import Tower
from testreg.families.extend import MASKS, padded
from testreg.families.layout import Layout
from testreg.patching.attention import carry_layout
from testreg.patching.fc2 import MoveInFront
from testreg.patching.forward import (
    CARRIED,
    Call,
    Forward,
    Handoff,
    Mode,
    begin,
    carried,
    carry_through_hooks,
    first_of,
    is_recomputing,
    registers_for,
    running,
    take_left_by_compiled,
    with_first,
)
from testreg.patching.index import is_exporting
from testreg.patching.override import Override
from testreg.patching.state import STATE, Patch


@dataclass(eq=False)
class RegisterBlock(Override):
    """The `forward` of a patched block: it computes on T tokens and R registers, and returns the T tokens.

    Everything outside the blocks (pooling, heads, hidden states, hooks) sees the shapes of the unpatched model.
    """

    patch: Patch
    default_layout: Layout
    """The layout of the tokens, unless the arguments of a call say otherwise."""
    tower: Tower
    index: int
    moves: tuple[MoveInFront, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.argument_names = _argument_names(self.module)
        self.layout_without_registers = self.default_layout.replace(num_registers=0)
        self.is_entry = self.index == self.patch.entry_block
        self.is_last = self.index == self.tower.depth - 1
        # If testreg had replaced the block's `forward` method before (`BlockCache`), that method may skip the block. So
        # it is no error here if no neurons are moved.
        required = () if isinstance(self.previous, Override) else self.moves
        self.required_moves = sum(move.is_always_called for move in required)

    # A call of the block, steps 1 to 8 in forward.py -----------------------------------------------------------------
    #
    # block(tokens) -> BlockCall -> run_call -> the module's own call, with its hooks -> __call__: finds the registers
    # -> _run: the block's own forward on T+R tokens -> _hand_on: T tokens, which carry the registers.
    # block.forward(tokens) -> __call__ -> run_call -> __call__ -> _run -> _hand_on.

    def run_call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block by `function`, which runs its forward between its hooks, and keep track of the call.

        If `block.forward(...)` was called instead of `block(...)`, `function` is that forward, and no hooks run.
        """
        outer, call = running.call, Call(self, self._tokens(args, kwargs))
        running.call = call
        try:
            out = function(*args, **kwargs)
            if call.forward is None and self.patch.mode_for_new_forward.is_patched:
                raise RuntimeError(
                    f"the forward of block {self.index}, which testreg.patch() replaced, was replaced again, without "
                    "registers: call testreg.unpatch(model), make the changes, and patch the model last"
                )
            return carry_through_hooks(out, call)
        finally:
            running.call = outer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode = self.patch.mode_for_new_forward
        if torch.compiler.is_compiling():  # dynamo makes one graph for each mode: it guards on what decides the mode
            return self._run(None, mode, None, args, kwargs)
        call = running.call
        if call is None or call.block is not self or call.forward is not None:  # `block.forward(...)`, not `block(...)`
            return self.run_call(self, args, kwargs)
        tokens = self._tokens(args, kwargs)
        if self.is_entry or not isinstance(tokens, Tensor):
            call.forward, registers = begin(self.patch, mode, call.argument), None
        else:
            call.forward, registers = self._arriving(tokens, call, mode)
        return self._run(call, call.forward.mode, registers, args, kwargs)

    def _arriving(self, tokens: Tensor, call: Call, mode: Mode) -> tuple[Forward, Tensor | None]:
        """The forward and the registers that the tokens carry, or those carried that a hook has replaced by them."""
        handoff = carried(call.argument, self.patch)
        if handoff is None:
            return Forward(self.patch, mode), self._left_by_compiled(tokens)
        if handoff.forward.mode.has_registers and tokens.shape != handoff.shape:
            raise RuntimeError(
                f"the register did not arrive at block {self.index}: block {self.index - 1} handed on tokens "
                f"{tuple(handoff.shape)}, and {tuple(tokens.shape)} came. Where images leave the batch, or tokens are "
                "merged, pruned or added, the register cannot follow them: use testreg.disabled(model)"
            )
        needs_gradient = call.argument.grad_fn is not None  # type: ignore[attr-defined]
        if needs_gradient and handoff.registers is not None and not handoff.registers.requires_grad:
            raise RuntimeError(
                f"the gradient did not arrive at block {self.index} with the register: re-entrant gradient "
                "checkpointing drops it. Use use_reentrant=False"
            )
        return handoff.forward, registers_for(tokens, handoff)

    def _run(
        self, call: Call | None, mode: Mode, registers: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block's own forward on tokens and registers; in a mode without registers, on the tokens alone.

        `call` is None while the block is compiled.
        """
        if not mode.is_patched:
            return self._hand_on(call, self.original(*args, **kwargs), None, self.layout_without_registers)
        tokens, arguments = self._by_name(args, kwargs)
        if isinstance(tokens, torch.fx.Proxy):  # torch.fx traces: the block becomes one node
            tracer: Any = tokens.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self.module), (tokens,), arguments)
        if not isinstance(tokens, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a {type(tokens).__name__} of tokens (images of several sizes at "
                "once): call the model on one tensor at a time"
            )
        for move in self.moves:
            move.check()
        layout = self.default_layout if mode.has_registers else self.layout_without_registers
        if arguments or self.tower.family.layout is not None:
            layout = (self.tower.family.layout or padded)(self.tower.module, layout, arguments)
        is_usual = layout is self.default_layout or layout is self.layout_without_registers
        if self.is_entry and is_usual and not torch.compiler.is_compiling():
            self.patch.verified_use.check(tokens.shape[layout.dim] - self.patch.num_prefix, tokens)
        sequence = tokens
        if mode.has_registers:
            sequence = self._with_registers(tokens, registers, layout)
            arguments = {name: self._extended(name, value, layout) for name, value in arguments.items()}
        return self._hand_on(call, self._run_with_moves(sequence, arguments, layout), sequence, layout)

    def _with_registers(self, tokens: Tensor, registers: Tensor | None, layout: Layout) -> Tensor:
        """The tokens, with this block's registers behind those of each image."""
        if self.patch.static is not None:
            states = getattr(self.module, STATE).to(tokens.dtype)  # (R, C)
            return layout.extend(tokens, layout.dim, states.unsqueeze(1) if layout.sequence_first else states)
        if self.is_entry:
            return layout.join(tokens, self.first_registers(tokens, layout))
        if torch.compiler.is_compiling():
            handoff = carried(tokens, self.patch)  # of an eager block
            registers = self._left_by_compiled(tokens) if handoff is None else handoff.registers
        if registers is None and is_recomputing():
            raise RuntimeError(
                f"block {self.index} is recomputed from an input that was saved elsewhere (save_on_cpu, offload), "
                "without its register: offload no inputs of blocks, only what is inside of them"
            )
        if registers is None:
            raise RuntimeError(
                f"the register did not arrive at block {self.index}: its tokens are not the tensor that block "
                f"{self.index - 1} handed on to it. Edit that tensor in place, or replace it in a forward hook of that "
                "block; do not detach it in between. Where images leave the batch, or tokens are merged or pruned, use "
                "testreg.disabled(model)"
            )
        return layout.join(tokens, registers)

    def _left_by_compiled(self, tokens: Tensor) -> Tensor | None:
        """The registers that the previous block left, if it was compiled: on these tokens, or for what hooks return."""
        left = take_left_by_compiled(self.patch, self.index - 1, tokens)
        on_tokens = getattr(tokens, CARRIED, None)
        return on_tokens if isinstance(on_tokens, Tensor) else left

    def first_registers(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The registers (B, R, C) with which these tokens enter: zeros, or the mean of their image's patches.

        The mean of patches that differ has a smaller norm than they have, so it is scaled to the mean of their norms.
        """
        if self.patch.start == "mean":
            means = layout.patch_means(tokens, self.patch.num_prefix)
            mean_norms = layout.patch_means(tokens.norm(dim=-1, keepdim=True), self.patch.num_prefix)
            return (F.normalize(means, dim=-1) * mean_norms).expand(-1, self.patch.num_registers, -1)
        zeros = tokens.new_zeros(1, 1, tokens.shape[-1])
        if (norm := self.tower.entry_norm) is not None:
            zeros = norm.forward(zeros).to(tokens.dtype)  # all tokens went through it; .forward calls no hooks
        return zeros.expand(layout.num_images(tokens), self.patch.num_registers, -1)

    def _run_with_moves(self, sequence: Tensor, arguments: dict[str, Any], layout: Layout) -> Any:
        """Run the block's own forward, in which the neurons are moved; raise RuntimeError if they were not."""
        outer = running.layout, running.moves
        running.layout, running.moves, running.recomputed = layout, 0, None
        try:
            out = self.original(sequence, **arguments)
            is_moved = running.moves >= self.required_moves or is_exporting()
        finally:
            running.layout, running.moves = outer
        if not is_moved and _is_tokens(first_of(out), sequence):
            raise RuntimeError(
                f"block {self.index} does not call its second MLP linear, or replaces what is in front of it, so that "
                "its neurons are not moved: call testreg.unpatch(model), make the changes, and patch the model last"
            )
        return out

    def _hand_on(self, call: Call | None, out: Any, entered: Tensor | None, layout: Layout) -> Any:
        """The block's output without registers, as the next block or the model gets it.

        The tokens carry the registers to the next block; those of the last block carry nothing.
        """
        registers = None
        if layout.num_registers and entered is not None:
            sequence = first_of(out)
            if not _is_tokens(sequence, entered):
                return out  # DINO's blocks can be asked for their attention weights instead of tokens
            if sequence.shape != entered.shape:
                raise NotImplementedError(
                    f"block {self.index} made {tuple(sequence.shape)} of {tuple(entered.shape)}: where tokens are "
                    "merged or pruned, the register cannot be told from them"
                )
            registers = layout.registers(sequence)
            for recorder in running.recorders:
                recorder.record(registers, self.patch, self.index)
            strip = lambda each: layout.tokens(each).contiguous() if each.shape == entered.shape else each
            out = strip(out) if out is sequence else tree_map_only(Tensor, strip, out)
        tokens = first_of(out)
        if self.is_last or not isinstance(tokens, Tensor):
            return out
        if call is not None and call.forward is not None:
            setattr(tokens, CARRIED, Handoff(call.forward, registers, tokens.shape))
            call.tokens = tokens
        elif registers is not None:
            setattr(tokens, CARRIED, registers)
            if self.module._forward_hooks:
                running.compiled = self.patch, self.index, tuple(tokens.shape), registers
        return out

    # Arguments beside the tokens -------------------------------------------------------------------------------------

    def _tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs.get(self.argument_names[0])

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The tokens, and the other arguments by name."""
        if len(args) == 1 and not kwargs:
            return args[0], {}
        if len(args) > len(self.argument_names):
            raise NotImplementedError(f"block {self.index} takes arguments without a name, which testreg does not know")
        # The names are cut to as many as `args`: even with `strict=False`, older torch.compile wants equal lengths.
        arguments = dict(zip(self.argument_names[: len(args)], args, strict=True)) | kwargs
        return arguments.pop(self.argument_names[0]), arguments

    def _extended(self, name: str, value: Any, layout: Layout) -> Any:
        """An argument other than the tokens, extended by rows for the registers."""
        if name == "is_causal" and value:
            raise NotImplementedError("causal attention hides the register, the last token, from all others")
        if value is None:
            return None
        if (extend := self.tower.family.block_arguments.get(name) or MASKS.get(name)) is not None:
            extended = extend(value, layout)
            if layout is not self.default_layout:
                carry_layout(extended, layout)
            return extended
        if isinstance(value, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a tensor {name!r} beside the tokens, and {self.tower.family.name} "
                "does not say what the register has there: call the model without it, or under testreg.disabled(model)"
            )
        return value


@dataclass(eq=False)
class BlockCall(Override):
    """The call of a block with its hooks: if a hook replaces the block's tokens, the new ones get the registers."""

    method = "_call_impl"
    block: RegisterBlock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.block.run_call(self.original, args, kwargs)
        out = self.original(*args, **kwargs)
        tokens = first_of(out)
        registers = take_left_by_compiled(self.block.patch, self.block.index, tokens)
        if registers is None:
            return out
        view = tokens.view_as(tokens)
        setattr(view, CARRIED, registers)
        return with_first(out, view)


def _is_tokens(out: Any, entered: Tensor) -> bool:
    return isinstance(out, Tensor) and out.ndim == entered.ndim


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward; of a wrapper (FSDP), those of the module that it wraps."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = tuple(each.name for each in parameters if each.kind in kinds)[1:]  # without self
    children = list(module.children())
    if not names and len(children) == 1:
        return _argument_names(children[0])
    return names or ("hidden_states",)
