import json
import math
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from lists import neurons, write

import testreg
from testreg import RegisterNeurons
from testreg.neurons import Calibration, config_folder


@pytest.mark.parametrize("scored", [True, False])
def test_round_trip(tmp_path: Path, scored: bool) -> None:
    before = neurons() if scored else RegisterNeurons.from_blocks({3: [5, 1], 0: [2]})
    before.save(tmp_path / "new folder" / "n.json")
    assert RegisterNeurons.load(tmp_path / "new folder" / "n.json") == before


def test_the_file_has_one_neuron_a_line(tmp_path: Path) -> None:
    neurons().save(tmp_path / "n.json")
    lines = (tmp_path / "n.json").read_text().splitlines()
    assert [line.strip() for line in lines[-6:-2]] == [
        "[5, 599, 7.0],",
        "[5, 1869, 4.5],",
        "[4, 2028, 2.25],",
        "[3, 1074, 1.2]",
    ]


def test_keys_named_like_the_list_do_not_confuse_the_writer(tmp_path: Path) -> None:
    before = neurons(provenance={"neurons": ['\n "neurons": ['], "top_k": 1})
    before.save(tmp_path / "n.json")
    assert RegisterNeurons.load(tmp_path / "n.json") == before


def test_hand_written_json(tmp_path: Path) -> None:
    loaded = RegisterNeurons.load(write(tmp_path / "n.json"))
    assert loaded.ranking == ((5, 599, 7.0), (4, 2028, 2.25))
    assert (loaded.top_k, loaded.model, loaded.verified) == (None, {}, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": ...}, "not a register neuron JSON"),
        ({"format": "other"}, "not a register neuron JSON"),
        ({"version": ...}, "version must be a whole number, got None"),
        ({"version": "1"}, "version must be a whole number, got '1'"),
        ({"version": 0}, "version must be a whole number, got 0"),
        ({"neurons": ...}, '"neurons" must be a list'),
        ({"neurons": {"5": [599]}}, '"neurons" must be a list'),
        ({"neurons": [[5, 599]]}, '"neurons" must be a list'),
        ({"neurons": []}, "empty"),
        ({"neurons": [[5, 599, 1.0], [5, 599, 0.5]]}, "duplicate register neuron: block 5, unit 599"),
        ({"neurons": [[5, 599, 1.0], [5, 600, 2.0]]}, "not sorted: block 5, unit 600"),
        ({"neurons": [[5, -1, 1.0]]}, r"\(5, -1\)"),
        ({"neurons": [[True, 1, 1.0]]}, r"\(True, 1\)"),
        ({"neurons": [[5, 1.0, 1.0]]}, r"\(5, 1\.0\)"),
        ({"neurons": [[5, 1, "high"]]}, "block 5, unit 1 is 'high'"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"model": "timm:a"}, '"model" must be an object'),
        ({"model": {"depth": "12"}}, '"depth" of the model must be a whole number'),
        ({"model": {"mlp_width": 1.5}}, '"mlp_width" of the model must be a whole number'),
        ({"calibration": None}, '"calibration" must be an object'),
        ({"provenance": []}, '"provenance" must be an object'),
        ({"verified": "yes"}, '"verified" must be true or false'),
        ({"model": {"name": ["a"]}}, '"name" of the model must be text'),
        ({"model": {"default_for": 3}}, '"default_for" of the model must be a list of text'),
        ({"model": {"fingerprint": 3}}, '"fingerprint" of the model must be text'),
        ({"calibration": {"detection_block": "last"}}, '"detection_block" of the calibration must be a whole number'),
        ({"calibration": {"verified_at": {}}}, '"verified_at" of the calibration must be a list of objects'),
        ({"calibration": {"verified_at": [3]}}, '"verified_at" of the calibration must be a list of objects'),
        ({"calibration": {"verified_at": [{"grid": [0, 0]}]}}, '"grid" .*must be two whole numbers above 0'),
        ({"calibration": {"verified_at": [{"grid": 3}]}}, '"grid" .*must be two whole numbers above 0'),
        ({"calibration": {"verified_at": [{"image_size": [1.5, 2]}]}}, '"image_size" .*must be two whole numbers'),
        ({"calibration": {"verified_at": [{"dtype": 32}]}}, '"dtype" .*must be text'),
        ({"calibration": {"target": 10**400}}, "1000.* is too large a number"),
        ({"neurons": [[5, 1, 10**400]]}, "1000.* is too large a number"),
        ({"neurons": [[5, 1, "x" * 10**6]]}, "'xxx.*not a finite number"),
        ({"version": "\x1b[31mred"}, r"version must be a whole number, got '\\x1b\[31mred'"),
    ],
)
def test_every_error_names_the_file(tmp_path: Path, changes: dict, message: str) -> None:
    path = write(tmp_path / "mine.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        RegisterNeurons.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    assert str(caught.value).isprintable()


def test_enormous_and_hostile_values_are_named_briefly() -> None:
    for ranking in (((1, 2, 10**400),), ((1, 2, 10**5000),), ((1, 10**5000, None),) * 2):
        with pytest.raises(ValueError, match=r"block 1, unit") as caught:
            RegisterNeurons(ranking)
        assert len(str(caught.value)) < 300
    hostile = RegisterNeurons(((1, 2, None),), model={"name": "\x1b]0;owned\x07" + "x" * 10**6, "depth": 3})
    with pytest.raises(ValueError, match="made for 3 blocks") as caught:
        hostile.check_fits(4, 10)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_scores_that_are_no_numbers(tmp_path: Path, literal: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(f'{{"format": "testreg-neurons", "version": 2, "neurons": [[5, 599, {literal}]]}}')
    with pytest.raises(ValueError, match=f"mine.json: {literal} is not a finite number"):
        RegisterNeurons.load(path)


def test_an_overflowing_score(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"format": "testreg-neurons", "version": 2, "neurons": [[5, 599, 1e999]]}')
    with pytest.raises(ValueError, match=r"mine\.json: 1e999 is not a finite number"):
        RegisterNeurons.load(path)


def test_a_file_truncated_anywhere(tmp_path: Path) -> None:
    neurons().save(tmp_path / "n.json")
    text = (tmp_path / "n.json").read_text().rstrip()
    for length in range(0, len(text), 7):
        (tmp_path / "cut.json").write_text(text[:length])
        with pytest.raises(ValueError, match=r"cut\.json is not valid JSON \(truncated\?\)"):
            RegisterNeurons.load(tmp_path / "cut.json")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe", b"not json"])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "picture.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"picture\.json is not valid JSON"):
        RegisterNeurons.load(tmp_path / "picture.json")


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_nesting(tmp_path: Path, nested: str) -> None:
    (tmp_path / "deep.json").write_text(nested)
    with pytest.raises(ValueError, match=r"deep\.json: nested too deeply"):
        RegisterNeurons.load(tmp_path / "deep.json")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path):
        with pytest.raises(OSError, match=r"is not a regular file|is a folder"):
            RegisterNeurons.load(path)


