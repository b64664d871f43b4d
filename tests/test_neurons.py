import base64
import hashlib
import json
import math
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import pytest
import timm
import tiny
import torch
import transformers

import testreg
from testreg import RegisterNeurons, UnverifiedNeuronsWarning
from testreg.demo.run import planted_neurons
from testreg.families import compare_weights, find_tower, fingerprint
from testreg.families.fingerprint import agreement
from testreg.neurons import bundled, config_folder, describe_model, resolve
from testreg.patching.state import patch_of

RANKING = ((5, 599, 7.0), (5, 1869, 4.5), (4, 2028, 2.25), (3, 1074, 1.2))


def neurons(**changes: object) -> RegisterNeurons:
    fields = {
        "ranking": RANKING,
        "top_k": 3,
        "model": {"name": "timm:a", "depth": 12, "mlp_width": 3072},
        "calibration": {"images": 100},
        "provenance": {"note": "a line\nbreak, \u00e9"},
    }
    return RegisterNeurons(**{**fields, **changes})


def write(path: Path, **changes: object) -> Path:
    """A JSON as a person would write it, with `changes`; a change to ... leaves the key out."""
    data = {"format": "testreg-neurons", "version": 1, "neurons": [[5, 599, 7.0], [4, 2028, 2.25]], **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


# ---- the list -------------------------------------------------------------------------------------------------------


def test_by_block_follows_the_recommended_top_k() -> None:
    assert neurons().by_block() == {4: [2028], 5: [599, 1869]}
    assert neurons().by_block(1) == {5: [599]}
    assert neurons().by_block(4) == {3: [1074], 4: [2028], 5: [599, 1869]}
    assert neurons(top_k=None).by_block() == neurons().by_block(4)


def test_cut() -> None:
    cut = neurons().truncate(2)
    assert cut.ranking == RANKING[:2]
    assert cut.top_k is None
    assert cut.model == neurons().model
    assert neurons().truncate().ranking == RANKING[:3]
    assert neurons().ranking == RANKING, "cut() must leave the list itself alone"


def test_from_blocks_keeps_the_order_and_takes_numpy_and_torch_integers() -> None:
    made = RegisterNeurons.from_blocks({5: [9, 3], np.int64(2): np.array([7]), 4: torch.tensor([1])})
    assert made.ranking == ((5, 9, None), (5, 3, None), (2, 7, None), (4, 1, None))
    assert all(type(index) is int for neuron in made.ranking for index in neuron[:2])


def test_a_ranking_may_be_any_sequence() -> None:
    assert RegisterNeurons([[5, 599, 7.0]]) == RegisterNeurons(((5, 599, 7.0),))


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ((), "empty"),
        (((1, 2),), "sequence of"),
        ((7,), "sequence of"),
        (((-1, 2, None),), r"\(-1, 2\)"),
        (((1, -2, None),), r"\(1, -2\)"),
        (((True, 2, None),), r"\(True, 2\)"),
        (((1, 2.0, None),), r"\(1, 2\.0\)"),
        ((("1", 2, None),), r"\('1', 2\)"),
        (((1, 2, 3.0), (1, 2, 1.0)), "duplicate register neuron: block 1, unit 2"),
        (((1, 2, math.nan),), "block 1, unit 2 is nan"),
        (((1, 2, math.inf),), "block 1, unit 2 is inf"),
        (((1, 2, "3"),), "block 1, unit 2 is '3'"),
        (((1, 2, True),), "block 1, unit 2 is True"),
        (((1, 2, 3.0), (1, 5, 4.0)), "not sorted: block 1, unit 5 scores 4, the one before it 3"),
        (((1, 2, 3.0), (1, 4, None), (1, 5, 4.0)), "not sorted: block 1, unit 5"),
    ],
)
def test_what_a_ranking_may_not_be(ranking: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegisterNeurons(ranking)


@pytest.mark.parametrize("blocks", [{1: [2.5]}, {1.0: [2]}, {1: [True]}, {True: [2]}, {1: "23"}, {1: [np.bool_(True)]}])
def test_from_blocks_does_not_round(blocks: dict) -> None:
    with pytest.raises(ValueError, match=r"0-based \(block, unit\)"):
        RegisterNeurons.from_blocks(blocks)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "3"])
