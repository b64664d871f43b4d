"""Hooks inside patched blocks that see no registers.

A module with hooks is called in two layers. The outer one takes the registers off what the module gets, and puts them
back onto what it gives; the inner one does the reverse around the module's own forward. Hooks run between the two. So
the tensors that they see, keep or replace are those of the T tokens, and part of the autograd graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import KeyPath, tree_map_with_path

from testreg.families.layout import Layout
from testreg.patching.block import RegisterBlock
from testreg.patching.fc2 import MoveInFront
from testreg.patching.forward import CARRIED, layout_now
from testreg.patching.override import Override
from testreg.patching.state import Patch, patch_of

M = TypeVar("M", bound=nn.Module)
Rejoin = Callable[[Any], Any]
"""Puts the registers that were taken off something back onto what a hook has made of it."""


@contextmanager
def hooks_without_registers(model: M) -> Iterator[M]:
    """Within the `with` block, hooks on modules inside patched blocks see the T tokens, as in an unpatched model.

    This applies to what hooks get and return, to gradients, to attention matrices, which are T x T, and to tensors that
    modules keep as attributes. So tools that hook a module, as Grad-CAM, attention rollout and key descriptors do, run
    as they are. The model still computes with registers: rows of attention sum to less than one, since what the
    registers receive is left out. Hooks in compiled blocks see T+R tokens.

    Raises:
        RuntimeError: the model is not patched.

    Example:
        >>> seen = []
        >>> handle = model.blocks[2].norm1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        >>> with testreg.patched(model, planted), testreg.hooks_without_registers(model):
        ...     outputs = model(images)
        >>> handle.remove()
        >>> seen[0]
        torch.Size([45, 17, 48])
    """
    patch = patch_of(model)
    layers: list[Override] = []
    blocks = [part for part in patch.overrides if isinstance(part, RegisterBlock)]
    for block in blocks:
        for move in block.moves:
            move.check()  # an adapter that came after the patch is wrapped now, and not under these layers
    inside = {module for block in blocks for module in block.module.modules() if module is not block.module}
    for module in inside:
        layers += [Inside(module), Around(module, patch)]
    try:
        for layer in layers:
            layer.install()
        for block in blocks:
            block.previous = BlockBetweenHooks(block, block.previous)
        yield model
    finally:
        for block in blocks:
            if isinstance(block.previous, BlockBetweenHooks):
                block.previous = block.previous.original
        for layer in reversed(layers):
            layer.remove()


def has_no_registers(tensor: Tensor) -> bool:
    """Whether a tensor holds no registers behind its T tokens.

    That is so if a block has handed it on, which attaches the registers as an attribute, or if hooks are running that
    see no registers.
    """
    return getattr(tensor, CARRIED, None) is not None or _running.hooked is not None


@dataclass(eq=False)
class Hooked:
    """A module inside a block, while its hooks run and see no registers."""

    module: nn.Module
    stripper: _Stripper
    rejoin: Rejoin
    """Puts registers back behind tokens: those of the module's input until its forward has run, then those of its
    output."""


class _Running(threading.local):
    """The state of one thread."""

    stripper: _Stripper | None
    """What takes registers off tensors of the block that the thread is in; None if they have none."""
    hooked: Hooked | None
    """The module whose hooks run."""

    def __init__(self) -> None:
        self.stripper = None
        self.hooked = None


_running = _Running()


@dataclass(eq=False)
class BlockBetweenHooks:
    """A block's own forward, after which registers are taken off the tensors that its modules keep as attributes."""

    block: RegisterBlock
    original: Callable[..., Any] | None

    def __call__(self, sequence: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.block.module
        forward = self.original or type(module).forward.__get__(module)
        if torch.compiler.is_compiling():
            return forward(sequence, *args, **kwargs)
        layout, stripper = layout_now(self.block.default_layout), None
        if self.block.patch.current_mode.has_registers:
            stripper = _Stripper(self.block.patch, layout, sequence.shape[layout.dim])
        outer = _running.stripper, _running.hooked
        _running.stripper, _running.hooked = stripper, None
        before = {module: dict(vars(module)) for module in module.modules()}
        try:
            out = forward(sequence, *args, **kwargs)
        finally:
            _running.stripper, _running.hooked = outer
        for module, attributes in before.items():
            for name, value in list(vars(module).items()):
                if stripper is not None and isinstance(value, Tensor) and attributes.get(name) is not value:
                    setattr(module, name, stripper.without_registers(value)[0])
        return out


@dataclass(eq=False)
class Around(Override):
    """The call of a module, its hooks included: they see tokens without registers."""

    method = "_call_impl"
    patch: Patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stripper = _running.stripper
        if (
            torch.compiler.is_compiling()
            or stripper is None
            or stripper.patch is not self.patch
            or not _has_hooks(self.module)
        ):
            return self.original(*args, **kwargs)
        original = self.original
        if isinstance(self.previous, MoveInFront):  # it runs before the hooks, and needs the registers
            args, kwargs = self.previous.moved(args, kwargs)
            original = self.previous.original
        (args, kwargs), rejoin = stripper.without_registers((args, kwargs))
        outer, hooked = _running.hooked, Hooked(self.module, stripper, rejoin)
        _running.hooked = hooked
        try:
            out = original(*args, **kwargs)
        finally:
            _running.hooked = outer
        return hooked.rejoin(out)


@dataclass(eq=False)
class Inside(Override):
    """A module's own forward, which computes with registers between hooks that see none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hooked = _running.hooked
        if hooked is None or hooked.module is not self.module:
            return self.original(*args, **kwargs)
        args, kwargs = hooked.rejoin((args, kwargs))
        _running.hooked = None
        try:
            out = self.original(*args, **kwargs)
        finally:
            _running.hooked = hooked
        out, hooked.rejoin = hooked.stripper.without_registers(out)
        return out


def _has_hooks(module: nn.Module) -> bool:
    everywhere = torch.nn.modules.module
    return any(
        (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
        )
    )


@dataclass(frozen=True)
class _Stripper:
    """Takes registers off tensors in which one dimension has T+R entries, or the last two have."""

    patch: Patch
    layout: Layout
    length: int

    def without_registers(self, value: Any) -> tuple[Any, Rejoin]:
        """The value without registers, and a function that puts them back onto what replaces it.

        Tensors in tuples, lists and dictionaries are treated as well.
        """
        rejoins: dict[KeyPath, Rejoin] = {}

        def strip(path: KeyPath, each: Any) -> Any:
            if isinstance(each, Tensor):
                each, rejoins[path] = self._tensor(each)
            return each

        stripped = tree_map_with_path(strip, value)
        return stripped, lambda new: tree_map_with_path(lambda path, each: rejoins.get(path, _unchanged)(each), new)

    def _tensor(self, value: Tensor) -> tuple[Tensor, Rejoin]:
        layout, sizes = self.layout, value.shape
        if value.ndim > 1 and sizes[-1] == sizes[-2] == self.length:
            shown = layout.weights_without_registers(value)
            if layout.lengths is not None:
                raise NotImplementedError("hooks on attention between packed images: run them one image at a time")
            return shown.contiguous(), lambda new: layout.weights_with_registers(new, value)
        if layout.lengths is not None:
            if value.ndim not in (2, 3) or sizes[-2] != self.length:
                return value, _unchanged
            registers = layout.registers(value)
            return layout.tokens(value), lambda new: layout.join(new, registers)
        places = [dim for dim in (layout.dim, *range(-2, -value.ndim - 1, -1), -1) if -dim <= value.ndim]
        lengths = self.length, self.length - self.patch.num_prefix  # rotary embeddings may be of the patches alone
        place = next(((dim, length) for length in lengths for dim in places if sizes[dim] == length), None)
        if place is None:
            return value, _unchanged
        dim, size = place[0], place[1] - layout.num_registers
        kept = value.narrow(dim, size, layout.num_registers)
        return value.narrow(dim, 0, size).contiguous(), lambda new: torch.cat([new, kept], dim)


def _unchanged(value: Any) -> Any:
    return value
