"""The JSON schema of the neuron file: what testreg writes and brings along follows it, what it refuses does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from planting import plant
from tiny import fresh, photograph_crops

import testreg
from testreg.neurons import RegisterNeurons, config_folder

SCHEMA = json.loads((Path(testreg.__file__).parent / "neurons.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)
VALID: dict[str, Any] = {"format": "testreg-neurons", "version": 2, "neurons": [[5, 599, 7.0], [4, 28, None]]}


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(VALID)


@pytest.mark.parametrize("path", sorted(config_folder().glob("*.json")), ids=lambda path: path.stem)
def test_bundled_lists_follow_it(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text(encoding="utf-8")))


def test_a_list_that_calibrate_writes_follows_it(tmp_path: Path) -> None:
    images, model = photograph_crops(), fresh("timm_clip").eval()
    plant(model, images, num_neurons=4)
    testreg.calibrate(model, images, progress=False).save(tmp_path / "neurons.json")
    data = json.loads((tmp_path / "neurons.json").read_text())
    VALIDATOR.validate(data)
    assert data["calibration"].keys() >= {"ignored", "dropped", "max_change"}, "said also where there are none"
    assert "out_of_time" not in data["calibration"]


WRONG: dict[str, dict[str, Any]] = {
    "another format": {"format": "neurons"},
    "no neurons": {"neurons": []},
    "a negative unit": {"neurons": [[1, -2, None]]},
    "a block that is no number": {"neurons": [["1", 2, None]]},
    "two of three": {"neurons": [[1, 2]]},
    "top_k of nothing": {"top_k": 0},
    "verified in words": {"verified": "yes"},
    "a depth that is no number": {"model": {"depth": "12"}},
    "names that are one": {"model": {"names": "timm:a"}},
    "a size of one side": {"calibration": {"verified_at": [{"image_size": [224]}]}},
    "a curve that is none": {"calibration": {"curve": [1]}},
    "a point of the curve without figures": {"calibration": {"curve": [{"neurons": 3}]}},
    "a round without neurons": {"calibration": {"rounds": [{"round": 1, "curve": []}]}},
    "neurons of two numbers that were dropped": {"calibration": {"dropped": [[1, 2]]}},
    "a target in words": {"calibration": {"target": "few"}},
    "positions of no grid": {"calibration": {"ignored": [{"positions": []}]}},
    "a version that is not read any more": {"version": 1},
}


@pytest.mark.parametrize("case", WRONG)
def test_it_refuses_what_testreg_refuses(case: str) -> None:
    data = {**VALID, **WRONG[case]}
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ValueError, match="the neuron JSON"):
        RegisterNeurons.from_json(data)
