"""How things are measured: side by side in turns, or each in a process of its own."""

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

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

ATTENTION_ON_CPU = {  # which torch does not count by itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *others, **options: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *others, **options: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


def in_turns(sides: dict[str, Run], device: str, turns: int) -> dict[str, list[float]]:
    """Seconds of each side in each turn. Its order is random, as what ran before leaves its traces in caches and heap.

    On one thread of a CPU they are CPU time, which busy neighbours disturb less.
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

    once = 0.0
    for run in [*sides.values()] * 2:  # warm-up: compilation, caches, clocks
        once = seconds(run, 1)
    calls = max(1, min(100, round(0.1 / once)))  # a short call is repeated, so that the clock's grain does not show
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    generator = random.Random(0)
    for _ in range(turns):
        for name in generator.sample(names, len(names)):
            times[name].append(seconds(sides[name], calls))
    return times


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees: else a side pays for getting back what another has given away.

    That can be thousands of page faults in one forward and none in the next. Only glibc is known to do it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compared(times: dict[str, list[float]]) -> Row:
    """Median times of the first two sides, the ratio between them, and those of all other sides to the first.

    `interval_95` is the confidence interval of the ratio. It goes by ranks, so that it holds for any distribution. Of
    fewer than 6 turns it is from the least to the greatest, which is less sure than 95 %.
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
    return [b / a for a, b in zip(times[base], times[side], strict=True)]


def cpu_seconds(run: Callable[..., object], *arguments: object) -> float:
    """CPU time of `run(*arguments)`, of all threads."""
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


def count_operations(run: Callable[..., T], *arguments: object) -> tuple[T, float]:
    """What `run(*arguments)` returns, and the floating-point operations of its matrix products, convolutions and
    attention."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_CPU) as counter:
        returned = run(*arguments)
    return returned, float(counter.get_total_flops())


def in_own_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """What `measure(*arguments)` returns in a new process, with as many threads as this one."""
    threads, spawn = torch.get_num_threads(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        return process.submit(measure, *arguments).result()


def peak_memory(device: str) -> float:
    """The most memory that this process has had so far, in MiB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not ru_maxrss where it can be helped: Linux hands the parent's peak down to a child.
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def printed(rows: Iterator[Row]) -> Iterator[Row]:
    """Passes the rows on, and prints them as they come, with a head wherever the columns change."""
    head: list[str] = []
    widths: list[int] = []
    for row in rows:
        if head != list(row):
            head = list(row)
            widths = [max(len(key), len(str(value)), 8) for key, value in row.items()]
            print("  ".join(f"{key:>{width}}" for key, width in zip(row, widths, strict=True)))
        print("  ".join(f"{value!s:>{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)
        yield row
