"""The records of a calibration: read from JSON, checked, and written as they were read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from testreg.records.calibration import Calibration, Effect, FixedPositions, PlainAttention, Round, Verification

EFFECT = {
    "neurons": 4,
    "remaining": 0.25,
    "worst_block": 3,
    "excess": 0.125,
    "change_pooled": 0.01,
    "change_patches": 0.02,
}
NEVER_MEASURED = {
    "agreement": None,
    "num_registers": 1,
    "sink": None,
    "hottest": None,
    "hotter": None,
    "unlike": None,
    "start": "zeros",
}
VERIFIED: dict[str, Any] = {
    "image_size": [518, 448],
    "dtype": "float32",
    "grid": [37, 32],
    "images": 40,
    "outlier_fraction": 0.05,
    **EFFECT,
    "before": {"sink": 24.0, "hottest": 0.13},
}


def read(**entries: object) -> Calibration:
    return Calibration.from_json(entries, "the calibration")


def test_what_is_no_object() -> None:
    with pytest.raises(ValueError, match=r"the calibration must be an object, got \[\]"):
        Calibration.from_json([], "the calibration")


def test_entries_become_attributes() -> None:
    calibration = read(
        images=64,
        image_size=[518, 448],
        ignored=[{"grid": [4, 4], "positions": [[0, 3]]}],
        chosen=EFFECT,
        rounds=[{"round": 1, "added": [[2, 7, 0.5], [1, 9, None]], "curve": [EFFECT], **EFFECT}],
        verified_at=[VERIFIED],
        dropped=[[3, 5, 0.1]],
    )
    effect = Effect(4, 0.25, 3, 0.125, 0.01, 0.02)
    assert calibration == Calibration(
        images=64,
        image_size=(518, 448),
        ignored=(FixedPositions((4, 4), ((0, 3),)),),
        chosen=effect,
        rounds=(Round(1, ((2, 7, 0.5), (1, 9, None)), (effect,), effect),),
        verified_at=(Verification((518, 448), "float32", (37, 32), 40, 0.05, effect, PlainAttention(24.0, 0.13)),),
        dropped=((3, 5, 0.1),),
    )
    assert effect.change == 0.02


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"seed": -1, "images": 3},
        {"max_change": None, "target": 0.05, "dropped": []},
        {"found_by": {"hand": [1, [2]]}, "score": "(mean |a| on outliers - mean |a| elsewhere) / std"},
        {"others": 1, "order": "of no importance"},
        {"curve": [EFFECT, {**EFFECT, "agreement": None, "unknown": [1]}]},
        {"verified_at": [{key: VERIFIED[key] for key in reversed(VERIFIED)}]},
        {"verified_at": [{key: value for key, value in VERIFIED.items() if key != "before"}]},
    ],
)
def test_it_is_written_as_it_was_read(entries: dict[str, object]) -> None:
    written = read(**entries).to_json()
    assert written == entries
    assert list(written) == list(entries)
    for key, value in entries.items():
        if isinstance(value, list):
            assert [list(each) for each in written[key]] == [list(each) for each in value]


def test_what_is_not_known_of_a_calibration_is_not_written() -> None:
    assert Calibration().to_json() == {}
    assert Calibration(images=0, target_met=False).to_json() == {"images": 0, "target_met": False}
    assert not Calibration().is_known
    assert Calibration(images=0).is_known


def test_a_measurement_is_written_whole() -> None:
    effect = Effect(4, 0.25, 3, 0.125, 0.01, 0.02)
    assert effect.to_json() == EFFECT | NEVER_MEASURED
    check = Verification((518, 448), "float32", (37, 32), 40, 0.05, effect, PlainAttention(24.0, 0.13))
    assert check.to_json() == VERIFIED | NEVER_MEASURED


def test_a_change_is_written_in_its_place() -> None:
    calibration = read(verdict="none", images=3, chosen=EFFECT)
    changed = replace(calibration, images=None, target=0.1).to_json()
    assert list(changed) == ["verdict", "images", "chosen", "target"]
    assert changed["images"] is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"images": "many"}, r"\"images\" of the calibration must be a whole number, got 'many'"),
        ({"images": True}, '"images" of the calibration must be a whole number, got True'),
        ({"images": -1}, '"images" of the calibration must be a whole number, got -1'),
        ({"target": "low"}, '"target" of the calibration must be a finite number'),
        ({"target": float("nan")}, '"target" of the calibration must be a finite number'),
        ({"target_met": 1}, '"target_met" of the calibration must be true or false'),
        ({"image_size": [224]}, '"image_size" of the calibration must be two whole numbers above 0'),
        ({"stability": 3}, '"stability" of the calibration must be an object'),
        (
            {"stability": {"overlap": 1.0}},
            '"neurons" of the calibration\'s "stability" is missing: calibrate again, or',
        ),
        ({"curve": None}, '"curve" of the calibration must be a list of objects'),
        ({"curve": [1]}, '"curve" of the calibration must be a list of objects'),
        ({"curve": [{}]}, '"neurons" of the calibration\'s "curve" is missing'),
        ({"chosen": {**EFFECT, "sink": "deep"}}, '"sink" of the calibration\'s "chosen" must be a finite number'),
        ({"rounds": 3}, '"rounds" of the calibration must be a list of objects'),
        ({"rounds": ["first"]}, '"rounds" of the calibration must be a list of objects'),
        ({"rounds": [{**EFFECT, "round": 1, "added": [[1]], "curve": []}]}, r"must be a list of \[block, unit, score"),
        (
            {"rounds": [{**EFFECT, "round": 1, "added": [], "curve": 2}]},
            '"curve" of the calibration\'s "rounds" must be',
        ),
        ({"rounds": [{"round": 1, "added": [], "curve": []}]}, '"neurons" of the calibration\'s "rounds" is missing'),
        ({"dropped": [[3, 6, "x"]]}, r'"dropped" of the calibration must be a list of \[block, unit, score or null\]'),
        ({"ignored": "x"}, '"ignored" of the calibration must be a list of objects'),
        ({"ignored": [{"grid": 4, "positions": []}]}, '"grid" of the calibration\'s "ignored" must be two whole'),
        ({"ignored": [{"grid": [4, 4], "positions": [7]}]}, r'"positions" .* must be a list of \[row, column\]'),
        ({"out_of_time": "ranking"}, '"out_of_time" of the calibration must be a list of text'),
        ({"versions": []}, '"versions" of the calibration must be an object'),
    ],
)
def test_what_an_entry_may_not_be(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**entries)
