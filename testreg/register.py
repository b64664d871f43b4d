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
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from testreg.families import Tower, checkpoint_names, find_tower
from testreg.neurons import RegisterNeurons, fingerprint, resolve

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all"]
M = TypeVar("M", bound=nn.Module)

_PATCH = "_testreg_patch"  # attribute of a patched tower
_LANE = "_testreg_lane"  # attribute of a hidden state between two patched blocks


def shift(
    hidden: Tensor,
    units: Sequence[int],
    owners: Sequence[int],
    *,
    num_registers: int = 1,
    num_prefix: int = 1,
    max_over: MaxOver = "neuron",
    zero: Zero = "patches",
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

    Returns:
        (B, T+R, H). Without gradients `hidden` itself, edited in place, so that no activation is copied.
    """
    index = _index(units, hidden)
    activations = hidden.index_select(-1, index)  # (B, T+R, K)
    if max_over == "neuron":
        peak = activations.gather(1, activations.abs().max(1, keepdim=True).indices)  # (B, 1, K)
    else:
        joint = activations.flatten(1)
        peak = joint.gather(1, joint.abs().max(1, keepdim=True).indices).unsqueeze(-1).expand(-1, 1, len(units))
    if num_registers > 1:
        owned = _index(owners, hidden) == torch.arange(num_registers, device=hidden.device).unsqueeze(-1)
        peak = peak * owned  # (B, R, K)
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
    """A picklable replacement of one module's `forward`, which can be taken back without a trace."""

    module: nn.Module

    def __post_init__(self) -> None:
        self.previous: Callable[..., Any] | None = self.module.__dict__.get("forward")

    def install(self) -> None:
        self.module.forward = self

    def installed(self) -> bool:
        return self.module.__dict__.get("forward") is self

    def remove(self) -> None:
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

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
    token_dim: int
    enabled: bool = True

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

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.patch.enabled:
            sequence_first = self.patch.token_dim == 0
            hidden = shift(
                hidden.transpose(0, 1) if sequence_first else hidden,
                self.units,
                self.owners,
                num_prefix=self.patch.num_prefix,
                **self.patch.options,
            )
            hidden = hidden.transpose(0, 1) if sequence_first else hidden
        return self.original(hidden, *args, **kwargs)


@dataclass(eq=False)
class _Lane(_Override):
    """A block, with the registers riding beside its tokens.

    The block computes on (B, T+R, C) and hands back a view of the T tokens. That view carries the whole tensor to the
    next block as an attribute, so nothing is copied and no state is left on the module: threads, recomputation in
    gradient checkpointing and re-entrant calls do not meet.
    """

    patch: Patch
    index: int
    last: bool
    entry_norm: nn.Module | None
    beside: Mapping[str, Callable[[Any, int], Any]]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.patch.enabled:
            return self.original(hidden, *args, **kwargs)
        if not isinstance(hidden, Tensor):
            raise NotImplementedError(
                f"block {self.index} was called with a {type(hidden).__name__} of tokens (images of several sizes at "
                "once): call the model on one tensor at a time"
            )
        if args or kwargs:
            args = tuple(self._beside("", extra) for extra in args)
            kwargs = {name: self._beside(name, extra) for name, extra in kwargs.items()}
            if kwargs.get("is_causal"):
                raise NotImplementedError("causal attention hides the register, the last token, from all others")
        dim, num_tokens = self.patch.token_dim, hidden.shape[self.patch.token_dim]
        lane = torch.cat([hidden, self._new_registers(hidden)], dim) if self.index == 0 else self._arriving(hidden)
        out = self.original(lane, *args, **kwargs)
        lane, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        tokens = lane.narrow(dim, 0, num_tokens)
        if self.last:
            tokens = tokens.contiguous()
        else:
            setattr(tokens, _LANE, lane)
        return tokens if rest is None else (tokens, *rest)

    def _beside(self, name: str, extra: Any) -> Any:
        """An argument beside the tokens: one that the family knows how to extend to the registers, and no mask."""
        if name in self.beside and extra is not None:
            return self.beside[name](extra, self.patch.num_registers)
        if not isinstance(extra, Tensor):
            return extra
        # In torch.export, transformers makes a mask (B, heads, T, T) even where nothing is masked. Nobody can look into
        # it then: it gets rows like its last and visible columns, and the max is taken over all tokens.
        if extra.ndim == 4 and getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():
            num_registers = self.patch.num_registers
            mask = torch.cat([extra, extra[..., -1:, :].expand(-1, -1, num_registers, -1)], -2)
            visible = mask.new_full((*mask.shape[:-1], num_registers), float(mask.dtype is torch.bool))
            return torch.cat([mask, visible], -1)
        raise NotImplementedError(
            f"block {self.index} was called with a mask or another tensor beside the tokens, which has no row for "
            "the register: call the model without it, or under testreg.disabled(model)"
        )

    def _new_registers(self, hidden: Tensor) -> Tensor:
        """Zero tokens; in CLIP-like towers they pass the norm before the blocks and enter as its bias."""
        shape = list(hidden.shape)
        shape[self.patch.token_dim] = self.patch.num_registers
        registers = hidden.new_zeros(shape)
        if self.entry_norm is not None:
            registers = self.entry_norm.forward(registers).to(hidden.dtype)  # .forward: hooks saw this norm already
        return registers

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
class _StripAttention(_Override):
    """An attention module that returns its weights: the register's row and column are left out.

    The remaining rows sum to less than one by what the register received; they are not renormalised.
    """

    patch: Patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        if self.patch.enabled and isinstance(out, tuple) and len(out) > 1 and isinstance(out[1], Tensor):
            num_registers = self.patch.num_registers
            return out[0], out[1][..., :-num_registers, :-num_registers], *out[2:]
        return out


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

    state = Patch(chosen, num_registers, max_over, zero, tower.num_prefix, tower.token_dim)
    state.overrides = list(_overrides(tower, state))
    for override in state.overrides:
        override.install()
    setattr(tower.module, _PATCH, state)
    return model


def _overrides(tower: Tower, state: Patch) -> Iterator[_Override]:
    owner = {(layer, unit): i % state.num_registers for i, (layer, unit, _) in enumerate(state.neurons.ranking)}
    by_layer = state.neurons.by_layer()
    for i, block in enumerate(tower.blocks):
        yield _Lane(block.module, state, i, i == tower.depth - 1, tower.entry_norm, tower.family.beside)
        if units := by_layer.get(i):
            yield _Shift(block.down, state, tuple(units), tuple(owner[i, unit] for unit in units))
        if block.attention is not None:
            yield _StripAttention(block.attention, state)


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


def _patched_tower(model: nn.Module) -> tuple[nn.Module, Patch]:
    for module in model.modules():
        if (state := module.__dict__.get(_PATCH)) is not None:
            return module, state
    raise RuntimeError("the model is not patched")
