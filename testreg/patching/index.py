"""Whole numbers as a tensor to index with: cached in eager mode, and safe to compile, trace and export."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def index_tensor(values: Sequence[int], like: Tensor) -> Tensor:
    """The values on the device of `like`; do not edit it in place."""
    # A cached index costs no host-to-device copy, but a fake or traced one must never outlive its trace.
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and type(like) is Tensor:
        return _cached(tuple(values), like.device)
    if torch.compiler.is_dynamo_compiling() and is_exporting():
        # Strict export names a constant by the path on which it was found, which leads through our `forward` and is
        # not in the exported module: so no constant is made here.
        return torch.stack([torch.full((), value, device=like.device) for value in values])
    return torch.tensor(values, device=like.device)


def is_exporting() -> bool:
    """Whether torch.export traces what runs."""
    # What torch.compiler.is_exporting() reads: in code that torch 2.9 compiles, the function is True in any case.
    return torch.compiler._is_exporting_flag


@functools.lru_cache(maxsize=1024)
def _cached(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return torch.tensor(values, device=device)
