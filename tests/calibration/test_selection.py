import itertools
from dataclasses import replace

import pytest

from testreg.calibration.selection import MAX_MEASUREMENTS, Candidates, Selection, select, with_best_start
from testreg.records.calibration import Effect


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

    def __call__(self, neurons, num_registers=1):
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


class Populations:
    """Each population makes outliers until one of its triggers or all of its amplifiers are moved; with a register that
    takes what its amplifiers write, other patches still change, until all of its neurons are moved."""

    def __init__(self, *populations):
        self.populations = populations
        self.measured = []

    def __call__(self, neurons, num_registers=1):
        units = {unit for _, unit, _ in neurons}
        self.measured.append(units)
        left = [not (triggers & units or amplifiers <= units) for triggers, amplifiers in self.populations]
        moved = [len((triggers | amplifiers) & units) for triggers, amplifiers in self.populations]
        change = sum(moved) / 10
        return Effect(len(units), sum(left) / len(left), 5, sum(left) / len(left), change, change, None)


def test_each_round_ranks_what_the_one_before_has_left():
    model = Populations(({0}, {10, 11}), ({3}, {12, 13}))
    asked = []

    def rank(moved):
        asked.append([unit for _, unit, _ in moved])
        return Candidates(ranking(3) if not moved else ((0, 3, 0.5), (0, 20, 0.1)))

    found = select(rank, model, target=0.05)
    assert [unit for _, unit, _ in found.neurons] == [0, 3]
    assert asked == [[], [0]]
    assert [[unit for _, unit, _ in each.added] for each in found.rounds] == [[0], [3]]
    assert [each.effect.remaining for each in found.rounds] == [0.5, 0.0]
    assert [effect.neurons for effect in found.rounds[1].curve] == [2]  # with the one moved before; nothing is left


def test_rounds_end_when_one_does_not_help():
    model = Populations(({0}, {10, 11}), ({3}, {12, 13}))
    asked = []

    def rank(moved):
        asked.append(len(moved))
        return Candidates(ranking(3) if not moved else tuple((1, 30 + unit, 0.5) for unit in range(3)))

    found = select(rank, model, target=0.05)
    assert [unit for _, unit, _ in found.neurons] == [0]
    assert len(found.rounds) == 1
    assert asked == [0, 1]


def test_neurons_that_help_only_together_are_found_behind_a_plateau():
    model = Populations((set(), set(range(20, 30))))
    found = select(once(ranking(64)), model, target=0.05)
    assert {unit for _, unit, _ in found.neurons} == set(range(20, 30))
    assert len(model.measured) <= MAX_MEASUREMENTS


def test_selective_neurons_are_added_as_long_as_they_change_more():
    """The trigger alone takes all outliers away. What the amplifiers do in the register goes with them."""
    model = Populations(({0}, {2, 3}))
    candidates = ((0, 0, 1.0), (5, 1, 0.4), (3, 2, 0.4), (3, 3, 0.4), (3, 4, 0.4))
    alone = select(once(candidates), model, target=0.05)
    assert [unit for _, unit, _ in alone.neurons] == [0]
    whole = select(once(candidates, set(candidates[:4])), model, target=0.05)
    assert {unit for _, unit, _ in whole.neurons} == {0, 2, 3}  # block 5 changes nothing, and is dropped again
    assert whole.effect == model(whole.neurons)


def test_no_set_is_measured_twice():
    model, measured = Populations(({0}, {2, 3}), ({4, 5}, {6})), []

    def measure(neurons, num_registers):
        measured.append((frozenset(neurons), num_registers))
        return model(neurons)

    select(once(ranking(20), set(ranking(20)[2:])), measure, target=0.05)
    assert len(set(measured)) == len(measured)


def test_where_few_outliers_are_left_the_patched_model_is_ranked_anew():
    """One population of three is left, whose neurons come late in the first ranking, and first once it is alone."""
    model = Populations(({0}, {10}), ({1}, {11}), ({90}, {91}))
    asked = []

    def rank(moved):
        asked.append(len(moved))
        return Candidates(((0, 90, 0.5), (0, 20, 0.1)) if moved else ranking(100))

    found = select(rank, model, target=0.05)
    assert {unit for _, unit, _ in found.neurons} == {0, 1, 90}
    assert asked == [0, 2]
    assert len(model.measured) < 12


