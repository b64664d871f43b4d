"""Several processes that share the images of one run, as torchrun starts them."""

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

JOINING = datetime.timedelta(seconds=30)  # from the first process to the last: they are started together
ANSWERING = datetime.timedelta(minutes=30)  # a process may read and compute so long while others wait for it


def rank() -> int:
    """The number of this process among those that share the run: 0 if it is alone."""
    return dist.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def all_gather(value: T) -> list[T]:
    """The `value` of each process, by rank; all of them must call this. Tensors are best on the CPU.

    Raises:
        RuntimeError: another process has ended, or has not called this for so long that it is given up.
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
    """Add to sums over images, which are kept in float64 on the CPU."""
    for name, value in more.items():
        value = value.detach().cpu().double()
        sums[name] = sums[name] + value if name in sums else value


def all_reduce_sum(sums: Sums) -> Sums:
    """The sums over all processes. Those that had no image may lack keys.

    The sums are gathered and then added in the order of ranks, so that all processes have the same result, bit for bit.
    """
    total: Sums = {}
    for each in all_gather(sums):
        add(total, each)
    return total


@contextmanager
def process_group(device: str | torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for as long as the context lasts, and yield this one's device.

    With "cuda", each process gets the GPU of its local rank. A process that was started alone, or that has a group
    already, gets `device` as it is.

    Nobody waits for ever. All processes must have called this within `JOINING` of the first. After that, one that has
    ended is noticed by the others as soon as they exchange results (gloo), or is noticed by torchrun, which stops them;
    one that is alive but silent is waited for as long as an honest computation may take: `ANSWERING`.

    Raises:
        TimeoutError: not all processes are there in time.
    """
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # through which NCCL sends objects
    store, own_rank, size = _joined()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=ANSWERING)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _joined() -> tuple[dist.Store, int, int]:
    """The store that the processes share, this one's rank and their number, once all of them are there."""
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=JOINING))
        store.set(f"testreg/{own_rank}", "here")
        store.wait([f"testreg/{each}" for each in range(size)], JOINING)
    except dist.DistError as error:
        raise TimeoutError(
            f"not all of the {os.environ['WORLD_SIZE']} processes were there after {JOINING.seconds} s: one of them "
            f"has stopped, or was not started ({_first_line(error)})"
        ) from error
    return store, own_rank, size


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
