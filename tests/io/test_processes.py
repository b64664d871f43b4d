"""Real processes, started by torchrun, with gloo on the CPU."""

import datetime
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from testreg.io import processes
from testreg.io.processes import gathered, process_group, rank, summed, world_size

ROOT = Path(__file__).parents[2]

# Two images for three processes: rank 0 has both, and the others none.
PROGRAM = """
import sys, torch
from testreg.io.images import ImageStream
from testreg.io.processes import process_group, rank, summed, world_size

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
    monkeypatch.setattr(processes, "JOINING", datetime.timedelta(seconds=1))
    message = "not all of the 2 processes were there after 1 s: one of them has stopped"
    with pytest.raises(TimeoutError, match=message), process_group("cpu"):
        pass
    assert not torch.distributed.is_initialized()
    assert processes.JOINING < processes.ANSWERING


DIAGNOSED = """
import json, sys, torch
from tiny import fresh, photograph_crops
import testreg
from testreg.io.processes import process_group, rank
from planting import plant
from testreg.report.measure import measure_report

model, photos = fresh("timm_clip"), photograph_crops()
neurons = plant(model, photos, num_neurons=4).neurons
found = {}
alone = testreg.diagnose(model, photos, progress=False).to_json()
with process_group("cpu"):
    found["shared"] = testreg.diagnose(model, photos, progress=False).to_json()
    found["few"] = testreg.diagnose(model, photos[:2], progress=False).images  # the second process has none
    try:
        testreg.diagnose(model, [], progress=False)
    except ValueError as error:
        found["none"] = str(error)
    for _ in range(2):  # the second time from the state, which only the first process has
        state = f"{sys.argv[1]}/{rank()}.safetensors"
        ranking = testreg.calibrate(model, photos, top_k=4, resume=state, progress=False).ranking
        found.setdefault("rankings", []).append(ranking)
    if rank() == 0:  # asks no other
        found["report"] = measure_report(model, testreg.RegisterNeurons.from_blocks(neurons), photos).before.images
    with open(f"{sys.argv[1]}/{rank()}.json", "w") as file:
        json.dump({"alone": alone, **found}, file)
"""


def test_processes_share_images_and_agree(tmp_path):
    (tmp_path / "program.py").write_text(DIAGNOSED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(
        [*(str(ROOT / each) for each in ("tests", "scripts")), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*torchrun, tmp_path / "program.py", tmp_path], check=True, timeout=300, env=environment)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["report"] == 45
    assert first["rankings"][0] == first["rankings"][1]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["0.safetensors"]
    assert first["few"] == 2
    assert first["none"] == "no image could be read from list"
    assert {key: value for key, value in first.items() if key != "report"} == second
    assert first["shared"]["images"] == first["alone"]["images"] == 45
    assert first["shared"]["verdict"] == first["alone"]["verdict"]
    for shared, alone in zip(first["shared"]["blocks"], first["alone"]["blocks"], strict=True):
        assert shared["after_mlp"]["outlier_fraction"] == alone["after_mlp"]["outlier_fraction"]
        assert shared["after_mlp"]["median_norm"] == pytest.approx(alone["after_mlp"]["median_norm"])
    assert first["shared"]["outliers"]["mlp_share"] == pytest.approx(first["alone"]["outliers"]["mlp_share"])


KILLED = """
import os, signal
from testreg.io.processes import gathered, process_group, rank

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
