"""The method: test-time registers (arXiv 2506.08010, Algorithm 2).

A few MLP neurons, the *register neurons*, give high norms to background patches, which the model then uses as scratch
space. An extra token, the *register* (which starts as zeros in the paper), is put behind the tokens, and the
activations of the register neurons are moved onto it: the patches stay clean, and the model uses the register instead.

`patch` does two things to each block of the tower:

1. In front of the second MLP linear (fc2), and of every hook on it, the register neurons' activations are moved:
   `hidden = shift(hidden, units, num_registers=R, num_prefix=P)`, hidden (B, T+R, H); `patching.moves`.
2. The block's `forward` appends the registers to its T tokens, calls the block's own, and hands back T tokens, which
   carry the registers to the next block: "The life of a forward", in `patching.forward`.

Shapes: B batch, T tokens of the unpatched model, P of them prefix tokens, R registers, C width, H hidden, K neurons.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from testreg.extensions.static_parts import static_parts
from testreg.extensions.steering import check_target
from testreg.families import find_tower
from testreg.neurons import AnyNeurons, RegisterNeurons, resolve
from testreg.neurons.notices import log_bundled, warn_of_activation, warn_of_other_weights, warn_of_unverified
from testreg.patching.forward import Forward, running
from testreg.patching.moves import shift as shift
from testreg.patching.placement import parts
from testreg.patching.state import Patch, find_patch, patch_of
from testreg.records.options import MaxOver, Start, Zero, check_options, default_zero
from testreg.static import AnyStatic, resolve_static

M = TypeVar("M", bound=nn.Module)
_counting = threading.Lock()  # of `disabled` contexts; not on the patch, since a lock can be neither copied nor pickled


def patch(
    model: M,
    neurons: AnyNeurons = None,
    *,
    top_k: int | None = None,
    num_registers: int | None = None,
    split_neurons: bool = False,
    max_over: MaxOver = "neuron",
    zero: Zero | None = None,
    start: Start | None = None,
    static: AnyStatic = None,
    target: Tensor | None = None,
) -> M:
    """Give `model` test-time registers, in place (arXiv 2506.08010, Algorithm 2).

    Example:
        >>> outputs = testreg.patch(model, {1: [3, 77], 2: [64]})(images)

    Args:
        model: a vision tower, or any model that contains one (CLIP, a VLM, a classifier).
        neurons: the register neurons: a `RegisterNeurons`, the path of its JSON, `{block: [units]}`, the name of a
            bundled list (`testreg list`), or None for those of `static`, if it is given, and else for the bundled
            list of the checkpoint that the model holds, by its name or its weights.
        top_k: use only the best `top_k` of the list; None takes as many as the list recommends.
        num_registers: R, the extra tokens, at most 256, each of which holds all of the neurons (but see
            `split_neurons`); None takes as many as `static` has, or as the list recommends.
        split_neurons: share the neurons out among the registers by rank (paper A.5), so that each holds some of them.
        max_over: "neuron" moves the largest value of each neuron (paper), "layer" the largest of all neurons of a
            block, for each of them (released code).
        zero: where the moved neurons become zero: on all "patches" (released code), on "all" tokens, CLS included
            (paper), or on patches where they are "firing" (where they are at rest they keep their value, which is a
            little below zero with GELU and SiLU). None: "firing" if registers start as the mean, else "patches".
        start: "zeros" (paper): registers enter block 0 as zeros. "mean": they enter the first block that has register
            neurons as the mean of their image's patches, brought to these patches' mean norm, and earlier blocks are
            not changed. None takes what `static` has, or what the list recommends.
        static: constants that replace the states of the registers, from `testreg.make_static`, or their file's path.
        target: a mask of patches that take the register's place in every forward, as in `testreg.steered`.

    Returns:
        The same object. Its outputs keep their shapes, its state_dict its keys. Hooks inside a block see T+R tokens,
            but T within `testreg.hooks_without_registers`. `testreg.attention` and `testreg.features` return no
            registers.

    Raises:
        TypeError, ValueError: the model or an argument does not fit. Nothing has been changed then.
        RuntimeError: the model is patched already.
    """
    check_options(num_registers, max_over, zero, start)
    if target is not None:
        check_target(target)
    tower = find_tower(model)
    if is_patched(tower.module):
        raise RuntimeError("the model is already patched: call testreg.unpatch(model) first to patch it anew")
    constant = resolve_static(static)
    if neurons is None and constant is not None:
        chosen = RegisterNeurons.from_blocks(constant.neurons).truncate(top_k)
    else:
        chosen = resolve(neurons, model).truncate(top_k)
    chosen.check_fits(tower.depth, tower.mlp_width)
    if num_registers is None:
        num_registers = chosen.num_registers if constant is None else constant.num_registers
    if start is None:
        start = chosen.start if constant is None else constant.start
    if zero is None:
        zero = default_zero(start)
    if constant is not None:
        if target is not None:
            raise ValueError("pass static or target: where neurons are steered onto patches there are no registers")
        constant.check_fits(tower, chosen, num_registers, start)
    warn_of_other_weights(chosen, model, tower)
    warn_of_activation(model, tower, chosen)
    warn_of_unverified(chosen)
    state = Patch(
        tower.module,
        chosen,
        num_registers,
        split_neurons,
        max_over,
        zero,
        start,
        tower.num_prefix,
        target,
        constant,
    )
    state.install([*static_parts(tower, state), *parts(tower, state)])
    if neurons is None and constant is None:
        log_bundled(chosen, model)
    return model


def unpatch(model: M) -> M:
    """Undo `patch`; the model is then bit for bit what it was. Returns the same object.

    Raises RuntimeError if the model is not patched, or someone has replaced a patched `forward` since.

    Example:
        >>> testreg.unpatch(testreg.patch(model, neurons)) is model
        True
    """
    patch_of(model).remove()
    return model


@contextmanager
def patched(model: M, neurons: AnyNeurons = None, **options: Any) -> Iterator[M]:
    """Within the `with` block `model` has test-time registers; the arguments are those of `patch`.

    Example:
        >>> with testreg.patched(model, neurons, num_registers=2):
        ...     outputs = model(images)
    """
    patch(model, neurons, **options)
    try:
        yield model
    finally:
        unpatch(model)


@contextmanager
def disabled(model: M) -> Iterator[M]:
    """Within the `with` block a patched model computes as if it were not patched, in all threads.

    Contexts nest and overlap. A forward that is under way in another thread keeps its registers to its end.

    Example:
        >>> with testreg.patched(model, neurons), testreg.disabled(model):
        ...     baseline = model(images)
    """
    state = patch_of(model)
    with _counting:
        state.disabled_by += 1
    try:
        yield model
    finally:
        with _counting:
            state.disabled_by -= 1


@contextmanager
def registers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the `with` block, the list holds the registers (B, R, C) after each block of this thread's last forward.

    They are read from the output of the blocks, before the final norm. After the blocks in front of the one that they
    enter (`start` of `testreg.patch`) there are none: (B, 0, C). Contexts nest, each with a list of its own.

    Example:
        >>> with testreg.patched(model, neurons), testreg.registers(model) as after_block:
        ...     outputs = model(images)
        >>> after_block[-1].shape
        torch.Size([45, 1, 48])
    """
    recorder = Recorder(patch_of(model))
    running.recorders = (*running.recorders, recorder)
    try:
        yield recorder.recorded
    finally:
        running.recorders = tuple(each for each in running.recorders if each is not recorder)


@dataclass(eq=False)
class Recorder:
    """Records the registers of one patched tower, in this thread's last forward of it, for `registers`."""

    patch: Patch
    recorded: list[Tensor] = field(default_factory=list)
    """The registers after each block, (B, R, C); (B, 0, C) after the blocks in front of the one that they enter."""
    forward: Forward | None = None
    """The forward that computes these registers."""

    def begin(self, forward: Forward) -> None:
        """Record this forward from now on, if it is of the patched tower."""
        if forward.patch is self.patch:
            self.recorded.clear()
            self.forward = forward

    def record(self, registers: Tensor, patch: object, index: int) -> None:
        """Store the registers after block `index`, if they are of the recorded forward."""
        if self.patch is patch and (running.call is None or self.forward is running.call.forward):
            self.recorded += [registers[:, :0]] * (index - len(self.recorded))  # before they entered
            self.recorded[index : index + 1] = [registers.clone()]


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, or a vision tower in it, has test-time registers.

    Example:
        >>> testreg.is_patched(model)
        False
    """
    return find_patch(model) is not None
