"""Calibrates with several processes: measures their time and scores, and how they end if one of them is killed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import testreg
from benchmark.calibration import rank
from benchmark.measuring import Row
from benchmark.models import MadeImages, small_planted
from testreg.io.processes import process_group

NUM_IMAGES = 512
KILLED_AT = 300  # the index of the image at which a process is killed, when ranking has begun
DEADLINE = 600.0  # seconds after which processes that have not ended are killed


def processes(args: argparse.Namespace) -> Iterator[Row]:
    """Run the same calibration with 1, 2 and 4 processes, which torchrun starts."""
    alone: dict[tuple[int, int], float] = {}
    for count in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            subprocess.run([*torchrun(count), *this_script(folder)], check=True, env=environment(), timeout=DEADLINE)
            wall = time.perf_counter() - start
            ranks = [json.loads(path.read_text()) for path in Path(folder).glob("rank*.json")]
            ranking = testreg.RegisterNeurons.load(Path(folder, "neurons.json")).ranking
        scores = {(block, unit): score for block, unit, score in ranking}
        alone = alone or scores
        if scores.keys() != alone.keys():
            raise RuntimeError(f"{count} processes list other neurons than one")
        largest = max(alone.values())
        yield {
            "processes": count,
            "images": NUM_IMAGES,
            "wall_s": round(wall, 1),
            "calibrate_s": round(max(each["wall"] for each in ranks), 2),
            "cpu_s_each": round(max(each["cpu"] for each in ranks), 2),
            "difference": f"{max(abs(scores[each] - alone[each]) for each in alone) / largest:.1e}",
        }


def killed(args: argparse.Namespace) -> Iterator[Row]:
    """Kill one of 3 processes while they rank, and measure the seconds until all have ended."""
    for started, victim in (("torchrun", 1), ("by hand", 0), ("by hand", 1)):
        with tempfile.TemporaryDirectory() as name:
            folder, command, port = Path(name), this_script(name, victim), free_port()
            if started == "torchrun":
                commands = [([*torchrun(3), *command], environment())]
            else:
                commands = [
                    ([sys.executable, *command], environment() | torchrun_variables(rank, 3, port)) for rank in range(3)
                ]
            running = []
            for index, (each, variables) in enumerate(commands):
                with (folder / f"{index}.err").open("w") as log:
                    running.append(subprocess.Popen(each, env=variables, stdout=log, stderr=log))
            codes = [_code_of(process) for process in running]
            seconds = time.time() - float((folder / "killed").read_text())
            logs = [log.read_text() for log in folder.glob("*.err")]
            yield {
                "started": started,
                "victim": victim,
                "seconds": round(seconds, 1),
                "exit_codes": " ".join(map(str, codes)),
                "said_why": sum("another of the 3 processes has ended" in log for log in logs),
                "half_written": len(half_written(folder)),
            }


def half_written(folder: Path) -> list[Path]:
    """The temporary files in a folder, and the file of the state if it cannot be read."""
    half_written_files = list(folder.glob("*part*"))
    try:
        with safe_open(folder / "state.safetensors", "pt") as state:
            state.keys()
    except Exception:
        half_written_files.append(folder / "state.safetensors")
    return half_written_files


def torchrun(count: int) -> list[str]:
    """The command that starts `count` processes, without the script."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]


def this_script(folder: str, victim: int = -1) -> list[str]:
    """The arguments of Python that run this module; `victim` is the rank to be killed, -1 for none."""
    return ["-m", "benchmark.processes", folder, str(victim)]


def environment() -> dict[str, str]:
    """The environment variables of the processes."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def torchrun_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun would set for a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _code_of(process: subprocess.Popen[bytes]) -> int | str:
    """The exit code of a process, which is killed if it does not end in time."""
    try:
        return process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"hung {process.wait()}"


class DeadlyImages(MadeImages):
    """Images that kill the process which reads one from `KILLED_AT` on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NUM_IMAGES)
        self.folder = folder

    def __getitem__(self, index: int) -> Tensor:
        if index >= KILLED_AT:
            (self.folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def run_process(folder: Path, victim: int) -> None:
    """Calibrate in one of the processes, and write its times, and in the first process the neurons."""
    torch.set_num_threads(1)
    rank_, model = int(os.environ["RANK"]), small_planted()
    images = DeadlyImages(folder) if rank_ == victim else MadeImages(NUM_IMAGES)
    wall, cpu = time.perf_counter(), time.process_time()
    with process_group("cpu"):
        neurons = rank(model, images, resume=folder / "state.safetensors" if victim >= 0 else None)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    (folder / f"rank{rank_}.json").write_text(json.dumps(spent))
    if rank_ == 0:
        neurons.save(folder / "neurons.json")


if __name__ == "__main__":
    run_process(Path(sys.argv[1]), int(sys.argv[2]))
