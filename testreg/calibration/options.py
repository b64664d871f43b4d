"""The options of a calibration: their defaults, one line that says what each means, and which values are valid.

`testreg.calibrate`, the command `testreg calibrate` and the table in docs/calibration.md all follow this file. The
command line reads it to print its help, which must not import torch. So whatever needs torch is imported where it is
used.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, get_args

from testreg.measure.score import Score

if TYPE_CHECKING:
    import torch

    from testreg.calibration.effects import Head
    from testreg.io.preprocessing import Transform
    from testreg.measure.outliers import OutlierRule


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `testreg.calibrate`, whose docstring explains each.

    Raises:
        ValueError: a value is out of its range, or two of them contradict each other.
    """

    transform: Transform | Sequence[Transform] | None = field(
        default=None, metadata={"means": "how an image becomes a tensor (default: as the model's library prepares it)"}
    )
    block: int | None = field(
        default=None, metadata={"means": "block whose outliers are looked at (default: where they stand out most)"}
    )
    threshold: float | None = field(
        default=None, metadata={"means": "norm above which a patch is an outlier (default: median + 5 robust sigma)"}
    )
    rule: OutlierRule | None = field(
        default=None,
        metadata={"means": "which patches are outliers; mixture: the upper of two components of an image's log norms"},
    )
    max_block: int | None = field(
        default=None, metadata={"means": "last block to take neurons from (default: the last one with outliers)"}
    )
    score: Score = field(
        default="attribution", metadata={"means": "score that neurons are ranked by; activation: the paper's"}
    )
    sparsity_filter: bool = field(
        default=False, metadata={"means": "the sparsity filter of the paper's code; only with the score activation"}
    )
    top_k: int | None = field(
        default=None, metadata={"means": "how many neurons to recommend (default: chosen by measuring)"}
    )
    target: float = field(
        default=0.05, metadata={"means": "outliers that may be left, as a fraction of the unpatched model's"}
    )
    max_change: float | None = field(
        default=None, metadata={"means": "how much features may change, 1 - cosine (default: any)"}
    )
    budget: float | None = field(
        default=None, metadata={"means": "take about so many seconds (default: as long as it takes)"}
    )
    head: Head | None = field(
        default=None,
        metadata={"means": "function model, images -> scores of classes, to measure whether predictions stay the same"},
    )
    held_out: int = field(default=48, metadata={"means": "images to choose and verify on"})
    stability: float | None = field(
        default=0.95,
        metadata={"means": "ranking ends when two halves of the images agree on this share of the best neurons"},
    )
    resume: str | os.PathLike[str] | None = field(
        default=None, metadata={"means": "file (safetensors) that keeps the state, and from which a later run goes on"}
    )
    batch_size: int = field(default=16, metadata={"means": "images that are run at once"})
    num_images: int | None = field(default=None, metadata={"means": "how many images are read, at most"})
    workers: int = field(default=0, metadata={"means": "processes that decode images"})
    amp: torch.dtype | None = field(default=None, metadata={"means": "run under autocast, in bfloat16 or float16"})
    seed: int = field(default=0, metadata={"means": "seed of the order of the images, and of samples"})
    progress: bool = field(default=True, metadata={"means": "whether to show progress bars"})
    outlier_rule: OutlierRule = field(init=False)
    """The rule that is used: `rule` if it is given, else a rule with the `threshold`, else the default rule."""

    def __post_init__(self) -> None:
        from testreg.measure.outliers import OutlierRule

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
        if self.sparsity_filter and self.score != "activation":
            raise ValueError('the sparsity filter is that of the released code: give score="activation" with it')
        if self.threshold is not None and self.rule is not None:
            raise ValueError("give a threshold or a rule, not both")
        object.__setattr__(self, "outlier_rule", self.rule or OutlierRule(threshold=self.threshold))

    @property
    def user_chose_block(self) -> bool:
        """Whether the user gave `block` or `max_block`. Then neurons are searched for even if the diagnosis says that
        moving neurons would not remove the outliers."""
        return self.block is not None or self.max_block is not None

    def with_blocks_of(self, depth: int) -> Options:
        """The options for a model of `depth` blocks, with negative numbers of blocks counted from its end.

        Raises:
            ValueError: there is no such block.
        """
        return replace(
            self,
            block=_from_front(self.block, depth, "block"),
            max_block=_from_front(self.max_block, depth, "max_block"),
        )


def _from_front(index: int | None, depth: int, name: str) -> int | None:
    """The index of a block, counted from the front; `name` is the option that gave it."""
    if index is None:
        return None
    if not -depth <= index < depth:
        raise ValueError(f"{name}={index} is out of range: the model has {depth} blocks")
    return index % depth


MEANINGS: dict[str, str] = {each.name: each.metadata["means"] for each in dataclasses.fields(Options) if each.init}
"""What each option means, in one line, by the name of the option."""