def test_recommended_top_k_must_be_a_positive_whole_number(top_k: object) -> None:
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        neurons(top_k=top_k)


@pytest.mark.parametrize(
    ("top_k", "message"), [(0, "at least 1, got 0"), (-3, "at least 1, got -3"), (5, "top_k=5, but the list holds 4")]
)
def test_cut_out_of_range(top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neurons().truncate(top_k)


def test_a_recommended_top_k_beyond_the_list() -> None:
    with pytest.raises(ValueError, match="top_k=9, but the list holds 4"):
        neurons(top_k=9).by_block()


def test_an_unscored_list_cannot_be_cut() -> None:
    unscored = RegisterNeurons.from_blocks({1: [2, 3]})
    assert unscored.truncate(2).ranking == unscored.ranking
    with pytest.raises(ValueError, match="no scores"):
        unscored.truncate(1)


# ---- does it fit the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({4: [0]}, r"block 4 \(unit 0\) is out of range: the model has 4 blocks"),
        ({1: [192]}, "unit 192 of block 1 is out of range: the model's MLPs have 192 neurons"),
    ],
)
def test_out_of_range_neurons_leave_the_model_unpatched(blocks: dict, message: str) -> None:
    model = tiny.build("timm_vit")
    with pytest.raises(ValueError, match=message):
        testreg.patch(model, blocks)
    assert not testreg.is_patched(model)


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ({"name": "timm:deep", "depth": 12}, "timm:deep: made for 12 blocks, but this model has 4"),
        (
            {"name": "timm:wide", "mlp_width": 3072},
            "timm:wide: made for MLPs of 3072 neurons, but this model's have 192",
        ),
    ],
)
def test_a_list_made_for_another_size_names_itself(made_for: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        testreg.patch(tiny.build("timm_vit"), RegisterNeurons(((1, 3, None),), model=made_for))


# ---- JSON -----------------------------------------------------------------------------------------------------------


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
    path.write_text(f'{{"format": "testreg-neurons", "version": 1, "neurons": [[5, 599, {literal}]]}}')
    with pytest.raises(ValueError, match=f"mine.json: {literal} is not a finite number"):
        RegisterNeurons.load(path)


def test_an_overflowing_score(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"format": "testreg-neurons", "version": 1, "neurons": [[5, 599, 1e999]]}')
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


def test_entries_of_version_1_are_read_under_their_new_names(tmp_path: Path) -> None:
    calibration = {"detection_layer": 3, "onset_layer": 2, "max_layer": 2, "curve": [{"worst_layer": 4}]}
    neurons = RegisterNeurons.load(write(tmp_path / "n.json", calibration=calibration))
    expected = {"detection_block": 3, "onset_block": 2, "max_block": 2, "curve": [{"worst_block": 4}]}
    assert neurons.calibration == expected
    neurons.save(tmp_path / "n.json")
    assert RegisterNeurons.load(tmp_path / "n.json").calibration == expected


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
        neurons(calibration={"threshold": math.nan}).save(tmp_path / "n.json")
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


# ---- the fingerprint ------------------------------------------------------------------------------------------------


def fingerprint_of(model: torch.nn.Module) -> str:
    return fingerprint(find_tower(model))


def same_weights() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A timm and a transformers DINOv2 with the same second linears."""
    ours, theirs = tiny.build("timm_dinov2", seed=0), tiny.build("hf_dinov2", seed=1)
    for a, b in zip(find_tower(ours).blocks, find_tower(theirs).blocks, strict=True):
        b.mlps[0].fc2_linear.load_state_dict(a.mlps[0].fc2_linear.state_dict())
    return ours, theirs


def test_fingerprint_is_the_same_in_every_library() -> None:
    ours, theirs = same_weights()
    assert fingerprint_of(ours) == fingerprint_of(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    assert fingerprint_of(model.to(dtype)) == before


def test_fingerprint_leaves_out_what_rounding_made_zero() -> None:
    model = tiny.build("timm_vit")
    tower = find_tower(model)
    with torch.no_grad():
        tower.blocks[0].mlps[0].fc2_linear.weight.mul_(1e-9)  # fp16 has nothing but signed zeros for these
    before = fingerprint_of(model)
    assert compare_weights(before, find_tower(model.half())) == "similar"
    assert agreement(before, fingerprint_of(model)) == 1.0


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
def test_rounded_weights_are_similar_whichever_side_is_rounded(bits: int) -> None:
    tower = find_tower(tiny.build("timm_vit"))
    exact = fingerprint(tower)
    for block in tower.blocks:
        rounded(block.mlps[0].fc2_linear.weight.data, bits)
    assert compare_weights(exact, tower) in (("similar",) if bits <= 4 else ("same", "similar"))
    coarse = fingerprint(tower)
    assert agreement(exact, coarse) == agreement(coarse, exact) == 1.0
    assert agreement(coarse, fingerprint_of(tiny.build("timm_vit", seed=1))) == pytest.approx(0.5, abs=0.25)


def rounded(weight: torch.Tensor, bits: int) -> None:
    """Round a weight in place, to so many bits for each output channel."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    weight.copy_((weight / step).round() * step)


@pytest.mark.parametrize(("noise", "likeness"), [(0.05, "similar"), (0.15, "similar"), (1.0, "other"), (4.0, "other")])
def test_light_fine_tuning_is_similar_and_a_heavy_one_is_not(noise: float, likeness: str) -> None:
    """Of Gaussian weights, noise of a standard deviation n of theirs changes arctan(n) / pi of the signs."""
    torch.manual_seed(0)
    tower = find_tower(tiny.build("timm_vit"))
    before = fingerprint(tower)
    for block in tower.blocks:
        weight = block.mlps[0].fc2_linear.weight.data
        weight.add_(torch.randn_like(weight), alpha=noise * float(weight.std()))
    assert compare_weights(before, tower) == likeness
    assert agreement(before, fingerprint(tower)) == pytest.approx(1 - math.atan(noise) / math.pi, abs=0.08)


def test_fingerprint_holds_the_signs_at_places_that_are_the_same_in_each_block() -> None:
    """Written out from the weights: 64 of each of four blocks, at multiples of the golden ratio."""
    tower = find_tower(tiny.build("timm_vit"))
    bits = ""
    for block in tower.blocks:
        flat = block.mlps[0].fc2_linear.weight.detach().flatten()
        for i in range(64):
            value = float(flat[int((i * 2654435769 % 2**32) / 2**32 * len(flat))])
            bits += f"{int(value > 0)}{int(value < 0)}"
    packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    assert fingerprint(tower) == "2:" + base64.b64encode(packed).decode()


def test_fingerprints_of_the_first_version_are_compared_exactly() -> None:
    tower = find_tower(tiny.build("timm_vit"))
    signs = b""
    for block in tower.blocks:
        flat = block.mlps[0].fc2_linear.weight.detach().flatten()
        signs += bytes(int(flat[i * (len(flat) - 1) // 255] < 0) for i in range(256))
    old = hashlib.sha256(signs).hexdigest()[:16]
    assert compare_weights(old, tower) == "same"
    assert compare_weights("0" * 16, tower) == "other"
    tower.blocks[0].mlps[0].fc2_linear.weight.data[0, 0] *= -1
    assert compare_weights(old, tower) == "other"
    assert compare_weights(old, find_tower(tiny.build("timm_vit").to("meta"))) == "unknown"


@pytest.mark.parametrize("text", ["unknown", "3:AAAA", "2:AAA", "2:\N{SNOWMAN}", ""])
def test_what_is_no_fingerprint_tells_nothing(text: str) -> None:
    assert compare_weights(text, find_tower(tiny.build("timm_vit"))) == "unknown"


def test_fingerprints_of_towers_of_other_depths_are_others() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    model.blocks = model.blocks[:3]
    assert compare_weights(before, find_tower(model)) == "other"


def test_weights_that_are_nearly_all_zero_tell_nothing() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    for block in find_tower(model).blocks:
        block.mlps[0].fc2_linear.weight.data[2:] = 0
    assert compare_weights(before, find_tower(model)) == "unknown"


def test_torchao_weights_are_dequantised_to_be_read() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert compare_weights(before, find_tower(model)) in ("same", "similar")
    assert compare_weights(fingerprint_of(tiny.build("timm_vit", seed=1)), find_tower(model)) == "other"
    assert compare_weights("0" * 16, find_tower(model)) == "unknown"


def test_a_list_of_similar_weights_is_used_with_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("timm_vit")
    list_of_it = RegisterNeurons(((1, 3, None),), model={"name": "timm:ours", "fingerprint": fingerprint_of(model)})
    for block in find_tower(model).blocks:
        rounded(block.mlps[0].fc2_linear.weight.data, 4)
    with warnings.catch_warnings(), caplog.at_level("INFO", "testreg"):
        warnings.simplefilter("error")
        testreg.patch(model, list_of_it)
    assert [record.message for record in caplog.records] == [
        "the weights of timm:vit_base_patch16_224.augreg2_in21k_ft_in1k are those of timm:ours, quantised or "
        "fine-tuned: its register neurons are used"
    ]


def test_fingerprint_tells_weights_apart() -> None:
    towers = [find_tower(tiny.build("timm_vit", seed=seed)) for seed in range(5)]
    assert all(len(fingerprint(tower)) == 90 for tower in towers)
    likeness = [[compare_weights(fingerprint(one), other) for other in towers] for one in towers]
    assert likeness == [["same" if i == j else "other" for j in range(5)] for i in range(5)]


def test_fingerprint_sees_fine_tuning() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    with torch.no_grad():
        for block in find_tower(model).blocks:
            weight = block.mlps[0].fc2_linear.weight
            weight.add_(torch.randn_like(weight), alpha=0.05 * float(weight.std()))
    assert fingerprint_of(model) != before


def test_fingerprint_survives_patching() -> None:
    model = tiny.build("timm_vit")
    before = fingerprint_of(model)
    testreg.patch(model, tiny.NEURONS)
    assert fingerprint_of(model) == before


def test_patch_warns_of_other_weights_and_names_both_checkpoints() -> None:
    ours, theirs = same_weights()
    found = RegisterNeurons(((1, 3, None),), model={**describe_model(ours, find_tower(ours)), "name": "timm:ours"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        testreg.unpatch(testreg.patch(ours, found))
        testreg.unpatch(testreg.patch(theirs, found))
        testreg.unpatch(testreg.patch(theirs, tiny.NEURONS))  # a list without a fingerprint
    other = tiny.build("hf_dinov2", seed=2)
    other.config._name_or_path = "me/other"
    with pytest.warns(UserWarning, match=r"timm:ours.*not those of hf:me/other"):
        testreg.patch(other, found)
    assert testreg.is_patched(other)


def test_patch_warns_of_other_weights_of_an_unnamed_model() -> None:
    found = RegisterNeurons(((1, 3, None),), model={"name": "timm:ours", "fingerprint": "0" * 16})
    with pytest.warns(UserWarning, match=r"timm:ours.*this CLIP \(its checkpoint is unknown\)"):
        testreg.patch(tiny.build("open_clip"), found)


# ---- how a list shows itself ----------------------------------------------------------------------------------------


def test_a_list_in_three_lines() -> None:
    assert repr(neurons()).splitlines() == [
        "RegisterNeurons: 3 in blocks 4, 5, of 4 listed",
        "  for timm:a (12 blocks of 3,072 neurons)",
        "  not verified",
    ]
    assert repr(RegisterNeurons.from_blocks({3: [1]})).splitlines() == [
        "RegisterNeurons: 1 in block 3, of 1 listed",
        "  for a model that is not named",
        "  not verified",
    ]
    facts = {"verified_at": [{"image_size": [224, 224]}, {"image_size": [518, 448]}, {}]}
    many = neurons(ranking=tuple((i, 0, None) for i in range(30)), top_k=None, calibration=facts, verified=True)
    first, _, last = repr(many).splitlines()
    assert first == "RegisterNeurons: 30 in blocks 0, 1, 2, 3, 4, 5, 6, 7 and 22 more, of 30 listed"
    assert last == "  verified at 224 x 224, 518 x 448"


def test_a_hostile_list_is_shown_as_text() -> None:
    shown = neurons(model={"name": "<script>\x1b[31m" + "x" * 10_000 + "\n\n"})
    assert len(repr(shown).splitlines()) == 3
    assert len(repr(shown)) < 500
    assert "\x1b" not in repr(shown)
    assert "<script>" not in shown._repr_html_()
    assert "&lt;script&gt;" in shown._repr_html_()


def test_a_list_in_a_notebook() -> None:
    html = neurons()._repr_html_()
    assert "<strong>Register neurons: 3 in blocks 4, 5, of 4 listed</strong>" in html
    assert "<tr><td>5</td><td>2</td><td>599, 1869</td></tr>" in html


def test_the_length_is_what_is_in_use() -> None:
    assert (len(neurons()), len(neurons(top_k=None)), len(neurons().truncate(1))) == (3, 4, 1)


def test_a_list_as_a_dict_is_its_json(tmp_path: Path) -> None:
    neurons().save(tmp_path / "n.json")
    assert RegisterNeurons.from_json(neurons().to_dict()) == neurons()
    assert json.loads((tmp_path / "n.json").read_text()) == neurons().to_dict()


def test_a_list_draws_its_scores_and_blocks() -> None:
    open_before = plt.get_fignums()
    scores, blocks = neurons().plot().axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in blocks.patches] == [(4, 1), (5, 2)]
    listed, used = scores.lines
    assert listed.get_ydata().tolist() == [7.0, 4.5, 2.25, 1.2]
    assert used.get_ydata().tolist() == [7.0, 4.5, 2.25]
    assert len(RegisterNeurons.from_blocks({3: [1]}).plot().axes) == 1
    assert plt.get_fignums() == open_before


# ---- the bundled lists ----------------------------------------------------------------------------------------------

BUNDLED = bundled()
NAMES = sorted({name for one in BUNDLED.values() for name in one.model["names"]})
DEFAULT_NAMES = [(name, key) for key, one in BUNDLED.items() for name in one.model["default_for"]]
DINOV2_S = sorted(BUNDLED["dinov2-vits14-jroth-518"].model["names"])  # nothing shows that it needs registers


def test_there_are_bundled_lists_and_every_file_is_one() -> None:
    assert len(BUNDLED) == 18 + 1  # and that of the demo model
    assert {path.name for path in config_folder().iterdir()} == {f"{key}.json" for key in BUNDLED}


@pytest.mark.parametrize("key", sorted(BUNDLED.keys() - {"demo"}))
def test_published_list_is_complete(key: str) -> None:
    one = BUNDLED[key]
    assert key == key.lower()
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert one.verified is False
    assert one.model["name"] == one.model["names"][0]
    assert set(one.model["default_for"]) <= set(one.model["names"])
    if key != "openai-clip-vitb16-jroth-224":
        assert "fingerprint" not in one.model, "nobody has had these weights at hand"
    assert one.provenance["source"].keys() >= {"repo", "path", "commit"}
    for field in ("id", "status", "note", "neuron_definition", "license"):
        assert one.provenance[field], field
    assert one.calibration
    one.check_fits(one.model["depth"], one.model["mlp_width"])
    assert one.by_block()


def test_the_demo_model_has_its_list(recwarn: pytest.WarningsRecorder) -> None:
    """Made by testreg on these very weights; it holds the planted neurons."""
    model = testreg.patch(testreg.demo_model())
    assert BUNDLED["demo"].verified
    found = patch_of(model).neurons.by_block()
    assert all(set(units) <= set(found[block]) for block, units in planted_neurons().items())
    assert not recwarn.list


def test_bundled_lists_are_written_as_save_writes(tmp_path: Path) -> None:
    for key, one in BUNDLED.items():
        one.save(tmp_path / "n.json")
        assert (tmp_path / "n.json").read_text() == (config_folder() / f"{key}.json").read_text(), key


def test_every_checkpoint_that_needs_registers_has_one_default() -> None:
    assert len({name for name, _ in DEFAULT_NAMES}) == len(DEFAULT_NAMES)
    assert sorted([*(name for name, _ in DEFAULT_NAMES), *DINOV2_S]) == NAMES


@pytest.mark.parametrize("name", DINOV2_S)
def test_without_a_default_the_lists_of_a_checkpoint_are_named(name: str) -> None:
    model = tiny.build("timm_vit")
    model.testreg_source = name
    with pytest.raises(ValueError, match=r"no default .*nothing shows that this checkpoint needs any") as caught:
        testreg.patch(model)
    assert all(key in str(caught.value) for key in BUNDLED if key.startswith("dinov2-vits14"))
    assert "dinov2-vitb14" not in str(caught.value)
    assert not testreg.is_patched(model)


def test_a_checkpoint_without_a_name_is_found_by_its_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = testreg.demo_model()
    del model.testreg_source
    with caplog.at_level("INFO", "testreg"):
        testreg.patch(model)
    assert patch_of(model).neurons == BUNDLED["demo"].truncate()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("testreg", "INFO")
    assert "the bundled list demo: 6 register neurons of testreg calibrate demo" in record.getMessage()
    assert record.getMessage().endswith(", verified")
    testreg.unpatch(model)
    with torch.no_grad():
        find_tower(model).blocks[0].mlps[0].fc2_linear.weight.neg_()
    with pytest.raises(ValueError, match="no bundled register neurons"):
        testreg.patch(model)


def test_patch_without_a_list_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch14_dinov2", pretrained=False)
    with (
        caplog.at_level("INFO", "testreg"),
        pytest.warns(UnverifiedNeuronsWarning, match="dinov2-vitb14-jroth-224-v2 are not verified") as caught,
    ):
        testreg.patch(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    (record,) = caplog.records
    assert "dinov2-vitb14-jroth-224-v2: 185 register neurons of jroth1414/test-time" in record.getMessage()
    assert record.getMessage().endswith(", not verified")


def test_only_lists_that_something_found_are_said_to_be_unverified(tmp_path: Path, caplog) -> None:
    by_hand = RegisterNeurons.from_blocks(tiny.NEURONS)
    by_hand.save(tmp_path / "n.json")
    found = RegisterNeurons(by_hand.ranking, calibration={"images": 3})
    RegisterNeurons(by_hand.ranking, calibration={"images": 300}, verified=True).save(tmp_path / "verified.json")
    model = tiny.build("timm_vit")
    with warnings.catch_warnings(), caplog.at_level("INFO", "testreg"):
        warnings.simplefilter("error")
        for silent in (tiny.NEURONS, by_hand, tmp_path / "verified.json"):
            testreg.unpatch(testreg.patch(model, silent))
    assert not caplog.records, "the user knows which list was given"
    for given in (found, tmp_path / "n.json", RegisterNeurons.load(tmp_path / "n.json")):
        with pytest.warns(UnverifiedNeuronsWarning, match="not verified") as caught:
            testreg.unpatch(testreg.patch(model, given))
        assert len(caught) == 1


def test_provenance_is_unique() -> None:
    ids = [one.provenance["id"] for one in BUNDLED.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("key", BUNDLED)
def test_resolve_by_bundled_name(key: str) -> None:
    assert resolve(key, torch.nn.Identity()) == BUNDLED[key]


def test_unknown_bundled_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no bundled list 'dinov2-vitx'.*dinov2-vitl14-official-hub"):
        testreg.patch(tiny.build("timm_vit"), "dinov2-vitx")


def test_bundled_lists_say_which_models_they_are_for() -> None:
    text, html = repr(testreg.bundled()), testreg.bundled()._repr_html_()
    for name, each in BUNDLED.items():
        assert f"{name}  ({len(each)} neurons, " in text
        assert f"<td>{name}</td><td>{len(each)}</td>" in html
        for model in each.model["names"]:
            assert f"    {model}" in text
            assert model in html
    assert "hf:facebook/dinov2-large  (default)" in text


@pytest.mark.parametrize("name", ["demo", "dinov2-vitl14-official-hub"])
def test_load_takes_bundled_names(name: str) -> None:
    loaded = RegisterNeurons.load(name)
    assert loaded == BUNDLED[name]
    assert loaded.source == name


def test_a_file_comes_before_a_bundled_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    neurons().save("demo")
    assert RegisterNeurons.load("demo") == neurons()
    with pytest.raises(ValueError, match=r"no bundled list 'dem' .*: did you mean demo\?"):
        RegisterNeurons.load("dem")
    with pytest.raises(ValueError, match=r"no bundled list 'xyz' .*bundled: demo, dinov2"):
        RegisterNeurons.load("xyz")
    with pytest.raises(FileNotFoundError, match=r"no neuron JSON at dem\.json"):
        RegisterNeurons.load("dem.json")


def test_neurons_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="got list"):
        testreg.patch(tiny.build("timm_vit"), [1, 2])


@pytest.mark.parametrize("name", sorted(name for name, _ in DEFAULT_NAMES if name.startswith("timm:")))
@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_patch_without_a_list_takes_the_default_in_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    expected = BUNDLED[dict(DEFAULT_NAMES)[name]]
    tower = find_tower(model)
    assert (tower.depth, tower.mlp_width) == (expected.model["depth"], expected.model["mlp_width"])
    testreg.patch(model)
    assert testreg.register.patch_of(model).neurons == expected.truncate()


@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_patch_without_a_list_takes_the_default_in_transformers() -> None:
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config())
    model.config._name_or_path = "facebook/dinov2-base"
    testreg.patch(model)
    assert testreg.register.patch_of(model).neurons == BUNDLED["dinov2-vitb14-jroth-224-v2"]


@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_patch_without_a_list_takes_the_default_of_the_name_that_it_was_loaded_by() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_clip_224", pretrained=False)
    model.testreg_source = "open_clip:ViT-B-16/laion2b_s34b_b88k"
    testreg.patch(model)
    expected = BUNDLED["openclip-vitb16-laion2b-bansal-aptos"]
    assert testreg.register.patch_of(model).neurons.ranking == expected.ranking[:10]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("open_clip:")])
def test_open_clip_names_exist(name: str) -> None:
    assert tuple(name.removeprefix("open_clip:").split("/")) in open_clip.list_pretrained()


def test_unknown_checkpoint_says_how_to_calibrate() -> None:
    model = tiny.build("hf_vit")
    model.config._name_or_path = "me/mine"
    with pytest.raises(ValueError, match=r"hf:me/mine.*testreg\.calibrate.*testreg calibrate MODEL --images"):
        testreg.patch(model)
    with pytest.raises(ValueError, match=r"this CLIP: it does not say which checkpoint it is\. Calibrate it"):
        testreg.patch(tiny.build("open_clip"))


def test_the_error_names_lists_of_the_same_shape_before_it_says_calibrate() -> None:
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=12, hidden_size=384))
    model.config._name_or_path = "/data/some-vits"
    fitting = ", ".join(key for key in BUNDLED if key.startswith("dinov2-vits14"))
    with pytest.raises(ValueError, match=rf"one of these lists, name it: {fitting}\. Otherwise calibrate it"):
        testreg.patch(model)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_copy_of_a_known_checkpoint_is_found_by_its_weights(
    bits: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two defaults, the one that is the same goes before the one that is similar."""
    model = tiny.build("hf_vit")
    model.config._name_or_path = "/data/a-copy"
    same = {"default_for": ["hf:it"], "fingerprint": fingerprint_of(model)}
    for block in find_tower(model).blocks:
        if bits is not None:
            rounded(block.mlps[0].fc2_linear.weight.data, bits)
    for name, entries in {"a": {**same, "fingerprint": fingerprint_of(tiny.build("hf_vit", 1))}, "b": same}.items():
        RegisterNeurons(((1, 3, None),), model=entries, verified=True).save(tmp_path / f"{name}.json")
    monkeypatch.setattr("testreg.neurons.config_folder", lambda: tmp_path)
    assert resolve(None, model).source == "b"
    if bits is not None:
        exact = {**same, "fingerprint": fingerprint_of(model)}
        RegisterNeurons(((1, 3, None),), model=exact, verified=True).save(tmp_path / "c.json")
        assert resolve(None, model).source == "c"