def test_selective_neurons_are_dropped_by_blocks_and_others_one_by_one():
    model = Model([0, 1, 2, 7])
    unselective = [(1, unit, 1 - unit / 100) for unit in range(4)]  # of which 3 is needless
    selective = [(block, unit, 0.9 - unit / 100) for block, unit in ((2, 4), (2, 5), (3, 6), (3, 7))]
    found = select(once((*unselective, *selective), set(selective)), model, target=0.05)
    assert [unit for _, unit, _ in found.rounds[0].added] == list(range(8))
    assert {2, 4, 5} not in model.measured  # a block goes as a whole
    assert {unit for _, unit, _ in found.neurons} == {0, 1, 2, 7}  # block 3 is needed, but 6 does nothing there


def test_selective_neurons_of_no_weight_are_not_added():
    model = Populations(({0}, {2, 3}))
    candidates = ((0, 0, 1.0), (0, 1, 0.3), (0, 2, 0.05), (0, 3, 0.05))
    found = select(once(candidates, set(candidates)), model, target=0.05)
    assert [unit for _, unit, _ in found.neurons] == [0]


def test_of_two_neurons_of_which_one_is_needless_the_unselective_one_is_dropped():
    unselective, selective, needed = candidates = ((0, 0, 0.9), (3, 1, 0.8), (3, 2, 0.7))
    model = Populations(({0, 1}, {10}), ({2}, {11}))
    assert select(once(candidates), model, target=0.05).neurons == (unselective, needed)
    assert select(once(candidates, {selective, needed}), model, target=0.05).neurons == (selective, needed)


def test_selective_neurons_that_score_similarly_are_taken_with_those_that_were_chosen():
    """On these images one trigger does. Which one is needed depends on the images."""
    model = Populations(({0, 1, 2}, {10, 11}))
    candidates = ((0, 0, 1.0), (0, 1, 0.9), (0, 2, 0.75), (0, 3, 0.65))
    found = select(once(candidates, {candidates[0], candidates[2], candidates[3]}), model, target=0.05)
    assert [unit for _, unit, _ in found.neurons] == [0, 2]
    harmful = Model([0, 1])
    harmful.costly = {2}
    assert len(select(once(candidates, set(candidates)), harmful, target=0.05, max_change=0.05).neurons) == 2


@pytest.mark.parametrize(
    ("change_pooled", "others", "taken"),
    [
        (0.005, {}, True),
        (0.009, {}, False),  # less by no tenth
        (0.005, {"change_patches": 0.021}, False),
        (0.005, {"remaining": 0.02}, False),
        (0.005, {"sink": 2.0}, False),
    ],
)
def test_registers_start_as_the_mean_patch_if_outputs_change_less(change_pooled, others, taken):
    of_zeros = Effect(3, 0.01, 5, 0.0, 0.01, 0.02, num_registers=2, sink=0.5)
    selection = Selection(((0, 1, 0.5),), of_zeros, (), (), (of_zeros,))
    of_mean = replace(of_zeros, start="mean", change_pooled=change_pooled, **others)
    found = with_best_start(selection, lambda number: replace(of_mean, num_registers=number))
    assert found.effect == (of_mean if taken else of_zeros)
    more = [replace(of_mean, num_registers=3)]  # which changes as much, so that no more are tried
    assert found.effects_by_num_registers == (of_zeros, of_mean, *(more if taken else ()))


