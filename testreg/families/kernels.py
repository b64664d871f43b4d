"""The attention kernels that a model's library chooses among."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

_CHOICE = "_attn_implementation"  # of a configuration of transformers, which its attention reads in every forward


@contextmanager
def attention_kernel(model: nn.Module, wanted: str, instead_of: Collection[str] | None = None) -> Iterator[None]:
    """Within the `with` block, attention in models of transformers is computed by the kernel `wanted`.

    Args:
        instead_of: only where it is one of these; None: everywhere.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: getattr(config, _CHOICE, None) for key, config in configs.items()}
    changed = [
        key
        for key, kernel in before.items()
        if kernel is not None and kernel != wanted and (instead_of is None or kernel in instead_of)
    ]
    try:
        for key in changed:
            setattr(configs[key], _CHOICE, wanted)
        yield
    finally:
        for key in changed:
            setattr(configs[key], _CHOICE, before[key])


def returns_weights(attention: nn.Module) -> bool:
    """Whether an attention module may return its weights: in transformers, the fused kernels compute none."""
    return getattr(getattr(attention, "config", None), _CHOICE, "eager") in ("eager", None)
