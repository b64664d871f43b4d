"""The comparison with the untouched network: what its figures mean, and that each way is measured as what it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from restoration import closeness, tables, tasks
from restoration.closeness import Seen
from restoration.networks import Networks
from tiny import fresh

from testreg.evaluation.result import Result
from testreg.families import find_tower
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
    found = closeness.figures(Seen(before, tokens), Seen(after, tokens), Seen(torch.ones(2, 1, 20), untouched))
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
    import json

    from safetensors.torch import save_file

    from testreg.neurons import RegisterNeurons

    model = fresh("hf_dinov2")
    save_file(fresh("hf_dinov2", seed=1).state_dict(), folder / "planted.safetensors")
    (folder / "planted.json").write_text(json.dumps({1: [4, 5]}))
    RegisterNeurons.from_blocks({1: [4]}).save(folder / "testreg.json")
    RegisterNeurons.from_blocks({2: [7]}).save(folder / "activation.json")
    return Networks("tiny", model, torch.randn(2, 3, 64, 64), "spread", 0, folder)


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
        others = {"untouched": networks.untouched, "zeroing": silent}
        moved = networks.moved(["activation"])
        found = tasks.evaluated("lost", networks.planted, moved, others, tmp_path, seed=3)
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


def test_the_tasks_name_arguments_that_exist() -> None:
    import inspect

    from testreg.evaluation.run import Settings

    settings = set(inspect.signature(Settings).parameters)
    for name, task in tasks.TASKS.items():
        known = set(inspect.signature(task.evaluate).parameters) | settings
        assert set(task.options) <= known, name
