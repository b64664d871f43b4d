"""Switches the kernel ("eager", "sdpa", ...) that computes attention in models of transformers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

_KERNEL = "_attn_implementation"
"""The attribute of a configuration of transformers that attention reads in each forward."""


@contextmanager
def attention_kernel(model: nn.Module, wanted: str, instead_of: Collection[str] | None = None) -> Iterator[None]:
    """Within the `with` block, attention in models of transformers is computed by the kernel `wanted`, e.g. "eager".

    Args:
        instead_of: replace only these kernels; None replaces all.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    kernels_before = {key: getattr(config, _KERNEL, None) for key, config in configs.items()}
    changed = [
        key
        for key, kernel in kernels_before.items()
        if kernel is not None and kernel != wanted and (instead_of is None or kernel in instead_of)
    ]
    try:
        for key in changed:
            setattr(configs[key], _KERNEL, wanted)
        yield
    finally:
        for key in changed:
            setattr(configs[key], _KERNEL, kernels_before[key])


def returns_weights(attention: nn.Module) -> bool:
    """Whether an attention module can return its weights. In transformers, only the kernel "eager" computes them."""
    return getattr(getattr(attention, "config", None), _KERNEL, "eager") in ("eager", None)
