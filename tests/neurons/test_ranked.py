import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny
import torch
from lists import RANKING, neurons

import testreg
from testreg import RegisterNeurons
from testreg.neurons import Calibration
from testreg.records.calibration import Effect, Verification

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


def test_the_calibration_is_a_record() -> None:
    with pytest.raises(TypeError, match=r"must be a testreg\.neurons\.Calibration, got dict: Calibration\.from_json"):
        neurons(calibration={"images": 3})


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
    effect = Effect(neurons=3, remaining=0.0, worst_block=5, excess=0.0, change_pooled=0.0, change_patches=0.0)
    facts = Calibration(
        verified_at=(
            Verification((224, 224), "float32", (14, 14), 20, 0.05, effect),
            Verification((518, 448), "float32", (37, 32), 20, 0.05, effect),
        )
    )
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


def test_a_list_draws_its_scores_and_blocks() -> None:
    open_before = plt.get_fignums()
    scores, blocks = neurons().plot().axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in blocks.patches] == [(4, 1), (5, 2)]
    listed, used = scores.lines
    assert listed.get_ydata().tolist() == [7.0, 4.5, 2.25, 1.2]
    assert used.get_ydata().tolist() == [7.0, 4.5, 2.25]
    assert len(RegisterNeurons.from_blocks({3: [1]}).plot().axes) == 1
    assert plt.get_fignums() == open_before