@pytest.mark.parametrize(
    ("changes", "others", "best", "tried"),
    [
        ({2: 0.010, 3: 0.006, 4: 0.003, 6: 0.004}, {}, 4, 6),
        ({2: 0.010, 3: 0.006, 4: 0.005, 6: 0.005}, {}, 3, 6),  # nearly the least
        ({2: 0.010, 3: 0.012, 4: 0.003}, {}, 2, 3),  # no further, once features change more
        ({2: 0.016, 3: 0.012, 4: 0.009, 6: 0.006, 8: 0.003, 12: 0.0, 16: 0.1}, {}, 12, 16),
        ({2: 0.010, 3: 0.006, 4: 0.003, 6: 0.1}, {4: {"sink": 2.0}}, 3, 6),
        ({2: 0.010, 3: 0.006, 4: 0.003, 6: 0.1}, {4: {"remaining": 0.02}}, 3, 6),
    ],
)
def test_more_registers_are_tried_that_start_as_the_mean_patch(changes, others, best, tried):
    of_zeros = Effect(3, 0.01, 5, 0.0, 0.02, 0.02, num_registers=2, sink=0.5)
    of_mean = {
        number: replace(of_zeros, start="mean", num_registers=number, change_pooled=change, **others.get(number, {}))
        for number, change in changes.items()
    }
    found = with_best_start(Selection(((0, 1, 0.5),), of_zeros, (), (), (of_zeros,)), of_mean.__getitem__)
    assert found.effect == of_mean[best]
    measured = [effect for number, effect in of_mean.items() if number <= tried]
    assert found.effects_by_num_registers == (of_zeros, *measured)


def test_out_of_time_no_more_registers_are_tried():
    of_zeros = Effect(3, 0.01, 5, 0.0, 0.02, 0.02, num_registers=2, sink=0.5)
    of_mean = replace(of_zeros, start="mean", change_pooled=0.0)
    selection = Selection(((0, 1, 0.5),), of_zeros, (), (), (of_zeros,))
    found = with_best_start(selection, lambda number: of_mean, out_of_time=lambda: True)
    assert found.effects_by_num_registers == (of_zeros, of_mean)
    assert found.effect == of_mean


def test_of_a_few_neurons_each_must_do_something_alone_or_beside_the_others():
    selective = [(2, unit, 0.9 - unit / 100) for unit in range(4)]
    measured = []

    def measure(neurons, num_registers):
        """0 and 1 take the outliers away together, 2 alone takes a few and adds nothing to these, 3 next to nothing."""
        units = {unit for _, unit, _ in neurons}
        measured.append(units)
        left = 0.0 if {0, 1} <= units else 0.7 if 2 in units else 0.95 if 3 in units else 1.0
        return Effect(len(units), left, 5, left, 0.01, 0.01, None)

    found = select(once(selective[::-1], set(selective)), measure, target=0.05)
    assert {unit for _, unit, _ in found.rounds[0].added} == {0, 1, 2, 3}
    assert {unit for _, unit, _ in found.neurons} == {0, 1, 2}
    assert {3} in measured


def test_of_many_neurons_those_of_the_last_block_must_do_something():
    causes = [(1, unit, 0.9 - unit / 100) for unit in range(8)] + [(2, 0, 0.8)]
    echo = (2, 1, 0.85)
    candidates = sorted([*causes, echo], key=lambda neuron: -neuron[2])

    def measure(neurons, num_registers):
        left = 1 - len({neuron[:2] for neuron in neurons} - {echo[:2]}) / len(causes)
        return Effect(len(neurons), left, 5, left, 0.01, 0.01, None)

    found = select(once(candidates, set(candidates)), measure, target=0.05)
    assert echo in found.rounds[0].added
    assert set(found.neurons) == set(causes)


def test_an_unselective_neuron_is_dropped_once_others_do_without_it():
    """It takes most outliers away because it changes everything; a later round finds those that make them."""
    unselective, others = (0, 0, 0.9), [(2, unit, 0.8 - unit / 100) for unit in range(5)]

    def rank(moved):
        return Candidates([neuron for neuron in (unselective, *others) if neuron not in moved], set(others))

    def measure(neurons, num_registers):
        units = {unit for block, unit, _ in neurons if block == 2}
        left = (5 - len(units)) / 5 * (0.05 if unselective in neurons else 1.0)
        change = 0.9 if unselective in neurons else 0.05
        return Effect(len(neurons), left, 5, left, change, change, None)

    found = select(rank, measure, target=0.05)
    assert found.rounds[0].added == (unselective,)
    assert set(found.neurons) == set(others)