HOSTILE_VALUES = [
    *(None, True, -1, 0, 2.5, 10**18, 10**400, 1e308, "", "\x1b[2J", "x" * 10**5, [], {}, [[]], [0, 0], {"a": []}),
    *([1, 2, 3], [[1, 2, 3]], {"grid": [0, 0], "dtype": 3}, [{"grid": [0, 0], "dtype": "float32"}]),
]


def mutated(value: object, pick: random.Random) -> object:
    """JSON with one value, somewhere in it, replaced, left out or doubled."""
    if not value or not isinstance(value, list | dict) or pick.random() < 0.02:
        return pick.choice(HOSTILE_VALUES)
    changed = value.copy()
    key = pick.choice(range(len(value)) if isinstance(value, list) else list(value))
    if pick.random() < 0.1:
        del changed[key]
    elif pick.random() < 0.1 and isinstance(changed, list):
        changed.append(changed[key])
    else:
        changed[key] = mutated(value[key], pick)
    return changed


def result_or_error(action: Callable[..., object], *args: object) -> object:
    """What the action gives, or the message of its ValueError, which is short and on one line."""
    try:
        return action(*args)
    except ValueError as error:
        message, kind = str(error), type(error)
    assert kind is ValueError
    assert message.isprintable()
    assert len(message) < 600
    return message


