"""How the registers ride beside the tokens: what is put on a patched tower, and what the tower sees of it.

Each piece is an instance attribute on one module, mostly its `forward`, so that nothing else of the model changes:
hooks, wrapper modules and another class would all be seen by somebody.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from testreg.families import MASKS, Family, extend_bias
from testreg.neurons import RegisterNeurons
from testreg.patching.layout import Layout

if TYPE_CHECKING:
    from testreg.register import Shift

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all"]

FAR = 2  # times as many patches, or as few, as verified

_LANE = "_testreg_lane"  # attribute of a hidden state between two patched blocks; False in a forward without registers
_DECIDED = "_testreg_decided"  # attribute of what enters block 0: whether that forward has registers
_LAYOUT = "_testreg_layout"  # attribute of what a padded or packed block gets beside its tokens


class _Running(threading.local):
    """What a thread is in the middle of."""

    enabled: bool | None = None
    """Whether the block has its registers; None outside blocks, and while they are compiled."""
    recorders: tuple[tuple[Patch, list[Tensor]], ...] = ()
    """The lists that `registers` fills in this thread, and of which patch."""
    layout: Layout | None = None
    """Of the padded or packed block."""
    recomputed: Layout | None = None
    """Of the padded or packed block that gradient checkpointing recomputes from within."""


_running = _Running()
_counting = threading.Lock()  # not on the patch: a lock can be neither copied nor pickled


def layout_now(plain: Layout) -> Layout:
    """The layout of the block that this thread is in."""
    return _running.layout or _running.recomputed or plain


@contextmanager
def recording(patch: Patch) -> Iterator[list[Tensor]]:
    """Within the block the list gets the registers of the last forward of this thread."""
    recorder = patch, list[Tensor]()
    _running.recorders = (*_running.recorders, recorder)
    try:
        yield recorder[1]
    finally:
        _running.recorders = tuple(each for each in _running.recorders if each is not recorder)


@contextmanager
def _running_with(layout: Layout) -> Iterator[None]:
    outer, _running.layout = _running.layout, layout
    _running.recomputed = None  # left by a backward pass
    try:
        yield
    finally:
        _running.layout = outer


@dataclass(eq=False)
class Override:
    """A picklable replacement of one module's method, which can be taken back without a trace."""

    module: nn.Module
    method = "forward"

    def __post_init__(self) -> None:
        self.previous: Callable[..., Any] | None = self.module.__dict__.get(self.method)

    def install(self) -> None:
        setattr(self.module, self.method, self)

    def installed(self) -> bool:
        return self.module.__dict__.get(self.method) is self

    def remove(self) -> None:
        if self.previous is None:
            delattr(self.module, self.method)
        else:
            setattr(self.module, self.method, self.previous)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@dataclass(eq=False)
