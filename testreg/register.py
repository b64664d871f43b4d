"""The method: test-time registers (arXiv 2506.08010, Algorithm 2).

A few MLP neurons, the *register neurons*, write the high norms that turn background patches into outlier tokens. An
extra token that starts as zeros is appended to the sequence, and in every block the register neurons' activations are
moved onto it: the patches stay clean, and attention finds its scratch space on the register.

Two pieces do it, both an instance `forward` on one module, so that nothing else of the model changes:

- `Shift` on each MLP's second linear, whose input is the hidden activation (B, T, H), moves the neurons;
- `RegisterBlock` on each block lets the register ride beside the tokens, so that whatever is outside the blocks
  (pooling, heads, hidden states, hooks) sees the shapes it always saw.

Shapes: B batch, T tokens of the unpatched model, P of them prefix tokens, R registers, C width, H hidden, K neurons.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from testreg.families import Tower, checkpoint_names, find_tower
from testreg.neurons import RegisterNeurons, UnverifiedNeuronsWarning, fingerprint, plain, resolve, shown
from testreg.patching.block import (
    REFUSALS,
    Attention,
    Bias,
    MaxOver,
    Override,
    Patch,
    RegisterBlock,
    Zero,
    layout_now,
    recording,
)
from testreg.patching.layout import Layout

M = TypeVar("M", bound=nn.Module)

MAX_REGISTERS = 256  # as many as an image of 224 pixels has patches

_PATCH = "_testreg_patch"  # attribute of a patched tower
_log = logging.getLogger("testreg")


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
        moved[:, num_prefix if zero == "patches" else 0 :].zero_()  # not `= 0`, a constant to strict export
    moved[:, -num_registers:] = peak
    return hidden.index_copy(-1, index, moved) if torch.is_grad_enabled() else hidden.index_copy_(-1, index, moved)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    # A cached index costs no host-to-device copy, but a fake or traced one must never outlive its trace.
    if torch.compiler.is_dynamo_compiling() and _is_exporting():
        # Strict export names a constant by the path on which it was found, which leads through our `forward` and is
        # not in the exported module: so there is none.
        return torch.stack([torch.full((), value, device=like.device) for value in values])
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(like) is not Tensor:
        return torch.tensor(values, device=like.device)
    return _cached_index(tuple(values), like.device)


def _is_exporting() -> bool:
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


@functools.lru_cache(maxsize=1024)
def _cached_index(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return torch.tensor(values, device=device)


@dataclass(eq=False)
class Shift(Override):
    """`shift` in front of an MLP's second linear."""

    patch: Patch
    units: tuple[int, ...]
    owners: tuple[int, ...]
    plain: Layout
    parent: nn.Module
    name: str

    @property
    def holder(self) -> nn.Module:
        """What is now where our module was: the module itself, or what has wrapped or replaced it since."""
        return self.parent._modules[self.name]  # type: ignore[return-value]  # getattr gives a copy in torch.export

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.patch.enabled:
            given = hidden
            layout = layout_now(self.plain)
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
                if self.holder is not self.module:
                    given.copy_(hidden)  # an adapter around the linear reads the same activation
                    hidden = given
        return self.original(hidden, *args, **kwargs)


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
        num_registers: R, number of extra tokens, at most 256. Each holds a share of the neurons, dealt in rank order
            (paper A.5).
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
    if num_registers > MAX_REGISTERS:
        raise ValueError(f"num_registers must be at most {MAX_REGISTERS}, got {shown(num_registers)}: 1 to 4 do")
    if max_over not in ("neuron", "layer"):
        raise ValueError(f"max_over must be 'neuron' or 'layer', got {max_over!r}")
    if zero not in ("patches", "all"):
        raise ValueError(f"zero must be 'patches' or 'all', got {zero!r}")
    tower = find_tower(model)
    if _PATCH in tower.module.__dict__:
        raise RuntimeError("the model is already patched: call testreg.unpatch(model) first to patch it anew")
    chosen = resolve(neurons, model).truncate(top_k)
    chosen.check_fits(tower.depth, tower.mlp_width)
    _warn_if_other_weights(chosen, model, tower)
    if chosen.has_to_be_trusted:
        warnings.warn(
            f"the register neurons of {chosen.source or 'this list'} are not verified: no measurement on images shows "
            "what they do in this checkpoint. testreg.diagnose tells whether it has outliers at all, testreg.calibrate "
            "finds and verifies neurons for it",
            UnverifiedNeuronsWarning,
            stacklevel=_stacklevel(),
        )

    state = Patch(chosen, num_registers, max_over, zero, tower.num_prefix)
    state.overrides = list(_overrides(tower, state))
    for override in state.overrides:
        override.install()
    vars(tower.module).update(REFUSALS, **{_PATCH: state})
    if neurons is None:
        _log.info(
            "patched %s with the bundled list %s: %d register neurons of %s, %s",
            type(model).__name__,
            chosen.source,
            len(chosen.ranking),
            _origin(chosen),
            "verified" if chosen.verified else "not verified",
        )
    return model


