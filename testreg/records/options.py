"""The values that options of `testreg.patch` may have; its docstring tells what they mean."""

from __future__ import annotations

from typing import Literal

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all", "firing"]
Start = Literal["zeros", "mean"]
