"""The options of a calibration, which check themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor, nn

from testreg.io.preprocessing import Transform
from testreg.measure.outliers import OutlierRule
from testreg.measure.ranking import Score

Head = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `testreg.calibrate`, which says what they are and gives their defaults.

    Raises:
        ValueError: a value is out of its range, or two of them contradict each other.
    """

    transform: Transform | Sequence[Transform] | None
    block: int | None
    threshold: float | None
    rule: OutlierRule | None
    max_block: int | None
    score: Score
    sparsity_filter: bool
    top_k: int | None
    target: float
    max_change: float | None
    budget: float | None
    head: Head | None
    held_out: int
    stability: float | None
    resume: str | os.PathLike[str] | None
    batch_size: int
    num_images: int | None
    workers: int
    amp: torch.dtype | None
    seed: int
    progress: bool
    outlier_rule: OutlierRule = field(init=False)
    """The `rule`, the one with the `threshold`, or the default."""

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        for name in ("target", "max_change", "budget", "stability"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("top_k", "batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if self.held_out < 0 or (self.held_out == 0 and self.top_k is None):
            raise ValueError(f"with held_out={self.held_out} no set of neurons can be measured: give top_k")
        if self.sparsity_filter and self.score == "attribution":
            raise ValueError('the sparsity filter is that of the released code: give score="activation" with it')
        if self.threshold is not None and self.rule is not None:
            raise ValueError("give a threshold or a rule, not both")
        object.__setattr__(self, "outlier_rule", self.rule or OutlierRule(threshold=self.threshold))

    @property
    def insists(self) -> bool:
        """Whether the user says where to look, so that outliers are calibrated which a register may not move."""
        return self.block is not None or self.max_block is not None

    def with_blocks_of(self, depth: int) -> Options:
        """The options for a model of `depth` blocks, with negative numbers of blocks counted from its end.

        Raises:
            ValueError: there is no such block.
        """
        return replace(
            self, block=_block(self.block, depth, "block"), max_block=_block(self.max_block, depth, "max_block")
        )


def _block(index: int | None, depth: int, name: str) -> int | None:
    if index is None:
        return None
    if not -depth <= index < depth:
        raise ValueError(f"{name}={index} is out of range: the model has {depth} blocks")
    return index % depth