@pytest.mark.parametrize(("by_the_second", "chosen"), [(0.008, {0}), (0.012, {0}), (0.03, {0, 1})])
def test_what_a_neuron_changes_is_compared_with_what_all_of_them_change(by_the_second, chosen):
    """The first takes all outliers away, and changes most of a feature: 0.9."""
    both = [(2, 0, 0.9), (2, 1, 0.5)]

    def measure(neurons, num_registers):
        units = {unit for _, unit, _ in neurons}
        left = 0.0 if 0 in units else 1.0
        change = (0.9 if 0 in units else 0.0) + (by_the_second if 1 in units else 0.0)
        return Effect(len(units), left, 5, left, change, change, None)

    found = select(once(both, set(both)), measure, target=0.05)
    assert {unit for _, unit, _ in found.neurons} == chosen


def test_there_must_be_candidates():
    with pytest.raises(ValueError, match="no candidates"):
        select(once(()), Populations(({0}, {1})), target=0.05)


class Sink:
    """Outliers go with the first neuron. What draws attention and stays unlike its neighbours goes with the others,
    most of it with the last."""

    def __init__(self, others, least_change_at=1):
        self.others, self.least_change_at = others, least_change_at
        self.measured = []

    def __call__(self, neurons, num_registers):
        units = {unit for _, unit, _ in neurons}
        self.measured.append((units, num_registers))
        left = 0.0 if 0 in units else 1.0
        missing = sum(2.0**unit for unit in self.others - units) / sum(2.0**unit for unit in self.others)
        change = 0.02 + 0.03 * missing + 0.01 * abs(num_registers - self.least_change_at)
        return Effect(
            len(units), left, 5, left, change, change / 2, None, num_registers, 0.5 + 20 * missing, 0.1, 0.0, missing
        )


def test_a_set_without_outliers_that_leaves_a_sink_is_completed():
    """The others score too little for the ranking, which the first heads; and block 7 has nothing to do with it."""
    first, others, needless = (5, 0, 1.0), [(6, unit, 0.1 / unit) for unit in range(1, 5)], (7, 9, 0.05)
    candidates = once((first,), [first, *others, needless])
    found = select(candidates, Sink({1, 2, 3, 4}), target=0.05)
    assert set(found.neurons) == {first, *others}
    assert found.effect.sink == 0.5
    assert found.dropped == ()
    alone = select(once((first,)), Sink({1, 2, 3, 4}), target=0.05)
    assert alone.neurons == (first,)


def test_a_sink_that_no_neuron_makes_adds_none():
    first, needless = (5, 0, 1.0), [(6, unit, 0.1) for unit in range(5, 9)]
    found = select(once((first,), [first, *needless]), Sink({1, 2}), target=0.05)
    assert found.neurons == (first,)
    assert found.effect.sink > 10


@pytest.mark.parametrize(("best", "tried"), [(1, 2), (2, 3), (3, 4), (4, 6), (8, 12), (16, 16)])
def test_the_number_of_registers_is_the_one_that_changes_least(best, tried):
    model = Sink({1}, least_change_at=best)
    found = select(once([(5, 0, 1.0), (5, 1, 0.9)], [(5, 0, 1.0), (5, 1, 0.9)]), model, target=0.05)
    assert found.effect.num_registers == best
    numbers = [effect.num_registers for effect in found.effects_by_num_registers]
    assert numbers == [number for number in (1, 2, 3, 4, 6, 8, 12, 16) if number <= tried]
    assert found.effect == model(found.neurons, found.effect.num_registers)


def test_of_numbers_of_registers_that_change_the_same_the_smallest_is_taken():
    def measure(neurons, num_registers):
        change = 0.01 - 0.0003 * num_registers
        return Effect(len(neurons), 0.0, 5, 0.0, change, change, None, num_registers)

    assert select(once(ranking(3)), measure, target=0.05).effect.num_registers == 12


def test_more_registers_must_not_bring_outliers_or_a_sink_back():
    def measure(neurons, num_registers):
        change = 0.1 / num_registers
        left, sink = (0.0, 0.5) if num_registers < 3 else (0.0, 2.0) if num_registers == 3 else (0.5, 0.5)
        return Effect(len(neurons), left, 5, left, change, change, None, num_registers, sink, 0.1, 0.0, 0.1)

    found = select(once(ranking(3)), measure, target=0.05)
    assert found.effect.num_registers == 2
    assert len(found.effects_by_num_registers) == 8
