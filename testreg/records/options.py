"""The values that options of `testreg.patch` may have, and their check; its docstring tells what they mean."""

from __future__ import annotations

from typing import Literal, get_args

from testreg.files import shown

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all", "firing"]
Start = Literal["zeros", "mean"]

MAX_REGISTERS = 256  # an image of 224 pixels has no more patches, at 14 pixels each


def default_zero(start: Start) -> Zero:
    """Where the moved neurons become zero if `patch` is not told, which depends on how registers start."""
    return "firing" if start == "mean" else "patches"


def check_options(num_registers: int | None, max_over: str, zero: str | None, start: str | None = None) -> None:
    """Raise ValueError unless `patch` can be called with these."""
    if num_registers is not None and num_registers < 1:
        raise ValueError(f"num_registers must be at least 1, got {num_registers}")
    if num_registers is not None and num_registers > MAX_REGISTERS:
        raise ValueError(f"num_registers must be at most {MAX_REGISTERS}, got {shown(num_registers)}: 1 to 16 do")
    if max_over not in get_args(MaxOver):
        raise ValueError(f"max_over must be 'neuron' or 'layer', got {max_over!r}")
    if zero not in (None, *get_args(Zero)):
        raise ValueError(f"zero must be 'patches', 'all' or 'firing', got {zero!r}")
    if start not in (None, *get_args(Start)):
        raise ValueError(f"start must be 'zeros' or 'mean', got {start!r}")