def test_fuzzed_files_are_valid_lists_or_give_one_error_that_names_them(tmp_path: Path) -> None:
    pick, path, model = random.Random(0), tmp_path / "fuzzed.json", tiny.build("timm_vit")
    whole = {
        **neurons(ranking=((1, 3, 7.0), (2, 77, 2.0)), top_k=2, model={"name": "a", "depth": 4}).to_json(),
        "calibration": json.loads((config_folder() / "demo.json").read_text())["calibration"],
    }
    loaded = 0
    for _ in range(600):
        data = whole
        for _ in range(pick.randint(0, 2)):
            data = mutated(data, pick)
        text = json.dumps(data)
        if pick.random() < 0.2:
            at = pick.randrange(len(text))
            text = text[:at] + pick.choice(["", "[", "\0", "9" * 400, "e999", "NaN", '"', "\x1b"]) + text[at + 1 :]
        path.write_text(text)
        found = result_or_error(RegisterNeurons.load, path)
        if not isinstance(found, RegisterNeurons):
            assert str(path) in found
            continue
        loaded += 1
        found.save(tmp_path / "again.json")
        assert RegisterNeurons.load(tmp_path / "again.json") == found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if result_or_error(testreg.patch, model, found) is model:
                with torch.no_grad():
                    model(torch.zeros(1, 3, tiny.IMAGE, tiny.IMAGE))
                testreg.unpatch(model)
    assert 100 < loaded < 500


@pytest.mark.parametrize("text", ["[]", "3", '{"weights": {}}'])
def test_foreign_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not a register neuron JSON"):
        RegisterNeurons.load(tmp_path / "config.json")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no neuron JSON at .*absent\.json"):
        testreg.patch(tiny.build("timm_vit"), tmp_path / "absent.json")


def test_version_1_is_refused_with_the_fix(tmp_path: Path) -> None:
    path = write(tmp_path / "n.json", version=1, calibration={"detection_layer": 3})
    with pytest.raises(ValueError, match=r"n\.json was made by an older testreg \(version 1\): calibrate again"):
        RegisterNeurons.load(path)


def test_a_list_without_a_number_of_registers_means_one(tmp_path: Path) -> None:
    assert RegisterNeurons.load(write(tmp_path / "n.json")).num_registers == 1


def test_a_newer_version_with_unknown_keys_only_warns(tmp_path: Path) -> None:
    path = write(tmp_path / "n.json", version=3, per_head={"a": 1}, zoom=3)
    with pytest.warns(UserWarning, match=r"n\.json has version 3, newer .*ignored: per_head, zoom") as caught:
        loaded = RegisterNeurons.load(path)
    assert len(caught) == 1
    assert loaded == RegisterNeurons.load(write(path))


def test_save_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    neurons().save(tmp_path / "n.json")
    before = (tmp_path / "n.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        neurons(calibration=Calibration(target=math.nan)).save(tmp_path / "n.json")
    assert (tmp_path / "n.json").read_bytes() == before


@pytest.mark.parametrize("step", ["pathlib.Path.write_text", "pathlib.Path.chmod", "os.replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    neurons().save(tmp_path / "n.json")
    before = (tmp_path / "n.json").read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        if step.endswith("write_text"):
            args[0].write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space left"):
        neurons(top_k=1).save(tmp_path / "n.json")
    assert [path.name for path in tmp_path.iterdir()] == ["n.json"]
    assert (tmp_path / "n.json").read_bytes() == before


def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    neurons().save(tmp_path / "n.json")
    assert (tmp_path / "n.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_list_as_a_dict_is_its_json(tmp_path: Path) -> None:
    neurons().save(tmp_path / "n.json")
    assert RegisterNeurons.from_json(neurons().to_json()) == neurons()
    assert json.loads((tmp_path / "n.json").read_text()) == neurons().to_json()
