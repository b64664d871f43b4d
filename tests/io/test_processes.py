"""Real processes, with gloo on the CPU."""

import datetime
import os
import signal

import pytest
import torch
from planting import plant
from ranks import environment_of, in_processes
from tiny import fresh

import testreg
from testreg.io import processes
from testreg.io.images import ImageStream
from testreg.io.processes import all_gather, all_reduce_sum, process_group, rank, world_size


def test_sums_over_processes(tmp_path):
    """Two images for three processes: rank 0 has both, and the others none."""

    def work(own_rank):
        assert (rank(), world_size()) == (0, 1)
        with process_group("cpu") as device:
            assert device == torch.device("cpu")
            assert rank() == own_rank
            sums = {"order": torch.tensor([1e20, -1e20, 1.0][rank()]), "all": torch.tensor([1, 10, 100][rank()])}
            if rank() == 1:
                sums["count"] = torch.tensor([5])
            for _, image in ImageStream(torch.ones(2, 3, 4, 4)).numbered(0, rank(), world_size()):
                sums["images"] = sums.get("images", 0) + image
            found = {"size": world_size(), "mine": sorted(sums), "sums": all_reduce_sum(sums)}
            torch.save(found, tmp_path / f"{rank()}.pt")
        assert (rank(), world_size()) == (0, 1)

    assert [(ended.code, ended.err) for ended in in_processes(3, work, tmp_path)] == [(0, "")] * 3
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
        assert torch.equal(all_reduce_sum(sums)["a"], torch.ones(2))
        assert all_gather("a") == ["a"]


@pytest.fixture
def one_of_two(monkeypatch):
    """The environment of one of two processes."""
    for name, value in environment_of(2).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("own_rank", ["0", "1"])
def test_a_process_that_never_comes_is_not_waited_for(own_rank, one_of_two, monkeypatch):
    monkeypatch.setenv("RANK", own_rank)
    monkeypatch.setattr(processes, "JOINING", datetime.timedelta(seconds=1))
    message = "not all of the 2 processes were there after 1 s: one of them has stopped"
    with pytest.raises(TimeoutError, match=message), process_group("cpu"):
        pass
    assert not torch.distributed.is_initialized()
    assert processes.JOINING < processes.ANSWERING


def test_processes_share_images_and_agree(photos, tmp_path):
    from testreg.report.measure import measure_report

    model = fresh("timm_clip")
    neurons = plant(model, photos, num_neurons=4).neurons
    alone = testreg.diagnose(model, photos, progress=False).to_json()

    def work(own_rank):
        found = {}
        with process_group("cpu"):
            found["shared"] = testreg.diagnose(model, photos, progress=False).to_json()
            found["few"] = testreg.diagnose(model, photos[:2], progress=False).images  # the second process has none
            with pytest.raises(ValueError, match=r"^no image could be read from list$"):
                testreg.diagnose(model, [], progress=False)
            for _ in range(2):  # the second time from the state, which only the first process has
                state = tmp_path / f"{rank()}.safetensors"
                ranking = testreg.calibrate(model, photos, top_k=4, resume=state, progress=False).ranking
                found.setdefault("rankings", []).append(ranking)
            if rank() == 0:  # asks no other
                assert measure_report(model, testreg.RegisterNeurons.from_blocks(neurons), photos).before.images == 45
        torch.save(found, tmp_path / f"{own_rank}.pt")

    for ended in in_processes(2, work, tmp_path):
        assert ended.code == 0, ended.err
    first, second = (torch.load(tmp_path / f"{each}.pt") for each in range(2))
    assert first == second
    assert first["rankings"][0] == first["rankings"][1]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["0.safetensors"]
    assert first["few"] == 2
    shared = first["shared"]
    assert shared["images"] == alone["images"] == 45
    assert shared["verdict"] == alone["verdict"]
    for ours, expected in zip(shared["blocks"], alone["blocks"], strict=True):
        assert ours["after_mlp"]["outlier_fraction"] == expected["after_mlp"]["outlier_fraction"]
        assert ours["after_mlp"]["median_norm"] == pytest.approx(expected["after_mlp"]["median_norm"])
    assert shared["outliers"]["mlp_share"] == pytest.approx(alone["outliers"]["mlp_share"])


def test_a_process_that_is_killed_ends_the_other(tmp_path):
    def work(own_rank):
        with process_group("cpu"):
            assert all_gather(own_rank) == [0, 1]
            if own_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            all_gather(1)

    first, second = in_processes(2, work, tmp_path)
    assert "RuntimeError: another of the 2 processes has ended, or does not answer" in first.err
    assert (first.code, second.code) == (1, -signal.SIGKILL)


def test_a_process_that_is_killed_while_it_ranks(photos, tmp_path):
    """The other ends with an error, and the state that was written before goes on to what a single process finds."""
    model, state = fresh("timm_clip"), tmp_path / "state.safetensors"
    plant(model, photos, num_neurons=4)
    images = photos.repeat(4, 1, 1, 1)  # 180, of which 96 are read before ranking begins

    class Deadly(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            if index >= 128:
                os.kill(os.getpid(), signal.SIGKILL)
            return images[index]

    # by activation, which takes no backward pass: see in_processes
    options = {"score": "activation", "top_k": 4, "held_out": 0, "stability": None, "progress": False}

    def work(own_rank):
        with process_group("cpu"):
            testreg.calibrate(model, Deadly() if own_rank == 1 else images, resume=state, **options)

    first, second = in_processes(2, work, tmp_path)
    assert "RuntimeError: another of the 2 processes has ended, or does not answer" in first.err
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert list(tmp_path.iterdir()) == [state]
    resumed = testreg.calibrate(model, images, resume=state, **options)
    alone = testreg.calibrate(model, images, **options)
    assert resumed.by_block() == alone.by_block()
    for (*neuron, score), (*expected, expected_score) in zip(resumed.ranking[:4], alone.ranking[:4], strict=True):
        assert neuron == expected
        assert score == pytest.approx(expected_score, rel=1e-5)
