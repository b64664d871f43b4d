"""Runs in which several processes, started by torchrun, share the images.

Each process has a rank, from 0 to world size - 1. Without torchrun there is one process, of rank 0.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Sums = dict[str, Tensor]
"""{name: sum over images}."""

JOINING = datetime.timedelta(seconds=30)  # how long the first process waits for the last one to start
ANSWERING = datetime.timedelta(minutes=30)  # how long processes wait for one that still reads and computes


def rank() -> int:
    """The rank of this process; 0 if it is alone."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    """Whether this process belongs to a group of torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def all_gather(value: T) -> list[T]:
    """The `value` of every process, in the order of ranks. All processes must call this. Tensors should be on the CPU.

    Raises:
        RuntimeError: another process has ended, or has not called this within `ANSWERING`.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise RuntimeError(
            f"another of the {world_size()} processes has ended, or does not answer ({_first_line(error)})"
        ) from error
    return values


def add(sums: Sums, more: Mapping[str, Tensor]) -> None:
    """Add `more` to sums over images, in place. They are kept in float64 on the CPU."""
    for name, value in more.items():
        value = value.detach().cpu().double()
        sums[name] = sums[name] + value if name in sums else value


def all_reduce_sum(sums: Sums) -> Sums:
    """The sums over the images of all processes. A process that had no image may lack names.

    The sums are gathered, then added in the order of ranks, so that all processes get the same result bit for bit.
    """
    total: Sums = {}
    for each in all_gather(sums):
        add(total, each)
    return total


@contextmanager
def process_group(device: str | torch.device) -> Iterator[torch.device]:
    """Within the `with` block, the processes that torchrun started form a group. Yields this process's device.

    With "cuda", each process gets the GPU of its local rank. A process that was started alone, or that already belongs
    to a group, gets `device` as it is.

    No process waits for ever: all must call this within `JOINING` after the first. Later, a process that has ended is
    noticed when the others exchange results (gloo), or by torchrun, which stops them; a process that is alive but does
    not answer is given up after `ANSWERING`.

    Raises:
        TimeoutError: not all processes have called this in time.
    """
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # NCCL sends objects through the current device
    store, rank_, size = _rendezvous()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_, world_size=size, timeout=ANSWERING)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _rendezvous() -> tuple[dist.Store, int, int]:
    """Wait until all processes have started. Returns their shared store, this process's rank, and their number."""
    try:
        store, rank_, size = next(dist.rendezvous("env://", timeout=JOINING))
        store.set(f"testreg/{rank_}", "here")
        store.wait([f"testreg/{each}" for each in range(size)], JOINING)
    except dist.DistError as error:
        raise TimeoutError(
            f"not all of the {os.environ['WORLD_SIZE']} processes were there after {JOINING.seconds} s: one of them "
            f"has stopped, or was not started ({_first_line(error)})"
        ) from error
    return store, rank_, size


def _first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]
