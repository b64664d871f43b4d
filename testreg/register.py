"""The method: test-time registers (arXiv 2506.08010, Algorithm 2).

A few MLP neurons, the *register neurons*, write the high norms that turn background patches into outlier tokens. An
extra token that starts as zeros is appended to the sequence, and in every block the register neurons' activations are
moved onto it: the patches stay clean, and attention finds its scratch space on the register.

Two pieces do it, both an instance `forward` on one module, so that nothing else of the model changes:

- `_Shift` on each MLP's second linear, whose input is the hidden activation (B, T, H), moves the neurons;
- `_Lane` on each block lets the register ride beside the tokens, so that whatever is outside the blocks (pooling,
  heads, hidden states, hooks) sees the shapes it always saw.

Shapes: B batch, T tokens of the unpatched model, P of them prefix tokens, R registers, C width, H hidden, K neurons.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from testreg.families import MASKS, Family, Tower, checkpoint_names, find_tower, unbiased
from testreg.layout import Layout
from testreg.neurons import RegisterNeurons, fingerprint, resolve

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all"]
M = TypeVar("M", bound=nn.Module)

_PATCH = "_testreg_patch"  # attribute of a patched tower
_LANE = "_testreg_lane"  # attribute of a hidden state between two patched blocks
_LAYOUT = "_testreg_layout"  # attribute of what a padded or packed block gets beside its tokens
_running = threading.local()  # its `layout` is that of the block that this thread is in


def shift(
    hidden: Tensor,
    units: Sequence[int],
    owners: Sequence[int],
    *,
    num_registers: int = 1,
    num_prefix: int = 1,
    max_over: MaxOver = "neuron",
    zero: Zero = "patches",
    valid: Tensor | None = None,
    patches: Tensor | None = None,
) -> Tensor:
    """Move the activations of register neurons onto the register tokens (Algorithm 2, the inner loop).

    For each image and neuron, the value of largest magnitude over all tokens, sign kept, is given to the register that
    owns the neuron; the neuron becomes zero on the patches and on the other registers.

    Args:
        hidden: (B, T+R, H) input of an MLP's second linear: P prefix tokens, patches, R registers.
        units: the K register neurons, as channels of `hidden`.
        owners: the register, 0 to R-1, that holds each of the K neurons.
        max_over: "neuron" takes one value for each neuron, as in the paper; "layer" one joint value for all neurons of
            the layer, as in the released code.
        zero: "patches" leaves the neurons as they are on prefix tokens, as in the released code; "all" zeroes them
            there too, as in the paper's text.
        valid: (B, T+R), which tokens are no padding and may give the value; None: all.
        patches: (1, T+R), which tokens are patches; None: all behind the prefix.

    Returns:
        (B, T+R, H). Without gradients `hidden` itself, edited in place, so that no activation is copied.
    """
    index = _index(units, hidden)
    activations = hidden.index_select(-1, index)  # (B, T+R, K)
    magnitude = activations.abs()
    if valid is not None:
        magnitude = magnitude.masked_fill(~valid.unsqueeze(-1), -1)
    if max_over == "neuron":
        peak = activations.gather(1, magnitude.max(1, keepdim=True).indices)  # (B, 1, K)
    else:
        joint = magnitude.flatten(1).max(1, keepdim=True).indices
        peak = activations.flatten(1).gather(1, joint).unsqueeze(-1).expand(-1, 1, len(units))
    if num_registers > 1:
        owned = _index(owners, hidden) == torch.arange(num_registers, device=hidden.device).unsqueeze(-1)
        peak = peak * owned  # (B, R, K)
    if patches is not None and zero == "patches":
        moved = activations.masked_fill(patches.unsqueeze(-1), 0)
    else:
        moved = activations.clone()
        moved[:, num_prefix if zero == "patches" else 0 :] = 0
    moved[:, -num_registers:] = peak
    return hidden.index_copy(-1, index, moved) if torch.is_grad_enabled() else hidden.index_copy_(-1, index, moved)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    # A cached index costs no host-to-device copy, but a fake or traced one must never outlive its trace.
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return torch.tensor(values, device=like.device)
    return _cached_index(tuple(values), like.device)


@functools.lru_cache(maxsize=1024)
def _cached_index(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return torch.tensor(values, device=device)


@dataclass(eq=False)
class _Override:
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
    enabled: bool = True
    recorded: list[Tensor] | None = None
    """Registers (B, R, C) after each block of the last forward, for `registers`."""

    def __post_init__(self) -> None:
        self.overrides: list[_Override] = []

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that make the same patch again."""
        return {"num_registers": self.num_registers, "max_over": self.max_over, "zero": self.zero}


