"""Processes that share a run: those of torchrun, and forked ones, which need not import torch anew."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEADLINE = 120.0  # seconds after which a process that waits for ever is killed


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def environment_of(count: int) -> dict[str, str]:
    """What torchrun tells each of `count` processes, but for the rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def in_processes(count: int, work: Callable[[int], object], folder: Path) -> list[Ended]:
    """Call `work(rank)` in each of `count` processes; what they print is kept in `folder` meanwhile.

    `work` must not differentiate: autograd refuses to in a fork of a process that has compiled something.

    The exit code of a rank is 1 after an error, minus the number of the signal if one killed it, and what `work` gave
    to `sys.exit` if it called that.
    """
    shared = environment_of(count)

    def run(rank: int) -> None:
        os.environ |= {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        out, err = (open(folder / f".{rank}.{name}", "w") for name in ("out", "err"))  # noqa: SIM115
        with out, err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                work(rank)
            except Exception:
                traceback.print_exc()
                raise SystemExit(1) from None

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    ended = []
    for rank, process in enumerate(processes):
        process.join(DEADLINE)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        texts = [file for name in ("out", "err") if (file := folder / f".{rank}.{name}").exists()]
        ended.append(Ended(process.exitcode, *(file.read_text() for file in texts)))
        for file in texts:
            file.unlink()
    return ended


def torchrun(count: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `testreg` with these arguments in `count` processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, "-m", "testreg", *arguments], capture_output=True, text=True, env=environment)
