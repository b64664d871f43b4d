"""Real processes, started by torchrun, with gloo on the CPU."""

import datetime
import os
import socket
import subprocess
import sys

import pytest
import torch

from testreg import distributed
from testreg.distributed import gathered, process_group, rank, summed, world_size

# Two images for three processes: rank 0 has both, and the others none.
PROGRAM = """
import sys, torch
from testreg.data import ImageStream
from testreg.distributed import process_group, rank, summed, world_size

assert (rank(), world_size()) == (0, 1)
with process_group("cpu") as device:
    assert device == torch.device("cpu")
    sums = {"order": torch.tensor([1e20, -1e20, 1.0][rank()]), "all": torch.tensor([1, 10, 100][rank()])}
    if rank() == 1:
        sums["count"] = torch.tensor([5])
    for number, image in ImageStream(torch.ones(2, 3, 4, 4)).numbered(0, rank(), world_size()):
        sums["images"] = sums.get("images", 0) + image
    torch.save({"size": world_size(), "mine": sorted(sums), "sums": summed(sums)}, f"{sys.argv[1]}/{rank()}.pt")
assert (rank(), world_size()) == (0, 1)
"""


def test_sums_over_processes(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    subprocess.run(
        [*torchrun, tmp_path / "program.py", tmp_path],
        check=True,
        timeout=120,
    )
    ranks = [torch.load(tmp_path / f"{i}.pt") for i in range(3)]
    assert [each["size"] for each in ranks] == [3, 3, 3]
    assert [each["mine"] for each in ranks] == [["all", "images", "order"], ["all", "count", "order"], ["all", "order"]]
    for each in ranks:
        assert list(each["sums"]) == ["order", "all", "images", "count"]
        assert each["sums"]["all"] == 111
        assert each["sums"]["order"] == 1  # 0 if rank 2, which has the 1, were not added last
        assert torch.equal(each["sums"]["images"], torch.full((3, 4, 4), 2.0).double())
        assert torch.equal(each["sums"]["count"], torch.tensor([5]))


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_single_process_needs_no_group(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sums = {"a": torch.ones(2)}
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        assert (rank(), world_size()) == (0, 1)
        assert torch.equal(summed(sums)["a"], torch.ones(2))
        assert gathered("a") == ["a"]


@pytest.fixture
def one_of_two(monkeypatch):
    """The environment of one of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


@pytest.mark.parametrize("own_rank", ["0", "1"])
def test_a_process_that_never_comes_is_not_waited_for(own_rank, one_of_two, monkeypatch):
    monkeypatch.setenv("RANK", own_rank)
    monkeypatch.setattr(distributed, "JOINING", datetime.timedelta(seconds=1))
    message = "not all of the 2 processes were there after 1 s: one of them has stopped"
    with pytest.raises(TimeoutError, match=message), process_group("cpu"):
        pass
    assert not torch.distributed.is_initialized()
    assert distributed.JOINING < distributed.ANSWERING


KILLED = """
import os, signal
from testreg.distributed import gathered, process_group, rank

with process_group("cpu"):
    assert gathered(rank()) == [0, 1]
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    gathered(1)
"""


def test_a_process_that_is_killed_ends_the_other(one_of_two, tmp_path):
    (tmp_path / "program.py").write_text(KILLED)
    first, second = (
        subprocess.Popen(
            [sys.executable, tmp_path / "program.py"],
            env={**os.environ, "RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    try:
        _, error = first.communicate(timeout=60)
        assert "RuntimeError: another of the 2 processes has ended, or does not answer" in error
        assert first.returncode == 1
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
