"""The sums that scores are computed from."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from planting import plant
from tiny import fresh, photograph_crops

from testreg.families import find_tower
from testreg.measure.outliers import Detection, OutlierRule
from testreg.measure.ranking import SUMS, best_neurons, statistics_of
from testreg.measure.score import Score


def test_each_score_has_its_sums() -> None:
    assert set(SUMS) == set(get_args(Score))


@pytest.mark.parametrize("score", SUMS)
def test_sums_of_parts_add_up(score: Score) -> None:
    images, model = photograph_crops()[:8], fresh("timm_clip")
    planted = plant(model, images, num_neurons=4)
    tower, detection = find_tower(model), Detection(OutlierRule(), 2)
    whole = statistics_of(tower, images, range(8), detection, score=score)
    parts = SUMS[score].zeros(tower)
    for numbers in (range(3), range(3, 8)):
        parts += statistics_of(tower, images[numbers.start : numbers.stop], numbers, detection, score=score)
    assert type(parts) is type(whole) is SUMS[score]
    for name, value in parts.tensors().items():
        torch.testing.assert_close(value, whole.tensors()[name], rtol=1e-4, atol=1e-4)
    total, halves = whole.total(), [whole.half(index) for index in (0, 1)]
    assert total.num_images == sum(half.num_images for half in halves) == 8
    scores = total.scores(tower)
    assert scores.shape == total.selectivity.shape == (tower.depth, tower.mlp_width)
    if score != "activation":  # which takes decoys for causes
        assert {neuron[:2] for neuron in best_neurons(scores, 2, 4)} == {
            (block, unit) for block, units in planted.neurons.items() for unit in units
        }
    assert bool(total.selectivity.any()) == (score == "attribution")
