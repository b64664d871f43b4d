"""The comparison with the untouched network: what its figures mean, and that each way is measured as what it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from restoration import closeness, picture, tables, tasks
from restoration.__main__ import main
from restoration.closeness import Recorded
from restoration.networks import Networks
from safetensors.torch import save_file
from tiny import fresh
from torch import nn

from testreg.demo.run import PHOTOGRAPHS
from testreg.evaluation import attention_seg
from testreg.evaluation.result import Result
from testreg.families import find_tower
from testreg.io.decoding import open_image
from testreg.io.loading import LoadedModel, load_model
from testreg.io.preprocessing import OwnTransform
from testreg.neurons import RegisterNeurons
from testreg.register import is_patched


def test_figures_by_hand() -> None:
    before = torch.ones(2, 1, 20)
    before[1, 0, :4] = 30.0  # four outliers after the last block
    after = torch.ones(2, 1, 20)
    after[1, 0, 0] = 30.0  # one is left
    axes = torch.eye(2)
    untouched = axes[0].expand(1, 21, 2)
    tokens = untouched.clone()
    tokens[0, 1:3] = axes[1]  # two of those that were outliers look elsewhere
    found = closeness.figures(
        Recorded(before, tokens), Recorded(after, tokens), Recorded(torch.ones(2, 1, 20), untouched)
    )
    assert found == pytest.approx(
        {
            "outliers": 4 / 20,
            "max_over_median": 30.0,
            "outliers_left": 1 / 4,
            "cosine_cls": 1.0,
            "cosine_patches": 18 / 20,
            "cosine_outliers": 2 / 4,
        }
    )
    assert closeness.counts({1: [4, 5], 2: [6]}, {1: [5, 7]}) == {"neurons": 3, "of_planted": 1}


def kept_networks(folder: Path) -> Networks:
    """Networks of which all that takes long was made before: units 4 and 5 of block 1 are planted, 4 is chosen."""
    model = fresh("hf_dinov2")
    save_file(fresh("hf_dinov2", seed=1).state_dict(), folder / "planted.safetensors")
    (folder / "planted.json").write_text(json.dumps({1: [4, 5]}))
    RegisterNeurons.from_blocks({1: [4]}).save(folder / "testreg.json")
    RegisterNeurons.from_blocks({2: [7]}).save(folder / "activation.json")
    return Networks("tiny", model, torch.randn(2, 3, 64, 64), "spread", 0, folder)


def loaded(model: nn.Module, name: str) -> LoadedModel:
    return LoadedModel(model, OwnTransform(model), name)


def test_what_was_made_is_kept(tmp_path: Path) -> None:
    networks = kept_networks(tmp_path)
    moved = networks.moved(["activation"])
    assert (moved["testreg"], moved["paper"]) == ({1: [4]}, {2: [7]})
    assert {block: len(units) for block, units in moved["random"].items()} == {1: 1}
    assert not {4, 5} & set(moved["random"][1])
    fc2 = find_tower(networks.planted).blocks[1].mlps[0].columns
    with networks.zeroed() as model:
        silent = find_tower(model).blocks[1].mlps[0].columns
        assert not silent[:, 4].any()
        assert silent[:, 5].any()
    assert fc2[:, 4].any()


def test_each_way_has_its_own_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate(model: Any, data: Path, *, neurons: Any, against: Any, **options: Any) -> Result:
        asked.append((model.name, str(data), neurons, None if against is None else against.name, options))
        number = float(len(asked))
        metrics = {"plain": {"m": 0.0}}
        if neurons is not None:
            metrics["patched"] = {"m": number}
        if against is not None:
            metrics["against"] = {"m": -number}
        return Result(
            task="lost",
            model=model.name,
            data=str(data),
            protocol={"images": 3, "neurons": neurons, "against": None},
            metrics=metrics,
            difference={"m": (number, number, number)} if neurons is not None else None,
            difference_against={"m": (-number, -number, -number)} if against is not None else None,
        )

    monkeypatch.setitem(tasks.TASKS, "lost", tasks.Task(evaluate, "coco", {"size": 28}))
    networks = kept_networks(tmp_path)
    with networks.zeroed() as silent:
        others = {
            name: loaded(model, name) for name, model in {"untouched": networks.untouched, "zeroing": silent}.items()
        }
        moved = networks.moved(["activation"])
        planted = loaded(networks.planted, "planted")
        found = tasks.evaluated(tasks.TASKS["lost"], planted, moved, others, tmp_path, seed=3)
    options = {"size": 28, "seed": 3}
    assert asked == [
        ("planted", str(tmp_path / "coco"), {1: [4]}, "untouched", options),
        ("planted", str(tmp_path / "coco"), {2: [7]}, "zeroing", options),
        ("planted", str(tmp_path / "coco"), moved["random"], None, options),
    ]
    values = {way: each["m"] for way, each in found["metrics"].items()}
    assert values == {"planted": 0, "testreg": 1, "untouched": -1, "paper": 2, "zeroing": -2, "random": 3}
    assert found["difference"]["zeroing"] == {"m": [-2, -2, -2]}
    assert found["protocol"] == {"images": 3}
    assert not is_patched(networks.planted)
    made = {"tasks": {"lost": found}}
    assert tables.of_tasks(made).splitlines()[2] == (
        "| lost | `m` | -1.0000 | 0.0000 | 1.0000 | 2.0000 | -2.0000 | 3.0000 | +1.0000 [+1.0000, +1.0000] |"
    )


@pytest.mark.slow
def test_one_command_makes_tables_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the demo model, as if its neurons had been planted here."""
    demo = load_model("demo")
    neurons = {3: [47, 55, 105, 172, 214, 225]}
    work = tmp_path / "work" / "spread-0"
    work.mkdir(parents=True)
    save_file(demo.model.state_dict(), work / "planted.safetensors")
    (work / "planted.json").write_text(json.dumps(neurons))
    for name, units in {"testreg": neurons, "activation": {3: [0, 47]}}.items():
        RegisterNeurons.from_blocks(units).save(work / f"{name}.json")
    for name in ("astronaut", "coffee"):
        photograph = open_image(PHOTOGRAPHS / f"{name}.jpg").resize((64, 64))
        mask = Image.fromarray(np.pad(np.ones((32, 32), dtype=np.uint8), 16))
        for kind, image in {"images": photograph, "masks": mask}.items():
            (tmp_path / "data" / "coco256" / kind).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "data" / "coco256" / kind / f"{name}.png")
    options = {"size": 64, "num_images": 2}
    monkeypatch.setattr(tasks, "TASKS", {"attention-seg": tasks.Task(attention_seg.evaluate, "coco256", options)})
    monkeypatch.setattr(picture, "SIZE", 64)
    written = ["-o", str(tmp_path / "made.json"), "--picture", str(tmp_path / "made.png")]
    folders = ["--images", str(PHOTOGRAPHS), "--test", str(PHOTOGRAPHS), "--work", str(tmp_path / "work")]
    main(["demo", *folders, *written, "--num-test", "2", "--tasks", "all", "--data", str(tmp_path / "data")])
    made = json.loads((tmp_path / "made.json").read_text())
    ways = made["ways"]
    assert ways["planted neurons"] == pytest.approx(ways["testreg"])
    assert ways["testreg"]["of_planted"] == 6
    assert ways["paper"]["of_planted"] == 1
    assert ways["testreg"]["outliers_left"] < ways["random"]["outliers_left"]
    assert ways["untouched network"]["cosine_patches"] == pytest.approx(1.0)
    metrics = made["tasks"]["attention-seg"]["metrics"]
    assert set(metrics) == {"planted", "untouched", "testreg", "paper", "zeroing", "random"}
    assert metrics["untouched"] == pytest.approx(metrics["planted"])  # here they are the same
    assert metrics["zeroing"] != metrics["testreg"]
    assert Image.open(tmp_path / "made.png").width > 1000
    for part in (tables.of_ways, tables.of_tasks, tables.of_samples):
        assert part(made).startswith(("**spread", "| task"))


def test_tasks_need_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--images", "a", "--test", "b", "-o", "c", "--tasks", "knn"])
    assert "--tasks needs --data" in capsys.readouterr().err


def test_the_tasks_name_arguments_that_exist() -> None:
    import inspect

    from testreg.evaluation.evaluation import Settings

    settings = set(inspect.signature(Settings).parameters)
    for name, task in tasks.TASKS.items():
        known = set(inspect.signature(task.evaluate).parameters) | settings
        assert set(task.options) <= known, name
