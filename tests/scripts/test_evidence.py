"""The evidence on a real network: what its figures mean, and that each column is what it says."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from benchmark.models import one_more_token, twin
from evidence import tables
from evidence.__main__ import main, unchanged_results
from evidence.columns import COLUMNS, Columns, in_bfloat16, pairs, with_bare_registers
from evidence.rows import ROWS, limited
from evidence.shows import Recorded, score
from PIL import Image
from planting import plant
from tiny import HF, build
from torch import Tensor

from testreg.demo.run import PHOTOGRAPHS
from testreg.evaluation.evaluation import Settings
from testreg.families import find_tower
from testreg.io.decoding import open_image
from testreg.io.loading import load_model
from testreg.neurons import RegisterNeurons
from testreg.patching.state import patch_of
from testreg.register import is_patched


class Made(dict[str, Tensor]):
    def stacked(self, name: str) -> Tensor:
        return self[name]


def seen(**changes: Tensor) -> Recorded:
    """Two images of four patches, three blocks: the first patch of the first image is an outlier behind all."""
    norms = torch.ones(2, 3, 4)
    norms[0, :, 0] = 10.0
    found = {
        "embedding": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        "norms": norms,
        "last": torch.tensor([1.0, 0.0]).expand(2, 4, 2),
        "near": torch.zeros(2, 4),
        "attention": torch.full((2, 3, 4), 0.2),
        "cls": torch.full((2, 4), 0.1),
    }
    return Recorded(Made({**found, **changes}))


def test_figures_by_hand() -> None:
    plain = {name: metric.value for name, metric in score(seen(), seen()).items()}
    assert plain == pytest.approx(
        {
            **{"outliers_left": 1, "max_over_median": 5.5, "attention_on_outliers": 0.1, "sink": 1},
            **{"hottest": 0.25, "embed": 1, "normal": 1, "former": 0, "others": 0},
        }
    )
    attention = torch.full((2, 3, 4), 0.1)
    attention[0, 0, 0] = attention[0, 2, 0] = 0.6  # of the first half, and of the last block
    attention[0, 1, 0] = 0.5
    near = torch.zeros(2, 4)
    near[0, 0], near[1] = 0.5, 0.7
    last = torch.tensor([1.0, 0.0]).repeat(2, 4, 1)
    last[0, :2] = torch.tensor([0.0, 1.0])
    changed = seen(
        norms=torch.ones(2, 3, 4),
        attention=attention,
        near=near,
        last=last,
        cls=torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.5, 0.1, 0.2, 0.2]]),
        embedding=torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
    )
    found = {name: metric.value for name, metric in score(seen(), changed).items()}
    assert found == pytest.approx(
        {
            **{"outliers_left": 0, "max_over_median": 1, "attention_on_outliers": 0.25, "sink": 5},
            **{"hottest": 0.375, "embed": 0.5, "normal": 6 / 7, "former": 0.5, "others": 0.4},
        }
    )


def test_bare_registers_are_zero_tokens_that_nothing_is_moved_to() -> None:
    plain, images = build("timm_vit"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = one_more_token(twin(plain))(images), with_bare_registers(plain, 1)(images)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, plain(images))
    assert not is_patched(plain)


def test_bfloat16_is_of_the_tower_alone() -> None:
    plain, images, seen_ = build("hf_clip"), torch.rand(2, 3, 64, 64), list[torch.dtype]()
    exact = plain(images).last_hidden_state
    hook = find_tower(plain).blocks[0].mlps[0].fc2.register_forward_hook(lambda *each: seen_.append(each[-1].dtype))
    with in_bfloat16(plain):
        rounded = twin(plain)(images).last_hidden_state
    assert plain(images).last_hidden_state.equal(exact)
    hook.remove()
    assert seen_ == [torch.bfloat16, torch.float32]
    assert rounded.dtype is torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.2, rtol=0.1)
    assert not rounded.equal(exact)


def test_the_rows_name_arguments_and_columns_that_exist() -> None:
    settings = set(inspect.signature(Settings).parameters)
    for name, row in ROWS.items():
        known = set(inspect.signature(row.task.evaluate).parameters) | settings
        assert set(row.task.options) <= known, name
        assert set(row.columns) <= set(COLUMNS), name
        assert limited(row, None).options == row.task.options
        assert limited(row, 2).options["num_images"] == max(2, row.least)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP image tower with planted neurons, their list, another one, photographs and masks."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**HF | {"num_hidden_layers": 7}, projection_dim=32)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    photographs = [open_image(file) for file in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    planted = plant(model, processor(images=photographs, return_tensors="pt")["pixel_values"]).neurons
    for saved in (model, processor):
        saved.save_pretrained(folder / "model")
    RegisterNeurons.from_json(
        {**RegisterNeurons.from_blocks(planted).to_json(), "num_registers": 2, "start": "mean"}
    ).save(folder / "neurons.json")
    RegisterNeurons.from_blocks({1: [2, 3]}).save(folder / "published.json")
    for number, photograph in enumerate(photographs[:3]):
        mask = Image.fromarray(np.pad(np.ones((32, 32), dtype=np.uint8), 16))
        for kind, image in {"val2017": photograph.resize((64, 64)), "semantic/val2017": mask}.items():
            file = folder / "data" / "coco256" / kind / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return folder


def command(network: Path, work: Path, neurons: str = "neurons.json", **options: str) -> dict[str, Any]:
    """What the command writes."""
    files = {"--neurons": network / neurons, "--published": network / "published.json", "--images": PHOTOGRAPHS}
    named = {**files, "--data": network / "data", "--note": "tiny", "--limit": 3, "--work": work / "kept", **options}
    rows = ["--rows", "shows", "attention-seg", "-o", str(work / "made.json")]
    main([str(network / "model"), *rows, *(str(each) for pair in named.items() for each in pair)])
    return json.loads((work / "made.json").read_text())


@pytest.mark.slow
def test_one_command_makes_all_columns(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("testreg", "zeroed")
    monkeypatch.setitem(ROWS, "attention-seg", replace(ROWS["attention-seg"], columns=few))
    made = command(network, tmp_path)
    assert {name: facts.get("num_registers") for name, facts in made["columns"].items()} == {
        **{"testreg": 2, "from zeros": 2, "one register": 1, "paper": 1, "jroth": 1, "joint": 1, "static": 2},
        **{"zeroed": None, "random": 2, "bare": 2},
    }
    for task, names in {"shows": set(COLUMNS), "attention-seg": set(few)}.items():
        assert set(made["tasks"][task]["metrics"]) == {"plain"} | names
        assert set(made["tasks"][task]["difference"]) == names == set(made["tasks"][task]["cpu_seconds"])
        assert made["tasks"][task]["protocol"]["dtype"] == "float32"
    shown = made["tasks"]["shows"]["metrics"]
    assert shown["plain"]["embed"] == pytest.approx(1)
    assert shown["plain"]["outliers_left"] == 1
    for name in ("testreg", "one register", "static", "zeroed"):
        assert shown[name]["outliers_left"] < 0.2, name
    for name in ("random", "bare", "jroth"):
        assert shown[name]["outliers_left"] > 0.5, name
    assert len({str(each) for each in shown.values()}) == len(shown)  # no column is another
    for part in (tables.of_columns, tables.of_shows, tables.of_values, tables.of_intervals, tables.of_times):
        assert "| " in part(made)

    monkeypatch.setattr("evidence.__main__.evaluated", None)  # nothing is computed anew
    assert command(network, tmp_path)["tasks"] == made["tasks"]
    facts = made["columns"] | {"testreg": made["columns"]["jroth"], "zeroed": made["columns"]["bare"]}
    kept = unchanged_results(tmp_path / "made.json", {**made, "columns": facts})
    assert set(kept["shows"]["metrics"]) == {"plain", *COLUMNS} - {"testreg", "zeroed"}
    assert unchanged_results(tmp_path / "made.json", {**made, "limit": 2}) == {}
    assert unchanged_results(tmp_path / "nowhere.json", made) == {}


def test_columns_go_two_by_two(network: Path, tmp_path: Path) -> None:
    columns = columns_of(network, tmp_path)
    assert pairs(columns, ["testreg", "jroth", "zeroed", "one register"]) == [
        ("testreg", "zeroed"),
        ("jroth", "one register"),
    ]
    assert pairs(columns, ["static", "bare"]) == [(None, "static"), (None, "bare")]


def test_a_column_as_neurons_and_as_a_network_is_the_same(network: Path, tmp_path: Path) -> None:
    columns = columns_of(network, tmp_path)
    patch = patch_of(columns.network_of("random").model)
    assert patch.neurons.by_block() == columns.moved("random").by_block()
    assert (patch.num_registers, patch.max_over) == (2, "neuron")
    assert set(patch.neurons.by_block()) == set(columns.chosen.by_block())
    assert patch_of(columns.network_of("joint").model).options["max_over"] == "layer"
    assert not is_patched(columns.network.model)


def columns_of(network: Path, kept: Path) -> Columns:
    chosen, published = (RegisterNeurons.load(network / f"{name}.json") for name in ("neurons", "published"))
    return Columns(load_model(str(network / "model")), chosen, published, str(PHOTOGRAPHS), kept)
