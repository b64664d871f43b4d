"""Lists the operations that a patched forward has more than a plain one."""

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
    """Yield for each operation how many more calls a patched forward has, and their time on the processor.

    The cost of a register is too small to be seen in the times of whole forwards. An operation that the plain forward
    calls too counts with the mean time of all its calls. The profiler adds about a microsecond to each call. The last
    row is the time that operations of both forwards take longer because of one more token, estimated from the number of
    floating-point operations.
    """
    for dtype in args.dtype:
        models = sides_of(build(args, DTYPES[dtype]))
        images = random_images(args.batch[0], models["plain"])
        with torch.inference_mode():
            profiles = {side: profiled(functools.partial(models[side], images), args.repeats) for side in SIDES}
            plain_sums, sums = (count_operations(models[side], images)[1] for side in SIDES)
        (plain_calls, plain_ms), (calls, ms) = (profiles[side] for side in SIDES)
        extra_calls = {name: number for name in calls if (number := calls[name] - plain_calls.get(name, 0)) > 0}
        extra_ms = {name: ms[name] * number / calls[name] for name, number in extra_calls.items()}
        rows = sorted(((name, extra_calls[name], extra_ms[name]) for name in extra_ms), key=lambda row: -row[2])
        total = sum(plain_ms.values())
        token = total * (sums / plain_sums - 1)
        rows += [
            ("all of them", sum(extra_calls.values()), sum(extra_ms.values())),
            ("arithmetic of a token", 0, token),
        ]
        for name, number, milliseconds in rows:
            yield {
                "dtype": dtype,
                "operation": f"{name:24}",
                "more_calls": number,
                "ms": round(milliseconds, 3),
                "of_the_forward": f"{milliseconds / total:.4%}",
            }


def profiled(run: Callable[[], object], repeats: int) -> tuple[dict[str, int], dict[str, float]]:
    """{operation: its calls in a forward}, and {operation: their time in milliseconds, the median over forwards}."""
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
