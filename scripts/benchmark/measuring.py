"""Measures time, operations and memory: several sides in turns, or each in a new process.

A *side* is one of the things that are compared, e.g. the plain model.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

T = TypeVar("T")
Row = dict[str, Any]
Run = Callable[[], object]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # constants of glibc's malloc.h

ATTENTION_ON_CPU = {  # operations of attention on a CPU, which torch's counter leaves out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *others, **options: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *others, **options: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


def in_turns(sides: dict[str, Run], device: str, turns: int) -> dict[str, list[float]]:
    """Run the sides in turns. Returns {side: its seconds in each turn}.

    The order in a turn is random, since the state of caches and memory depends on what ran before. With one CPU thread,
    CPU time is measured, which other programs disturb less.
    """
    keep_freed_memory()
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time

    def seconds(run: Run, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - start) / calls

    seconds_once = 0.0
    for run in [*sides.values()] * 2:  # a warm-up, which e.g. compiles
        seconds_once = seconds(run, 1)
    calls = max(1, min(100, round(0.1 / seconds_once)))  # short calls are repeated, since a clock is not exact
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    generator = random.Random(0)
    for _ in range(turns):
        for name in generator.sample(names, len(names)):
            times[name].append(seconds(sides[name], calls))
    return times


def keep_freed_memory() -> None:
    """Make the process keep memory that it frees, instead of returning it to the system (only with glibc).

    Else one side may return memory, and the next one spends time to get it back.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compared(times: dict[str, list[float]]) -> Row:
    """A row with the median times of the first two sides, their ratio, and the ratios of all others to the first.

    `interval_95` is the confidence interval of the ratio. It is computed from ranks, so it does not depend on the
    distribution. With fewer than 6 turns it is the whole range, which covers less than 95 %.
    """
    base, other, *more = times
    ratios = sorted(_ratios(times, base, other))
    rank = max(0, int((len(ratios) - 1) / 2 - 0.98 * math.sqrt(len(ratios))))
    return {
        f"{base}_ms": round(1e3 * statistics.median(times[base]), 3),
        f"{other}_ms": round(1e3 * statistics.median(times[other]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "interval_95": f"{ratios[rank]:.3f}-{ratios[-1 - rank]:.3f}",
        **{side: round(statistics.median(_ratios(times, base, side)), 4) for side in more},
        "turns": len(ratios),
    }


def _ratios(times: dict[str, list[float]], base: str, side: str) -> list[float]:
    """The ratio of a side's time to that of the side `base`, in each turn."""
    return [b / a for a, b in zip(times[base], times[side], strict=True)]


def cpu_seconds(run: Callable[..., object], *arguments: object) -> float:
    """The CPU time of `run(*arguments)` in seconds, summed over all threads."""
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


def count_operations(run: Callable[..., T], *arguments: object) -> tuple[T, float]:
    """The result of `run(*arguments)`, and the number of floating-point operations of its matrix products, convolutions
    and attention.
    """
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        returned = run(*arguments)
    return returned, float(counter.get_total_flops())


def in_own_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """The result of `measure(*arguments)` in a new process, which uses as many threads as this one."""
    threads, spawn = torch.get_num_threads(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        return process.submit(measure, *arguments).result()


def peak_memory(device: str) -> float:
    """The peak memory of this process so far, in MiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # VmHWM is better than ru_maxrss, since on Linux a child inherits its parent's ru_maxrss.
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def printed(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, and print each, with a header wherever the columns change."""
    header: list[str] = []
    widths: list[int] = []
    for row in rows:
        if header != list(row):
            header = list(row)
            widths = [max(len(key), len(str(value)), 8) for key, value in row.items()]
            print("  ".join(f"{key:>{width}}" for key, width in zip(row, widths, strict=True)))
        print("  ".join(f"{value!s:>{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)
        yield row
