"""The tasks of `testreg evaluate` that need no text, on samples small enough for one core.

The tasks zeroshot and typographic are missing, since they need a CLIP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from testreg.evaluation import attention_seg, depth, knn, linear, lost, segment, tokens
from testreg.evaluation.result import Result
from testreg.io.loading import LoadedModel
from testreg.neurons import AnyNeurons


@dataclass(frozen=True)
class Task:
    """A task with its data set and options."""

    evaluate: Callable[..., Result]
    data: str
    """The folder of the data set, in the folder of all data sets."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `evaluate`; all others keep their defaults."""


SHORT = {"augment": False, "fit_batch": 4}  # options that make fits fast: features of an image are computed only once

TASKS: dict[str, Task] = {
    "attention-seg": Task(attention_seg.evaluate, "coco256", {"num_images": 100, "foreground": "1-90", "ignore": 0}),
    "knn": Task(knn.evaluate, "", {"size": 112, "num_images": 1000}),
    "linear": Task(
        linear.evaluate, "", {"size": 112, "num_images": 1000, "augment": False, "iterations": 200, "fit_batch": 64}
    ),
    "segment": Task(segment.evaluate, "coco256", {"size": 112, "iterations": 200, "warm_up": 10, **SHORT}),
    "depth": Task(
        depth.evaluate,
        "livingroom-rgbd",
        {"size": 112, "nyu_crop": False, "iterations": 120, "warm_up": 12, "every": 30, **SHORT},
    ),
    "tokens": Task(tokens.evaluate, "", {"size": 112, "num_images": 200, "num_c": 6, "epochs": 10}),
    "lost": Task(lost.evaluate, "coco256", {"feature": "v", "size": 448}),
    "lost-sweep": Task(lost.evaluate, "coco256", {"feature": "v", "size": 224, "num_images": 128, "sweep": True}),
}


def evaluated(
    task: Task,
    plain: LoadedModel,
    moved: Mapping[str, AnyNeurons],
    others: Mapping[str, LoadedModel],
    data: Path,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate a task for a network, for ways to move neurons in it, and for other networks.

    Args:
        plain: the network, under the name of its column. Differences are computed from it.
        moved: {way: the neurons that it moves in the network}.
        others: {name of a column: another network, which is evaluated as it is}.
        data: the folder of all data sets.
        settings: further arguments of the task.

    Returns:
        The results for JSON, with "metrics" and "difference" (from the plain network, with the interval) by column.
    """
    start = time.process_time()
    metrics: dict[str, Any] = {}
    difference: dict[str, Any] = {}
    for way, other in zip_longest(moved, others):
        neurons, against = moved.get(way), others.get(other)
        result = task.evaluate(
            plain, data / task.data, neurons=neurons, against=against, **{**task.options, **settings}
        ).to_json()
        metrics[plain.name] = result["plain"]
        for column, name, changed in (("patched", way, "difference"), ("against", other, "difference_against")):
            if name is not None:
                metrics[name], difference[name] = result[column], result[changed]
    protocol = {key: value for key, value in result["protocol"].items() if key not in ("neurons", "against")}
    if protocol.get("sweep"):
        protocol["sweep"] = f"chosen on {protocol['sweep']['images']} others"
    return {
        "data": str(data / task.data),
        "protocol": protocol,
        "metrics": metrics,
        "difference": difference,
        "baselines": result["baselines"],
        "cpu_seconds": round(time.process_time() - start),
    }
