"""Moves the register neurons of an MLP: takes their activation from the patches and puts it where the mode says.

This is done to the input of the MLP's second linear (fc2), before any hook on that linear sees it.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.layout import Layout
from testreg.patching.forward import Mode, is_recomputing, layout_now, running
from testreg.patching.index import is_exporting
from testreg.patching.moves import shift
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
    block: nn.Module
    index: int
    patch: Patch
    layout: Layout
    """The layout of the tokens, unless the arguments of the block say otherwise."""
    channels: tuple[int, ...]
    """The register neurons, as input channels of the linear."""
    owners: tuple[int, ...] | None
    """The register that each of them is moved to; None if every register holds all."""
    width: int | None
    """The number of input channels; None where it is not known."""
    is_always_called: bool
    """Whether every forward calls the linear. This is False for experts of a mixture: a forward calls only some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.linear, self.compiled = self.module, MoveCompiled(self.module, self)
        self.parent, self.name = next(
            (parent, name)
            for parent in self.block.modules()
            for name, child in parent.named_children()
            if child is self.linear
        )
        others = [child for child in self.parent.children() if child is not self.linear]
        self.siblings = [module for child in others for module in child.modules()]
        """The other modules inside the linear's parent. A hook on one of them may have kept the activation."""

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
        if self.linear not in set(current.modules()):
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
                self.move_to(current)
                self.compiled.move_to(current)

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
        patch, layout = self.patch, layout_now(self.layout)
        if mode.target is not None and layout.lengths is not None:
            raise NotImplementedError(
                "images are packed in one sequence here, in which a target mask has no place: steer them one at a time "
                "with a tower that takes a batch"
            )
        if not torch.is_grad_enabled() and self._may_be_kept():
            hidden = hidden.clone()
        moved = [
            shift(
                images,
                self.channels,
                self.owners,
                num_registers=patch.num_registers if patch.static is None else 0,
                num_prefix=patch.num_prefix,
                max_over=patch.max_over,
                zero=patch.zero,
                target=mode.target,
                valid=layout.valid,
                patches=layout.patches,
            )
            for images in layout.images(hidden)
        ]
        return layout.of_images(moved, hidden) if torch.is_grad_enabled() else hidden  # `hidden` was edited in place

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
                "sees all of its neurons. Shard the model by FSDP or data parallelism, or call testreg.unpatch(model)"
            )

    def _warn_if_outside(self) -> None:
        """Warn, once, of a call outside the block; raise RuntimeError if its patched forward was replaced."""
        is_known = running.call is not None or torch.compiler.is_compiling() or is_recomputing()
        if is_known or not self.patch.mode_for_new_forward.is_patched:
            return
        if getattr(self.block.__dict__.get("forward"), "patch", None) is not self.patch:
            raise RuntimeError(f"the forward of block {self.index}, which testreg.patch() replaced, was replaced again")
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
