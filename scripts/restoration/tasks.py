"""The tasks of `testreg evaluate` that a network without text can do, on samples that one core manages.

A CLIP would be needed for zeroshot and typographic.
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
    """A task, its data and its sample. What an option does not say is as the task has it."""

    evaluate: Callable[..., Result]
    data: str
    """The folder among the data sets."""
    options: Mapping[str, Any] = field(default_factory=dict)


SHORT = {"augment": False, "fit_batch": 4}  # the features of each image are computed once

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
    """What a task says of a network, of each way to move neurons in it, and of other networks.

    Args:
        plain: the network that differences are from, under the name of its column.
        moved: the neurons of each way.
        others: networks as they come, by what they are called.

    Returns:
        `metrics` and `difference` (from the plain network, with the bounds of the interval) by way, for JSON.
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
        for column, own, changed in (("patched", way, "difference"), ("against", other, "difference_against")):
            if own is not None:
                metrics[own], difference[own] = result[column], result[changed]
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
