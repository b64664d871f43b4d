"""Replacing one method of one module, and taking it back without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


class Part(Protocol):
    """One change of one module, which can be installed and taken back."""

    def install(self) -> None: ...
    def installed(self) -> bool: ...
    def remove(self) -> None: ...


@dataclass(eq=False)
class Override:
    """A picklable replacement of one module's method: an attribute of the instance, mostly its `forward`.

    Nothing else of the model changes: hooks, wrapper modules and another class would all be seen by somebody.
    """

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

    def move_to(self, module: nn.Module) -> None:
        """Take the place of another module's method instead."""
        self.remove()
        self.module = module
        self.previous = module.__dict__.get(self.method)
        self.install()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Refusal:
    """Stands in for a method by which torch would copy or compile a module without its patched `forward`."""

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