def _origin(neurons: RegisterNeurons) -> str:
    """Who found them."""
    source = neurons.provenance.get("source")
    found_by = source.get("repo") or source.get("command") if isinstance(source, Mapping) else source
    return plain(found_by or "unknown origin")


def _stacklevel() -> int:
    """Of the code outside testreg that called into it, seen from the function that calls this one."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "testreg":
        frame, level = frame.f_back, level + 1
    return level


def _overrides(tower: Tower, state: Patch) -> Iterator[Override]:
    owner = {(layer, unit): i % state.num_registers for i, (layer, unit, _) in enumerate(state.neurons.ranking)}
    by_block = state.neurons.by_block()
    plain = Layout(state.num_registers, tower.sequence_first)
    for i, block in enumerate(tower.blocks):
        shifts: list[Shift] = []
        first = 0  # unit of this MLP: those that run side by side are numbered through
        for mlp in block.mlps:
            units = [unit for unit in by_block.get(i, ()) if first <= unit < first + mlp.width]
            channels = tuple(mlp.first + unit - first for unit in units)
            owners = tuple(owner[i, unit] for unit in units)
            for reader in mlp.consumers if units else ():
                shifts.append(Shift(reader, state, channels, owners, plain, *_place(reader, block.module)))
            first += mlp.width
        yield from shifts
        last = i == tower.depth - 1
        yield RegisterBlock(
            block.module, state, i, last, tower.family, tower.module, plain, tower.entry_norm, tuple(shifts)
        )
        if block.attention is not None:
            yield Attention(block.attention, state, plain, tower.family.appended)
        if block.bias is not None:
            module, name = block.bias
            yield Bias(module, state, plain, tower.family.bias_count, name)


def _place(module: nn.Module, root: nn.Module) -> tuple[nn.Module, str]:
    """The parent of `module` within `root`, and its name there."""
    return next((parent, name) for parent in root.modules() for name, each in parent.named_children() if each is module)


def _warn_if_other_weights(neurons: RegisterNeurons, model: nn.Module, tower: Tower) -> None:
    expected = neurons.model.get("fingerprint")
    if expected is not None and fingerprint(tower) not in (expected, "unknown"):
        found_in = plain(neurons.model.get("name", "another checkpoint"))
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
    for name in (_PATCH, *REFUSALS):
        delattr(tower, name)
    return model


@contextmanager
def patched(
    model: M,
    neurons: RegisterNeurons | str | os.PathLike[str] | Mapping[int, Sequence[int]] | None = None,
    **options: Any,
) -> Iterator[M]:
    """Within the `with` block `model` has test-time registers; the arguments are those of `patch`."""
    patch(model, neurons, **options)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, or a vision tower in it, has test-time registers."""
    return any(_PATCH in module.__dict__ for module in model.modules())


def patch_of(model: nn.Module) -> Patch:
    """The patch of a patched model: its neurons and options. Raises RuntimeError if there is none."""
    return _patched_tower(model)[1]


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Within the `with` block a patched model computes as if it were not patched, in all threads.

    Blocks nest and overlap: the registers are back when the last one has ended. A forward that runs meanwhile, in
    another thread, ends as it began.
    """
    with patch_of(model).disabled():
        yield model


@contextmanager
def registers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the `with` block, the list holds the registers (B, R, C) after each block of the last forward.

    They are what the blocks give, before the tower's final norm. The forwards are those of the thread that the `with`
    block is in; blocks nest and overlap, and each has a list of its own.
    """
    with recording(patch_of(model)) as recorded:
        yield recorded


def _patched_tower(model: nn.Module) -> tuple[nn.Module, Patch]:
    for module in model.modules():
        if (state := module.__dict__.get(_PATCH)) is not None:
            return module, state
    raise RuntimeError("the model is not patched")
