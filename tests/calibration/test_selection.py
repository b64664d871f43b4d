import itertools

import pytest

from testreg.calibration.evaluation import Effect
from testreg.calibration.selection import MAX_MEASUREMENTS, Candidates, select


def ranking(count):
    return tuple((0, unit, 1 - unit / 1000) for unit in range(count))


def once(neurons, selective=()):
    """Candidates of the first round; later ones find none."""
    return lambda moved: Candidates(() if moved else neurons, selective)


class Model:
    """Outliers are there while more than 0.3 of the causes stay; each moved neuron changes a little."""

    def __init__(self, causes, change=0.001, costly=()):
        self.causes, self.change, self.costly = set(causes), change, set(costly)
        self.measured = []

    def __call__(self, neurons):
        units = {unit for _, unit, _ in neurons}
        self.measured.append(units)
        left = len(self.causes - units) / len(self.causes)
        change = self.change * len(units) + 0.1 * len(units & self.costly)
        return Effect(len(units), 1.0 if left > 0.3 else 0.0, 5, left, change, change / 2, 1 - change)


@pytest.mark.parametrize("causes", [[0], [0, 1, 2], [0, 2, 5], [3, 4], range(7), range(40), [90]])
def test_the_causes_are_chosen_and_nothing_else(causes):
    model = Model(causes)
    found = select(once(ranking(120)), model, target=0.05)
    assert {unit for _, unit, _ in found.neurons} == set(causes)
    assert found.effect == model(found.neurons)
    assert {unit for _, unit, _ in found.dropped} == set(range(max(causes) + 1)) - set(causes)
    assert [point.neurons for point in found.curve] == sorted(point.neurons for point in found.curve)
    assert len(model.measured) <= MAX_MEASUREMENTS + 2


def test_a_set_that_merely_hides_the_outliers_is_not_enough():
    """Three of four causes bring all outliers under the limit, but leave a quarter of their norm."""
    found = select(once(ranking(20)), Model([0, 1, 2, 3]), target=0.05)
    assert len(found.neurons) == 4


def test_an_unreachable_target_gives_the_closest_set():
    model = Model([0, 1, 2, 300])
    found = select(once(ranking(100)), model, target=0.05)
    assert found.effect.remaining == 0.0  # three of four causes do
    model.causes |= {301, 302, 303}
    found = select(once(ranking(100)), model, target=0.05)
    assert found.effect.remaining == 1.0
    assert {unit for _, unit, _ in found.neurons} == {0, 1, 2}


def test_max_change_bounds_the_set():
    model = Model(range(10), change=0.01)
    assert len(select(once(ranking(40)), model, target=0.05).neurons) == 10
    found = select(once(ranking(40)), model, target=0.05, max_change=0.05)
    assert found.effect.change <= 0.05
    assert len(found.neurons) == 5
    with pytest.raises(
        ValueError, match=r"the first neuron alone changes features by 0\.01: more than max_change=0\.001"
    ):
        select(once(ranking(40)), model, target=0.05, max_change=0.001)


def test_the_search_ends_when_it_is_out_of_time():
    calls = itertools.count()
    model = Model(range(10))
    found = select(once(ranking(40)), model, target=0.05, out_of_time=lambda: next(calls) >= 2)
    assert [point.neurons for point in found.curve] == [1, 2, 4]
    assert len(found.neurons) == 4
