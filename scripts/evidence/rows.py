"""The rows of the table: tasks on samples small enough for two cores, and the columns that each is computed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from restoration.tasks import SHORT, Task

from evidence import shows
from evidence.columns import COLUMNS
from testreg.evaluation import attention_seg, depth, knn, linear, lost, segment, tokens, typographic

ALL = tuple(COLUMNS)
LISTS = ("testreg", "from zeros", "one register", "paper", "jroth")
TWO_LISTS = ("testreg", "from zeros", "jroth")  # testreg's with either start
CIFAR = Path(__file__).with_name("cifar10.txt")  # the names of CIFAR-10's classes


@dataclass(frozen=True)
class Row:
    """A task, and the columns that it is computed for by default."""

    task: Task
    columns: Sequence[str] = ALL
    exact: bool = False
    """Whether the task is computed in float32 even with --bfloat16."""
    least: int = 1
    """The smallest number of images that the task needs."""


def _lost_row(feature: str, size: int | None, num_images: int | None, columns: Sequence[str]) -> Row:
    """Object discovery with LOST, at one image size (None: the images' own), by one kind of feature."""
    return Row(Task(lost.evaluate, "coco256", {"feature": feature, "size": size, "num_images": num_images}), columns)


ROWS: Mapping[str, Row] = {
    "shows": Row(Task(shows.evaluate, "coco256/val2017", {"num_images": 40}), exact=True),
    "attention-seg": Row(
        Task(attention_seg.evaluate, "coco256", {"num_images": 100, "foreground": "1-90", "ignore": 0})
    ),
    **{f"lost-224-{part}": _lost_row(part, 224, None, (*LISTS, "zeroed")) for part in ("q", "k", "v")},
    **{f"lost-448-{part}": _lost_row(part, 448, 100, TWO_LISTS) for part in ("q", "k", "v")},
    **{f"lost-native-{part}": _lost_row(part, None, 64, TWO_LISTS) for part in ("q", "k", "v")},
    "segment": Row(
        Task(segment.evaluate, "coco256", {"size": 224, "iterations": 200, "warm_up": 10, **SHORT, "fit_batch": 2}),
        ("testreg", "from zeros", "one register", "jroth"),
    ),
    "depth": Row(
        Task(
            depth.evaluate,
            "livingroom-rgbd",
            {"size": 224, "nyu_crop": False, "iterations": 120, "warm_up": 12, "every": 60, **SHORT, "fit_batch": 2},
        ),
        ("testreg", "from zeros", "one register", "jroth"),
    ),
    "knn": Row(Task(knn.evaluate, "", {"num_images": 1000}), TWO_LISTS, least=20),
    "linear": Row(
        Task(linear.evaluate, "", {"num_images": 1000, "augment": False, "iterations": 200, "fit_batch": 64}),
        TWO_LISTS,
        least=20,
    ),
    "tokens": Row(
        Task(tokens.evaluate, "", {"num_images": 200, "num_c": 6, "epochs": 10}),
        ("testreg", "from zeros", "one register", "jroth"),
        least=20,
    ),
    "typographic": Row(
        Task(typographic.evaluate, "", {"num_images": 150, "means": True, "classes": str(CIFAR)}),
        ("testreg", "from zeros", "paper", "jroth"),
        least=60,
    ),
}


def limited(row: Row, limit: int | None) -> Task:
    """The task of a row with at most `limit` images, and at most as many steps of a fit, for a quick look."""
    options = dict(row.task.options)
    if limit is not None:
        steps = ("iterations", "warm_up", "epochs", "num_c")
        options |= {name: min(options[name], limit) for name in steps if name in options}
        options["num_images"] = max(min(options.get("num_images") or limit, limit), row.least)
    return replace(row.task, options=options)
