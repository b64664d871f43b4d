"""What a patched forward does that a plain one does not, operation by operation."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.forward import DTYPES, sides_of
from benchmark.measuring import Row, count_operations
from benchmark.models import build, random_images

SIDES = ("plain", "patched")


def operations(args: argparse.Namespace) -> Iterator[Row]:
    """The calls of each operation in a plain and in a patched forward, and the time of the calls in the latter.

    The few milliseconds that a register costs drown in the noise of whole forwards. These are the operations
    themselves, on the processor: calls that the plain forward makes as well count with the mean time of all calls. The
    profiler adds a microsecond or so to each. What the calls that both make have to do more, for one token more, is
    the last row, as a share of the arithmetic.
    """
    for dtype in args.dtype:
        models = sides_of(build(args, DTYPES[dtype]))
        images = random_images(args.batch[0], models["plain"])
        with torch.inference_mode():
            found = {side: profiled(functools.partial(models[side], images), args.repeats) for side in SIDES}
            plain_sums, sums = (count_operations(models[side], images)[1] for side in SIDES)
        (plain_calls, plain_ms), (calls, ms) = (found[side] for side in SIDES)
        more = {name: number for name in calls if (number := calls[name] - plain_calls.get(name, 0)) > 0}
        own = {name: ms[name] * number / calls[name] for name, number in more.items()}
        rows = sorted(((name, more[name], own[name]) for name in own), key=lambda row: -row[2])
        total = sum(plain_ms.values())
        token = total * (sums / plain_sums - 1)
        rows += [("all of them", sum(more.values()), sum(own.values())), ("arithmetic of a token", 0, token)]
        for name, number, milliseconds in rows:
            yield {
                "dtype": dtype,
                "operation": f"{name:24}",
                "more_calls": number,
                "ms": round(milliseconds, 3),
                "of_the_forward": f"{milliseconds / total:.4%}",
            }


def profiled(run: Callable[[], object], repeats: int) -> tuple[dict[str, int], dict[str, float]]:
    """Calls of each operation in one forward, and their time in milliseconds: the median over the forwards."""
    times: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = {}
    run()  # warms up
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        for event in profiler.key_averages():
            times[event.key].append(event.self_cpu_time_total / 1e3)
            calls[event.key] = event.count
    return calls, {name: statistics.median(each) for name, each in times.items()}
