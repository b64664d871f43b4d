"""Where the neurons are moved: in front of an MLP's second linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testreg.patching.layout import Layout
from testreg.patching.override import Override
from testreg.patching.running import Mode, layout_now
from testreg.patching.state import Patch
from testreg.patching.static import silence
from testreg.patching.steering import steer


@dataclass(eq=False)
class ShiftBefore(Override):
    """A second linear (fc2) that first moves the register neurons among its input channels to the registers."""

    block: InitVar[nn.Module]
    patch: Patch
    plain: Layout
    shift: Callable[..., Tensor]
    """`testreg.register.shift`, the arithmetic."""
    channels: tuple[int, ...]
    owners: tuple[int, ...] | None

    def __post_init__(self, block: nn.Module) -> None:
        super().__post_init__()
        self.parent, self.name = next(
            (parent, name)
            for parent in block.modules()
            for name, child in parent.named_children()
            if child is self.module
        )

    @property
    def current(self) -> nn.Module:
        """The module where the patched one was: that one itself, or what has wrapped or replaced it since."""
        return self.parent._modules[self.name]  # type: ignore[return-value]  # getattr gives a copy in torch.export

    def is_bypassed(self) -> bool:
        """Whether the module was replaced since, so that nothing calls it any more."""
        return self.current is not self.module and self.module not in set(self.current.modules())

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (mode := self.patch.mode).is_patched:
            hidden = self._shifted(hidden, mode)
        return self.original(hidden, *args, **kwargs)

    def _shifted(self, hidden: Tensor, mode: Mode) -> Tensor:
        layout = layout_now(self.plain)
        shifted = [self._moved(images, mode, layout) for images in layout.images(hidden)]
        if not torch.is_grad_enabled():
            return hidden  # was edited in place
        moved = layout.of_images(shifted, hidden)
        if self.current is self.module:
            return moved
        hidden.copy_(moved)  # an adapter around the linear (LoRA) reads the same activation
        return hidden

    def _moved(self, hidden: Tensor, mode: Mode, layout: Layout) -> Tensor:
        patch = self.patch
        among: dict[str, Any] = {
            "num_prefix": patch.num_prefix,
            "max_over": patch.max_over,
            "zero": patch.zero,
            "valid": layout.valid,
            "patches": layout.patches,
        }
        if mode.target is not None:
            return steer(hidden, self.channels, mode.target, **among)
        if patch.static is not None:
            return silence(hidden, self.channels, num_prefix=patch.num_prefix, zero=patch.zero, patches=layout.patches)
        return self.shift(hidden, self.channels, self.owners, num_registers=patch.num_registers, **among)