@dataclass(eq=False)
class _Shift(_Override):
    """`shift` in front of an MLP's second linear."""

    patch: Patch
    units: tuple[int, ...]
    owners: tuple[int, ...]
    plain: Layout

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.patch.enabled:
            layout = getattr(_running, "layout", None) or getattr(_running, "recomputed", None) or self.plain
            shifted = [
                shift(
                    images,
                    self.units,
                    self.owners,
                    num_prefix=self.patch.num_prefix,
                    valid=layout.valid,
                    patches=layout.patches,
                    **self.patch.options,
                )
                for images in layout.images(hidden)
            ]
            if torch.is_grad_enabled():  # otherwise `hidden` itself was edited
                hidden = layout.of_images(shifted, hidden)
        return self.original(hidden, *args, **kwargs)


@dataclass(eq=False)
class _Lane(_Override):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(type(self.module).forward).parameters.values()
        self.parameters = tuple(each.name for each in parameters if each.kind in named)[1:]  # without self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.patch.enabled:
            return self.original(*args, **kwargs)
        arguments = dict(zip(self.parameters, args, strict=False)) | kwargs
        hidden = arguments.pop(self.parameters[0])
        if not isinstance(hidden, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a {type(hidden).__name__} of tokens (images of several sizes at "
                "once): call the model on one tensor at a time"
            )
        layout = self.family.layout(self.tower, self.plain, arguments)
        arguments = {name: self._extended(name, value, layout) for name, value in arguments.items()}
        lane = layout.join(hidden, self._register(hidden)) if self.index == 0 else self._arriving(hidden)
        outer, _running.layout = getattr(_running, "layout", None), layout
        try:
            out = self.original(lane, **arguments)
        finally:
            _running.layout = outer
        entered, (lane, *rest) = lane, out if isinstance(out, tuple) else (out,)
        if lane.shape != entered.shape:
            return out  # no tokens: DINO's blocks can be asked for their attention weights
        if self.patch.recorded is not None:
            self.patch.recorded[self.index : self.index + 1] = [layout.registers(lane)]
        tokens = layout.tokens(lane)
        if self.last:
            tokens = tokens.contiguous()
        else:
            setattr(tokens, _LANE, lane)
        return (tokens, *rest) if isinstance(out, tuple) else tokens

    def _extended(self, name: str, value: Any, layout: Layout) -> Any:
        """An argument beside the tokens, with rows for the registers."""
        if name == "is_causal" and value:
            raise NotImplementedError("causal attention hides the register, the last token, from all others")
        if value is None:
            return None
        if (extend := self.family.beside.get(name) or MASKS.get(name)) is not None:
            extended = extend(value, layout)
            if isinstance(extended, Tensor) and layout is not self.plain and torch.is_grad_enabled():
                setattr(extended, _LAYOUT, layout)
            return extended
        if isinstance(value, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a tensor {name!r} beside the tokens, and {self.family.name} does "
                "not say what the register has there: call the model without it, or under testreg.disabled(model)"
            )
        return value

    def _register(self, hidden: Tensor) -> float | Tensor:
        """Zero; in CLIP-like towers it passes the norm before the blocks and enters as its bias (C,)."""
        if self.entry_norm is None:
            return 0.0
        zero = hidden.new_zeros(1, 1, hidden.shape[-1])
        return self.entry_norm.forward(zero).to(hidden.dtype).flatten()  # .forward: hooks saw this norm already

    def _arriving(self, hidden: Tensor) -> Tensor:
        lane = getattr(hidden, _LANE, None)
        if lane is None:
            raise RuntimeError(
                f"the register did not arrive at block {self.index}: something between the blocks replaced the hidden "
                "state (an adapter, an offloading wrapper, a hook that returns a new tensor). Install it before "
                "testreg.patch(), or edit the tokens in place"
            )
        if hidden.requires_grad and not lane.requires_grad:
            raise RuntimeError(
                f"the gradient did not arrive at block {self.index} with the register: re-entrant gradient "
                "checkpointing drops it. Use use_reentrant=False"
            )
        return lane


@dataclass(eq=False)
class _Attention(_Override):
    """An attention module that may return its weights: the register's row and column are left out.

    The remaining rows sum to less than one by what the register received; they are not renormalised.
    """

    patch: Patch
    plain: Layout
    appended: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(_running, "layout", None) is None:
            # Gradient checkpointing in transformers recomputes a block from within, without its lane.
            layouts = (getattr(extra, _LAYOUT, None) for extra in (*args, *kwargs.values()))
            _running.recomputed = next((layout for layout in layouts if layout is not None), None)
        out = self.original(*args, **kwargs)
        if not self.patch.enabled or not isinstance(out, tuple) or len(out) < 2:
            return out
        layout, weights = getattr(_running, "layout", None) or self.plain, out[1]
        if isinstance(weights, Tensor):
            weights = layout.without_registers(weights, self.appended)
        elif isinstance(weights, list):  # of packed images
            weights = [each if each is None else self.plain.without_registers(each) for each in weights]
        return out[0], weights, *out[2:]


@dataclass(eq=False)
class _PadBias(_Override):
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
        return unbiased(self.original(*args, **kwargs), self.plain)


def patch(
    model: M,
    neurons: RegisterNeurons | str | os.PathLike[str] | Mapping[int, Sequence[int]] | None = None,
    *,
    top_k: int | None = None,
    num_registers: int = 1,
    max_over: MaxOver = "neuron",
    zero: Zero = "patches",
) -> M:
    """Give `model` test-time registers, in place (arXiv 2506.08010, Algorithm 2).

    Args:
        model: a vision tower, or any model that contains one (CLIP, a VLM, a classifier).
        neurons: the register neurons: a `RegisterNeurons`, the path of its JSON, `{layer: [units]}`, the name of a
            bundled list (`testreg list`), or None for the bundled list of the checkpoint that the model says it is.
        top_k: use only the best so many; None takes what the list recommends.
        num_registers: R, number of extra tokens. Each holds a share of the neurons, dealt in rank order (paper A.5).
        max_over: "neuron" moves each neuron's own largest activation (the paper); "layer" one joint value per layer
            (the released code).
        zero: where the neurons become zero: on the "patches", or on "all" tokens, CLS and trained registers included.

    Returns:
        The same object. Its outputs keep their shapes, its state_dict its keys.

    Raises:
        TypeError, ValueError: the model or an argument does not fit. Nothing has been changed then.
        RuntimeError: the model is patched already.
    """
    if num_registers < 1:
        raise ValueError(f"num_registers must be at least 1, got {num_registers}")
    if max_over not in ("neuron", "layer"):
        raise ValueError(f"max_over must be 'neuron' or 'layer', got {max_over!r}")
    if zero not in ("patches", "all"):
        raise ValueError(f"zero must be 'patches' or 'all', got {zero!r}")
    tower = find_tower(model)
    if _PATCH in tower.module.__dict__:
        raise RuntimeError("the model is already patched: call testreg.unpatch(model) first to patch it anew")
    chosen = resolve(neurons, model).cut(top_k)
    chosen.check_fits(tower.depth, tower.mlp_width)
    _warn_if_other_weights(chosen, model, tower)

    state = Patch(chosen, num_registers, max_over, zero, tower.num_prefix)
    state.overrides = list(_overrides(tower, state))
    for override in state.overrides:
        override.install()
    setattr(tower.module, _PATCH, state)
    return model


def _overrides(tower: Tower, state: Patch) -> Iterator[_Override]:
    owner = {(layer, unit): i % state.num_registers for i, (layer, unit, _) in enumerate(state.neurons.ranking)}
    by_layer = state.neurons.by_layer()
    plain = Layout(state.num_registers, tower.sequence_first)
    for i, block in enumerate(tower.blocks):
        last = i == tower.depth - 1
        yield _Lane(block.module, state, i, last, tower.family, tower.module, plain, tower.entry_norm)
        first = 0  # unit of this MLP: those that run side by side are numbered through
        for mlp in block.mlps:
            units = [unit for unit in by_layer.get(i, ()) if first <= unit < first + mlp.width]
            if units:
                local = tuple(mlp.first + unit - first for unit in units)
                owners = tuple(owner[i, unit] for unit in units)
                yield from (_Shift(reader, state, local, owners, plain) for reader in mlp.readers)
            first += mlp.width
        if block.attention is not None:
            yield _Attention(block.attention, state, plain, tower.family.appended)
        if block.bias is not None:
            module, name = block.bias
            yield _PadBias(module, state, plain, tower.family.bias_count, name)


def _warn_if_other_weights(neurons: RegisterNeurons, model: nn.Module, tower: Tower) -> None:
    expected = neurons.model.get("fingerprint")
    if expected is not None and fingerprint(tower) not in (expected, "unknown"):
        found_in = neurons.model.get("name", "another checkpoint")
        here = " = ".join(checkpoint_names(model)) or f"this {type(model).__name__} (its checkpoint is unknown)"
        warnings.warn(
            f"these register neurons were found in {found_in}, whose weights are not those of {here}: "
            "calibrate the model itself if its artefacts stay",
            stacklevel=3,
        )


def unpatch(model: M) -> M:
    """Take back what `patch` did; the model is then bit for bit what it was. Returns the same object.

    Raises:
        RuntimeError: the model is not patched, or someone has wrapped a patched `forward` since.
    """
    tower, state = _patched_tower(model)
    if any(not override.installed() for override in state.overrides):
        raise RuntimeError(
            "a forward that testreg.patch() replaced was replaced again by someone else (accelerate hooks, an "
            "adapter): remove that first, then unpatch"
        )
    for override in reversed(state.overrides):
        override.remove()
    delattr(tower, _PATCH)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, or a vision tower in it, has test-time registers."""
    return any(_PATCH in module.__dict__ for module in model.modules())


def patch_of(model: nn.Module) -> Patch:
    """The patch of a patched model: its neurons and options. Raises RuntimeError if there is none."""
    return _patched_tower(model)[1]


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Within the `with` block a patched model computes as if it were not patched, in all threads."""
    state = patch_of(model)
    before, state.enabled = state.enabled, False
    try:
        yield model
    finally:
        state.enabled = before


@contextmanager
def registers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the `with` block, the list holds the registers (B, R, C) after each block of the last forward.

    They are what the blocks give, before the tower's final norm.
    """
    state = patch_of(model)
    recorded: list[Tensor] = []
    state.recorded = recorded
    try:
        yield recorded
    finally:
        state.recorded = None


def _patched_tower(model: nn.Module) -> tuple[nn.Module, Patch]:
    for module in model.modules():
        if (state := module.__dict__.get(_PATCH)) is not None:
            return module, state
    raise RuntimeError("the model is not patched")