class Patch:
    """What `patch` did to a tower; kept on it until `unpatch`."""

    neurons: RegisterNeurons
    num_registers: int
    max_over: MaxOver
    zero: Zero
    num_prefix: int
    disabled_by: int = 0
    """How many `disabled` blocks are open, in all threads."""

    def __post_init__(self) -> None:
        self.overrides: list[Override] = []
        verified = [
            each for each in self.neurons.calibration.get("verified_at", ()) if {"grid", "dtype"} <= each.keys()
        ]
        self.verified_patches = [math.prod(each["grid"]) for each in verified]
        self.verified_dtypes = {each["dtype"] for each in verified}
        self.warns = bool(verified)

    def check_use(self, num_patches: int, hidden: Tensor) -> None:
        """Warn, once, of an image size or dtype far from all with which the neurons were verified."""
        device = hidden.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on "meta"
        dtype = str(torch.get_autocast_dtype(device) if autocast else hidden.dtype).removeprefix("torch.")
        far = all(max(num_patches / each, each / num_patches) > FAR for each in self.verified_patches)
        # What holds in a coarser dtype holds in these; not the other way round.
        if far or dtype not in self.verified_dtypes | {"float32", "float64"}:
            self.warns = False
            numbers, dtypes = " and ".join(map(str, self.verified_patches)), " and ".join(sorted(self.verified_dtypes))
            warnings.warn(
                f"the register neurons were verified on images of {numbers} patches in {dtypes}, and are used on "
                f"{num_patches} in {dtype}: they may do less there. Calibrate at this size and in this dtype too "
                "(testreg calibrate MODEL --image-size A --image-size B, --amp)",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        # The `disabled` block in which a copy is made does not end for the copy.
        return {**self.__dict__, "disabled_by": 0}

    @property
    def enabled(self) -> bool:
        """Whether the forward that this thread is in the middle of has registers, or one that starts now."""
        return self.disabled_by == 0 if _running.enabled is None else _running.enabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block, forwards that start have no registers."""
        with _counting:
            self.disabled_by += 1
        try:
            yield
        finally:
            with _counting:
                self.disabled_by -= 1

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that make the same patch again."""
        return {"num_registers": self.num_registers, "max_over": self.max_over, "zero": self.zero}


@dataclass(eq=False)
class RegisterBlock(Override):
    """A block, with the registers riding beside its tokens.

    The block computes on (B, T+R, C) and hands back a view of the T tokens. That view carries the whole tensor to the
    next block as an attribute, so nothing is copied and no state is left on the module: threads, recomputation in
    gradient checkpointing and re-entrant calls do not meet. `Layout` knows where the registers are.
    """

    patch: Patch
    index: int
    last: bool
    family: Family
    tower: nn.Module
    plain: Layout
    entry_norm: nn.Module | None
    shifts: tuple[Shift, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters = _parameters(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # one graph for each state: a guard on the count sees to it
            return self._ridden(*args, **kwargs) if self.patch.disabled_by == 0 else self.original(*args, **kwargs)
        outer = _running.enabled
        _running.enabled = self._decided(args[0] if args else kwargs.get(self.parameters[0]))
        try:
            return self._ridden(*args, **kwargs) if _running.enabled else self._plain(*args, **kwargs)
        finally:
            _running.enabled = outer

    def _decided(self, hidden: Any) -> bool:
        """Whether this forward has registers: that is decided at block 0, and rides with the tokens from there.

        So `disabled`, in whatever thread, never meets a forward halfway, nor gradient checkpointing that recomputes it.
        """
        now = self.patch.disabled_by == 0
        if not isinstance(hidden, Tensor):
            return now
        if self.index > 0:
            carried = getattr(hidden, _LANE, None)
            if carried is None:
                carried = _handed_on(hidden)
            return now if carried is None else carried is not False
        if torch._C._current_graph_task_id() != -1:  # a backward pass recomputes the block
            return getattr(hidden, _DECIDED, now)
        if torch.is_grad_enabled():
            setattr(hidden, _DECIDED, now)
        return now

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        """The block without registers, which tells the next one so."""
        out = self.original(*args, **kwargs)
        tokens = out[0] if isinstance(out, tuple) else out
        if not self.last and isinstance(tokens, Tensor):
            setattr(tokens, _LANE, False)
            if tokens.grad_fn is not None:
                metadata: Any = tokens.grad_fn.metadata
                metadata[_LANE] = False
        return out

    def _ridden(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self.parameters):
            raise NotImplementedError(f"block {self.index} takes arguments without a name, which testreg does not know")
        # torch.compile takes any `strict` for True in older releases: so the lengths are made equal.
        arguments = dict(zip(self.parameters[: len(args)], args, strict=True)) | kwargs
        hidden = arguments.pop(self.parameters[0])
        if isinstance(hidden, torch.fx.Proxy):  # a patched block is one node of the traced graph
            tracer: Any = hidden.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self.module), (hidden,), arguments)
        if not isinstance(hidden, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a {type(hidden).__name__} of tokens (images of several sizes at "
                "once): call the model on one tensor at a time"
            )
        for shift in self.shifts:
            if shift.holder is not shift.module and shift.module not in set(shift.holder.modules()):
                raise RuntimeError(
                    f"the second MLP linear of block {self.index} was replaced by a {type(shift.holder).__name__} "
                    "after testreg.patch(), so its neurons would stay: call testreg.unpatch(model) and patch it again"
                )
        layout = self.family.layout(self.tower, self.plain, arguments)
        arguments = {name: self._extended(name, value, layout) for name, value in arguments.items()}
        lane = self._entering(hidden, layout) if self.index == 0 else self._arriving(hidden, layout)
        if layout is self.plain and _running.layout is _running.recomputed is None:
            out = self.original(lane, **arguments)
        else:
            with _running_with(layout):
                out = self.original(lane, **arguments)
        entered, (lane, *rest) = lane, out if isinstance(out, tuple) else (out,)
        if lane.ndim != entered.ndim:
            return out  # no tokens: DINO's blocks can be asked for their attention weights
        if lane.shape != entered.shape:
            raise NotImplementedError(
                f"block {self.index} made {tuple(lane.shape)} of {tuple(entered.shape)}: where tokens are merged or "
                "pruned, the register cannot be told from them"
            )
        for patch, recorded in _running.recorders:
            if patch is self.patch:
                recorded[self.index : self.index + 1] = [layout.registers(lane)]
        tokens = layout.tokens(lane)
        if self.last:
            tokens = tokens.contiguous()
        else:
            setattr(tokens, _LANE, lane)
            if not torch.compiler.is_compiling() and tokens.grad_fn is not None:
                # For whoever hands on another tensor. A copy, so that the graph does not keep the lane's memory.
                metadata: Any = tokens.grad_fn.metadata
                metadata[_LANE] = layout.registers(lane)
        return (tokens, *rest) if isinstance(out, tuple) else tokens

    def _extended(self, name: str, value: Any, layout: Layout) -> Any:
        """An argument beside the tokens, with rows for the registers."""
        if name == "is_causal" and value:
            raise NotImplementedError("causal attention hides the register, the last token, from all others")
        if value is None:
            return None
        if (extend := self.family.block_arguments.get(name) or MASKS.get(name)) is not None:
            extended = extend(value, layout)
            holds_layout = isinstance(extended, (Tensor, BlockMask))  # no union, which torch 2.9 does not compile
            if holds_layout and layout is not self.plain and torch.is_grad_enabled():
                setattr(extended, _LAYOUT, layout)
            return extended
        if isinstance(value, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a tensor {name!r} beside the tokens, and {self.family.name} does "
                "not say what the register has there: call the model without it, or under testreg.disabled(model)"
            )
        return value

    def _entering(self, hidden: Tensor, layout: Layout) -> Tensor:
        """With zero tokens; in CLIP-like towers they pass the norm before the blocks and enter as its bias."""
        if self.patch.warns and layout is self.plain and not torch.compiler.is_compiling():
            self.patch.check_use(hidden.shape[layout.dim] - self.patch.num_prefix, hidden)
        register = hidden.new_zeros(1, 1, hidden.shape[-1])
        if self.entry_norm is not None:
            register = self.entry_norm.forward(register).to(hidden.dtype)  # .forward: hooks saw this norm already
        return layout.extend(hidden, layout.dim, register.flatten())

    def _arriving(self, hidden: Tensor, layout: Layout) -> Tensor:
        lane: Tensor | None = getattr(hidden, _LANE, None)
        if lane is not None and not hidden.requires_grad:
            return lane
        registers = layout.registers(lane) if lane is not None else _handed_on(hidden)
        if not isinstance(registers, Tensor):
            raise RuntimeError(
                f"the register did not arrive at block {self.index}: something between the blocks replaced the hidden "
                "state (an adapter, an offloading wrapper, a hook that returns a new tensor). Install it before "
                "testreg.patch(), or edit the tokens in place"
            )
        if hidden.requires_grad and not registers.requires_grad:
            raise RuntimeError(
                f"the gradient did not arrive at block {self.index} with the register: re-entrant gradient "
                "checkpointing drops it. Use use_reentrant=False"
            )
        # Whoever waits for the gradient of the tokens (FSDP, Grad-CAM, autograd.grad) must see it come by.
        return layout.join(hidden, registers)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of its forward; a wrapper (FSDP) takes those of what it wraps."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(type(module).forward).parameters.values()
    names = tuple(each.name for each in parameters if each.kind in kinds)[1:]  # without self
    children = list(module.children())
    if not names and len(children) == 1:
        return _parameters(children[0])
    return names or ("hidden_states",)


def _handed_on(hidden: Tensor) -> Tensor | bool | None:
    """The registers (False: without) of tokens that arrive as another tensor, behind autograd functions of Python.

    FSDP2 and full backward hooks put such functions around a block; they return what they are given.
    """
    if torch.compiler.is_compiling():
        return None
    node, output = hidden.grad_fn, hidden.output_nr
    while isinstance(node, torch.autograd.function.BackwardCFunction) and output < len(node.next_functions):
        node, output = node.next_functions[output]
    return None if node is None else node.metadata.get(_LANE)  # type: ignore[attr-defined]


@dataclass(eq=False)
class Attention(Override):
    """An attention module that may return its weights: the register's row and column are left out.

    The remaining rows sum to less than one by what the register received; they are not renormalised.
    """

    patch: Patch
    plain: Layout
    appended: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _running.layout is None:
            # Gradient checkpointing in transformers recomputes a block from within, without its lane.
            layout: Layout | None = None
            for extra in (*args, *kwargs.values()):
                layout = getattr(extra, _LAYOUT, layout)
            if layout is not _running.recomputed:
                _running.recomputed = layout
        out = self.original(*args, **kwargs)
        if not self.patch.enabled or not isinstance(out, tuple) or len(out) < 2:
            return out
        weights = out[1]
        if isinstance(weights, Tensor):
            weights = layout_now(self.plain).without_registers(weights, self.appended)
        elif isinstance(weights, list):  # of packed images
            weights = [each if each is None else self.plain.without_registers(each) for each in weights]
        return out[0], weights, *out[2:]


@dataclass(eq=False)
class Bias(Override):
    """A method that makes a relative position bias (..., T, T): it has none for the registers."""

    patch: Patch
    plain: Layout
    count: str
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.patch.enabled:
            return self.original(*args, **kwargs)
        if self.count in kwargs:
            kwargs[self.count] -= self.patch.num_registers
        return extend_bias(self.original(*args, **kwargs), self.plain)


@dataclass(frozen=True)
class Refusal:
    """In place of a method by which torch copies modules and leaves their patched `forward` behind."""

    message: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(self.message)


REFUSALS = {
    "_replicate_for_data_parallel": Refusal(
        "nn.DataParallel copies modules in a way that loses the patch: use DistributedDataParallel for several GPUs"
    ),
    "__prepare_scriptable__": Refusal(
        "torch.jit.script cannot compile a patched model: use torch.compile, torch.export or torch.jit.trace"
    ),
}
