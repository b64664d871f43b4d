"""Moves the register neurons of an MLP: takes their activation from the patches and puts it where the mode says.

This is done to the input of the MLP's second linear (fc2), before any hook on that linear sees it.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.layout import Layout
from testreg.patching.forward import Mode, is_recomputing, layout_now, running
from testreg.patching.index import is_exporting
from testreg.patching.moves import shift, silence, steer
from testreg.patching.override import Override
from testreg.patching.state import Patch

_wrapping = threading.Lock()


@dataclass(eq=False)
class MoveInFront(Override):
    """Replaces the call of a second linear: it moves the register neurons, and then calls the linear with its hooks.

    So hooks on the linear see the activation that it multiplies, whether gradients are computed or not. If an adapter
    (LoRA, OFT) wraps the linear later, the move is put in front of the wrapper, so that the adapter reads the moved
    activation too. Compilers may skip this call and run the linear's forward, where `MoveCompiled` moves the neurons.
    """

    method = "_call_impl"
    holder: InitVar[nn.Module]
    block: nn.Module
    index: int
    patch: Patch
    default_layout: Layout
    channels: tuple[int, ...]
    """The register neurons, as input channels of the linear."""
    owners: tuple[int, ...] | None
    """The register that each of them is moved to; None if every register holds all."""
    width: int | None
    """The number of input channels; None where it is not known."""
    is_always_called: bool
    """Whether every forward calls the linear. This is False for experts of a mixture: a forward calls only some."""
    siblings: tuple[nn.Module, ...] = field(init=False)
    """The other modules inside the linear's parent. A hook on one of them may have kept the activation."""

    def __post_init__(self, holder: nn.Module) -> None:
        super().__post_init__()
        self.patched_linear = self.module
        self.parent, self.name = next(
            (parent, name)
            for parent in holder.modules()
            for name, child in parent.named_children()
            if child is self.module
        )
        self.compiled = MoveCompiled(self.module, self)
        self.siblings = tuple(
            each for child in self.parent.children() if child is not self.module for each in child.modules()
        )

    def check(self) -> None:
        """If the linear was wrapped since it was patched, put the move in front of the wrapper.

        Raises:
            RuntimeError: the linear was replaced, so that nothing calls it any more; or it was wrapped, and the model
                is compiled without having run since.
        """
        # During torch.export, getattr would return a copy of the linear.
        current: nn.Module = self.parent._modules[self.name]  # type: ignore[assignment]
        if current is self.module:
            return
        if current is not self.patched_linear and self.patched_linear not in set(current.modules()):
            raise RuntimeError(
                f"the second MLP linear of block {self.index} was replaced by a {type(current).__name__} after "
                "testreg.patch(), so its neurons would stay: call testreg.unpatch(model) and patch it again"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the second MLP linear of block {self.index} was wrapped in a {type(current).__name__} after "
                "testreg.patch(): call the model once before it is compiled, or patch it last"
            )
        with _wrapping:
            if self.module is not current:
                self.remove()
                self.module = self.compiled.module = current
                self.previous, self.compiled.previous = (
                    current.__dict__.get(each.method) for each in (self, self.compiled)
                )
                self.install()

    def install(self) -> None:
        super().install()
        self.compiled.install()

    def installed(self) -> bool:
        return super().installed() and self.compiled.installed()

    def remove(self) -> None:
        super().remove()
        self.compiled.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            args, kwargs = self.moved(args, kwargs)
        return self.original(*args, **kwargs)

    def moved(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the linear, with the neurons moved."""
        mode = self.patch.current_mode
        if not mode.is_patched:
            self._warn_if_outside()
            return args, kwargs
        if not is_exporting():
            running.moves += self.is_always_called
        if args:
            return (self._moved(args[0], mode), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self._moved(kwargs[name], mode)}

    def _moved(self, hidden: Tensor, mode: Mode) -> Tensor:
        self._check_width(hidden)
        layout = layout_now(self.default_layout)
        if not torch.is_grad_enabled() and self._may_be_kept():
            hidden = hidden.clone()
        moved = [self._moved_in(images, mode, layout) for images in layout.images(hidden)]
        return layout.of_images(moved, hidden) if torch.is_grad_enabled() else hidden  # `hidden` was edited in place

    def _moved_in(self, hidden: Tensor, mode: Mode, layout: Layout) -> Tensor:
        patch = self.patch
        where: dict[str, Any] = {"num_prefix": patch.num_prefix, "zero": patch.zero, "patches": layout.patches}
        largest: dict[str, Any] = {"max_over": patch.max_over, "valid": layout.valid}
        if mode.target is not None:
            return steer(hidden, self.channels, mode.target, **where, **largest)
        if patch.static is not None:
            return silence(hidden, self.channels, **where)
        return shift(hidden, self.channels, self.owners, num_registers=patch.num_registers, **where, **largest)

    def _may_be_kept(self) -> bool:
        """Whether a hook may have kept the activation. If so, it must not be edited in place."""
        if torch.compiler.is_compiling():
            return False
        global_hooks = torch.nn.modules.module._global_forward_hooks
        return bool(global_hooks) or any(each._forward_hooks or each._forward_pre_hooks for each in self.siblings)

    def _check_width(self, hidden: Tensor) -> None:
        if type(hidden).__name__ == "DTensor" or self.width not in (None, hidden.shape[-1]):
            raise NotImplementedError(
                f"the second MLP linear of block {self.index} got {hidden.shape[-1]} of {self.width} channels in a "
                f"{type(hidden).__name__}: where an MLP is split over devices (tensor parallel, DTensor), no device "
                "sees all of its neurons. Shard the model by FSDP or data parallelism, or call "
                "testreg.unpatch(model)"
            )

    def _warn_if_outside(self) -> None:
        """Warn, once, if the linear is called outside its block, where neurons are not moved.

        Raises:
            RuntimeError: the patched forward of the block was replaced.
        """
        if running.call is not None or torch.compiler.is_compiling() or is_recomputing():
            return
        if not self.patch.mode_for_new_forward.is_patched:
            return
        if getattr(self.block.__dict__.get("forward"), "patch", None) is not self.patch:
            raise RuntimeError(replaced_forward_message(self.index))
        if self.patch.warns_outside:
            self.patch.warns_outside = False
            warnings.warn(
                f"the second MLP linear of block {self.index} was called outside of the block's own forward: its "
                "register neurons are not moved there, and the result is that of the unpatched model. Call the "
                "blocks, or say testreg.disabled(model)",
                stacklevel=2,
            )


@dataclass(eq=False)
class MoveCompiled(Override):
    """Replaces the forward of a second linear: moves the neurons in compiled code, which may skip `_call_impl`."""

    move: MoveInFront

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            args, kwargs = self.move.moved(args, kwargs)
        return self.original(*args, **kwargs)


def replaced_forward_message(index: int) -> str:
    """The error for a block whose patched forward was replaced."""
    return (
        f"the forward of block {index}, which testreg.patch() replaced, was replaced again and did not run, so that "
        "the block has no registers: call testreg.unpatch(model), make the changes, and patch the model last"
    )


def not_moved_message(index: int) -> str:
    """The error for a block that has not called its second linear."""
    return (
        f"block {index} does not call its second MLP linear, or replaces what is in front of it, so that its register "
        "neurons are not moved: its parts were changed after testreg.patch(). Call testreg.unpatch(model), make the "
        "changes, and patch the model last"
    )
