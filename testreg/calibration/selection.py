"""Choose the register neurons by measuring what moving them does.

A neuron is *moved* when its activation is taken from the patches and placed on extra tokens, the registers. *Outliers*
are patches with huge norms. Former outliers may still draw much attention once their norms are normal: they are then a
*sink*. The *hottest* patch is the one that draws the most attention. What moving a set of neurons does is its *effect*,
a record of figures (`testreg.records.calibration.Effect`): above all `remaining`, the share of the outliers that is
left, `excess`, the share of their norms above normal that is left, and `unlike`, how little former outliers resemble
their neighbours (1: as little as in the plain model). A *selective* neuron is active at outliers and hardly anywhere
else.

The search first adds the neurons that remove the outliers, in rounds, and then those that remove the sink. It then
drops needless neurons, and last chooses the number of registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from testreg.measure.ranking import RELEVANT_SHARE
from testreg.neurons import Neuron
from testreg.records.calibration import Effect, Round

# A set removes the outliers as well as another if its `excess` is larger by no more than this. Within a round, the same
# goes for its `remaining`.
TOLERANCE = 0.02
# Two sets change features equally if their changes (1 - cosine) differ by less than SAME_CHANGE, or by less than
# SAME_SHARE of the larger one. The share matters for large changes, which occur where most of a feature was artefact.
SAME_CHANGE = 0.01
SAME_SHARE = 0.02
LESS_ATTENTION = 0.1  # a set draws as little attention if its `sink` and `hottest` are higher by at most this share
# A set leaves maps of attention and features as clean as another if its `sink` and `hottest` are higher by no more
# than the share SAME_ATTENTION, and its `unlike` by no more than the difference SAME_UNLIKENESS.
SAME_ATTENTION = 0.02
SAME_UNLIKENESS = 0.01
# A set keeps features as well as another if its change is larger by no more than this, or by no more than a tenth.
SAME_OUTPUTS = 0.002
# A score is similar if it is at least this share of the lowest score of the chosen selective neurons in its block.
SIMILAR_SCORE = 0.7
# The search tries to leave no more than this share of the outliers that `target` allows: a neuron that causes few
# outliers in these images may cause many in others.
AIM = 0.2
MAX_TRIED_SINGLY = 8  # at most this many neurons are tried one by one, since each costs a measurement
MAX_WITHOUT_HELP = 8  # a round that begins with few outliers ends if this many neurons do not halve the outliers
MAX_NEURONS = 512  # one round adds at most this many neurons; InternViT-6B needed 300
MAX_MEASUREMENTS = 64  # one selection measures at most this many sets of neurons
MAX_ROUNDS = 8
NUMBERS_OF_REGISTERS = (1, 2, 3, 4, 6, 8, 12, 16)  # tried in this order, while features change less with more
TRIED_WITHOUT_TIME = 4  # up to this number of registers is tried even if there is no more time

Measure = Callable[[Sequence[Neuron], int], Effect]
"""Measures the effect of moving some neurons to a number of registers."""


@dataclass(frozen=True)
class Candidates:
    """Neurons that may be added to a set."""

    ranking: Sequence[Neuron]
    """The neurons with the highest scores, best first."""
    selective: Collection[Neuron] = ()
    """The selective neurons. Their scores may be too low for the ranking, or negative. They write next to nothing at
    patches that are not outliers. If moving them changes these patches all the same, it is because these patches
    attended to the outliers."""


@dataclass(frozen=True)
class Selection:
    """The neurons that were chosen, and what was measured to choose them."""

    neurons: tuple[Neuron, ...]
    effect: Effect
    """The effect of moving the chosen neurons to the chosen number of registers."""
    rounds: tuple[Round, ...]
    dropped: tuple[Neuron, ...]
    """Neurons that were added in a round, and later dropped: the set is as good without them."""
    effects_by_num_registers: tuple[Effect, ...]
    """The effects of moving the chosen neurons to registers that start as zeros, with the `NUMBERS_OF_REGISTERS` from 1
    upwards, as far as they were measured; and then with some numbers of registers that start as the mean patch."""

    @property
    def curve(self) -> tuple[Effect, ...]:
        """The effects that were measured while neurons were added, in all rounds, sorted by the number of neurons."""
        curve = (effect for each in self.rounds for effect in each.curve)
        return tuple(sorted(curve, key=lambda effect: effect.neurons))


def select(
    rank: Callable[[Sequence[Neuron]], Candidates],
    measure: Measure,
    *,
    target: float,
    max_change: float | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Selection:
    """Choose the fewest neurons that remove the outliers, the attention sink, and the effect of both on other patches.

    1. Add neurons in rounds. A round measures the best 1, 2, 4, ... neurons of a ranking. It ends when the outliers are
       down to a fifth of `target`, and either their norms are nearly normal or twice as many neurons hardly lower these
       norms. It also ends at a limit (`max_change`, `MAX_NEURONS`). If it began with no more outliers than `target`
       allows, it ends once at least `MAX_WITHOUT_HELP` neurons together have not halved them. Last, it ends when most
       outliers are gone, but twice as many neurons do not remove the rest. The rest then has another cause, which the
       other outliers hid. To find it, the next round ranks the neurons of the model in which the neurons of earlier
       rounds are moved. Rounds go on as long as they help.
    2. Add all selective candidates. The fewest neurons that leave no outlier may leave a sink. All selective candidates
       stay if the set is as good with them, and does not draw as little attention without them (`draws_as_little`).
       Otherwise they are taken out again, and the last round is cut to the fewest neurons that are as good.
    3. Drop needless neurons: the set is as good without them, within the tolerances. Neurons that are not selective are
       tried first, and then selective ones, the last block first, since late neurons may fire because of outliers.
    4. Add neurons with similar scores. Which of several equivalent neurons is needed depends on the images. So
       selective candidates are added that score at least 70 % of the weakest chosen selective neuron of their block, if
       the set is as good with them.
    5. Add the relevant selective candidates, unless step 2 has kept all selective ones. A small set may leave some of
       the effect that outliers have on other patches. So all selective candidates are tried that score at least a tenth
       of the best neuron of their round. If the change of features differs with them (by more than both `SAME_CHANGE`
       and `SAME_SHARE`), and the set is as good, they are added, and those that change nothing are dropped again.
    6. Drop what has become needless since step 3. Neurons that are not selective are tried again. Then neurons are
       tried one by one: all of them, or only those of the last block if there are more than `MAX_TRIED_SINGLY`; none,
       if the last block has more than that too. A neuron is dropped if the set is as good without it, and it alone
       removes less than a tenth of the outliers, and also less than a tenth of their norms above normal. It is then a
       by-product, which fires at outliers without causing them.
    7. Choose the number of registers. Every register holds the activations of all neurons. A single register has less
       weight in the softmax of attention than the many outliers had. Of the numbers that are as good as one register,
       the smallest is chosen with which features change least, or nearly least.

    Args:
        rank: given the neurons that are moved already, ranks the other neurons of the model in which they are moved.
        measure: measures the effect of moving some neurons to a number of registers.
        target: how many outliers may be left after any block, as a fraction of those of the unpatched model. If no set
            reaches it, the set that comes closest is chosen.
        max_change: a set is not chosen if it changes pooled or patch features by more than this (1 - cosine).
        out_of_time: called before each further set of neurons is measured. Once it returns True, no more sets are
            measured: the search takes the best set so far, and only tries more registers for it.

    Raises:
        ValueError: even the best neuron alone changes features by more than `max_change`; there are no candidates at
            all.
    """
    search = _Search(measure, target, max_change, out_of_time)
    while not search.rounds or search.needs_more():
        candidates = rank(search.added)
        if not candidates.ranking and not search.rounds:
            raise ValueError("there are no candidates")
        if not candidates.ranking or not search.add_from(candidates):
            break
    from_ranking, effect = search.added, search.rounds[-1].effect
    kept, effect = search.with_all_selective(from_ranking, effect)
    has_all_selective = len(kept) > len(from_ranking)
    if not has_all_selective:
        kept, effect = search.with_fewest_of_last_round()
    kept, effect = search.without_needless(kept, effect, must_change_as_much=has_all_selective)
    kept, effect = search.with_similarly_scored(kept, effect)
    if not has_all_selective:
        kept, effect = search.with_relevant_selective(kept, effect)
    kept, effect = search.without_unselective(kept, effect)
    kept, effect = search.without_by_products(kept, effect)
    by_num_registers = search.effects_by_num_registers(kept, effect)
    return Selection(
        neurons=kept,
        effect=search.with_best_num_registers(by_num_registers),
        rounds=tuple(search.rounds),
        dropped=tuple(neuron for neuron in search.added if neuron not in kept),
        effects_by_num_registers=by_num_registers,
    )


def with_best_start(
    selection: Selection, from_mean: Callable[[int], Effect], *, out_of_time: Callable[[], bool] = lambda: False
) -> Selection:
    """The selection, with registers that start as the mean of their image's patches if features change less then.

    The chosen neurons are measured on as many registers with that start. It is taken if the sum of `change_pooled` and
    `change_patches` is smaller by about a tenth, and by at least `SAME_OUTPUTS`, while the larger of the two changes,
    `remaining` and attention (`draws_as_little`) are each no worse. The next `NUMBERS_OF_REGISTERS` are then tried, as
    long as each makes the sum smaller than the one before. The smallest number is chosen with which it is smallest, or
    nearly so.

    Args:
        from_mean: measures the chosen neurons on a number of registers that start as the mean patch.
        out_of_time: as in `select`; once it returns True, no more registers are tried.
    """
    from_zeros = effect = selection.effect
    effects = [from_mean(from_zeros.num_registers)]

    def is_as_good(one: Effect) -> bool:
        return (
            one.change <= from_zeros.change
            and one.remaining <= from_zeros.remaining
            and draws_as_little(one, from_zeros)
        )

    if is_as_good(effects[0]) and _change_limit(_both_changes(effects[0])) < _both_changes(from_zeros):
        for number in NUMBERS_OF_REGISTERS[NUMBERS_OF_REGISTERS.index(from_zeros.num_registers) + 1 :]:
            if out_of_time():
                break
            effects.append(from_mean(number))
            if _both_changes(effects[-1]) >= _both_changes(effects[-2]):
                break
        effect = _first_with_nearly_least(_both_changes, filter(is_as_good, effects))
    return replace(selection, effect=effect, effects_by_num_registers=(*selection.effects_by_num_registers, *effects))


def _both_changes(effect: Effect) -> float:
    return effect.change_pooled + effect.change_patches


def draws_as_little(one: Effect, other: Effect) -> bool:
    """Whether attention is as even with the set that has the effect `one` as with the set that has the effect `other`.

    Two things must hold, where a figure may be higher by the share `LESS_ATTENTION`. Former outliers draw no more
    attention than with the other set, or no more than other patches do. The hottest patch draws no more than with the
    other set.
    """
    is_sink = one.sink is not None and one.sink > (1 + LESS_ATTENTION) * max(1.0, other.sink or 0.0)
    return not is_sink and _is_at_most(one.hottest, other.hottest, share=LESS_ATTENTION)


def is_as_clean(one: Effect, other: Effect) -> bool:
    """Whether the set with the effect `one` leaves maps as clean as the set with the effect `other`.

    Three things must hold. Former outliers draw no more attention. The hottest patch draws no more attention. Former
    outliers resemble their neighbours no less. The first two figures may be higher by the share `SAME_ATTENTION`, the
    third by the difference `SAME_UNLIKENESS`.
    """
    return (
        _is_at_most(one.sink, other.sink, share=SAME_ATTENTION)
        and _is_at_most(one.hottest, other.hottest, share=SAME_ATTENTION)
        and _is_at_most(one.unlike, other.unlike, difference=SAME_UNLIKENESS)
    )


def _is_at_most(value: float | None, limit: float | None, *, share: float = 0.0, difference: float = 0.0) -> bool:
    """Whether a value exceeds a limit by at most a share of the limit and a difference; True if either is unknown."""
    return value is None or limit is None or value <= (1 + share) * limit + difference


def changes_the_same(one: Effect, other: Effect) -> bool:
    """Whether two sets of neurons change pooled features equally much, and patch features too, each within
    `SAME_CHANGE` or the share `SAME_SHARE`."""
    is_same = partial(math.isclose, rel_tol=SAME_SHARE, abs_tol=SAME_CHANGE)
    return is_same(one.change_pooled, other.change_pooled) and is_same(one.change_patches, other.change_patches)


def _change_limit(change: float) -> float:
    """The largest change of features (1 - cosine) that counts as no larger than `change`: a tenth more, or
    `SAME_OUTPUTS` more if that is larger."""
    return change + max(SAME_OUTPUTS, change / 10)


def _first_with_nearly_least(change: Callable[[Effect], float], effects: Iterable[Effect]) -> Effect:
    """The first of some effects whose change of features is the least, or counts as no larger."""
    effects = list(effects)
    limit = _change_limit(min(map(change, effects)))
    return next(effect for effect in effects if change(effect) <= limit)


def _score(neuron: Neuron) -> float:
    """The score of a neuron, which is known since the neuron was ranked."""
    score = neuron[2]
    assert score is not None
    return score


@dataclass
class _Search:
    """The state of a search: its rounds, the effects measured so far, and the rules by which a set is good enough.

    Methods that change a set take its neurons and its effect, and return those of the new set.
    """

    measure: Measure
    target: float
    """The fraction of the outliers that may be left."""
    max_change: float | None
    out_of_time: Callable[[], bool]
    rounds: list[Round] = field(default_factory=list)
    selective: list[list[Neuron]] = field(default_factory=list)
    """The selective candidates of each round, best first."""
    relevant_selective: list[Neuron] = field(default_factory=list)
    """The selective candidates that score at least a tenth of the best neuron of their round."""
    last_curve: _Curve | None = None
    """What the last round measured."""
    effects: dict[tuple[frozenset[tuple[int, int]], int], Effect] = field(default_factory=dict)
    """The effects measured so far, by the set of neurons and the number of registers."""

    @property
    def aim(self) -> float:
        """The fraction of the outliers that the search tries to leave at most; it is lower than the target."""
        return AIM * self.target

    @property
    def added(self) -> tuple[Neuron, ...]:
        """The neurons that all rounds so far have added."""
        return tuple(neuron for each in self.rounds for neuron in each.added)

    def is_over(self) -> bool:
        """Whether no more sets of neurons are measured: time is up, or the rest of `MAX_MEASUREMENTS` is kept for
        numbers of registers up to `TRIED_WITHOUT_TIME`. These are still tried then."""
        return len(self.effects) > MAX_MEASUREMENTS - TRIED_WITHOUT_TIME or self.out_of_time()

    def needs_more(self) -> bool:
        """Whether more outliers are left than the aim, and no limit forbids another round."""
        return self.rounds[-1].effect.remaining > self.aim and len(self.rounds) < MAX_ROUNDS and not self.is_over()

    def is_allowed(self, effect: Effect) -> bool:
        """Whether features change by no more than `max_change`."""
        return self.max_change is None or effect.change <= self.max_change

    def is_as_good(self, effect: Effect, best: Effect) -> bool:
        """Whether a set with this effect is as good as the set with the effect `best`.

        It leaves no more outliers (or no more than the aim), no more excess norm (within `TOLERANCE`), and attention as
        even (`draws_as_little`), and it does not change features by more than `max_change`.
        """
        removes_as_much = effect.remaining <= max(self.aim, best.remaining) and effect.excess <= best.excess + TOLERANCE
        return removes_as_much and draws_as_little(effect, best) and self.is_allowed(effect)

    def effect_of(self, neurons: Sequence[Neuron], num_registers: int = 1) -> Effect:
        """The effect of moving a set of neurons. It is measured the first time, and remembered."""
        key = frozenset(neuron[:2] for neuron in neurons), num_registers
        if key not in self.effects:
            self.effects[key] = self.measure(neurons, num_registers)
        return self.effects[key]

    def add_from(self, candidates: Candidates) -> bool:
        """Add a round with the best n candidates; n is the smallest measured number that removes the most outliers.

        If they do not help, nothing is added, and False is returned.
        """
        ranking = candidates.ranking
        curve = _Curve(self, len(self.rounds) + 1, self.added, ranking)
        curve.measure_doubling()
        best = curve.best()
        if best is None:
            return False
        if self.rounds:
            last = self.rounds[-1].effect
            most_are_gone = best.remaining <= max(last.remaining / 2, self.aim)
            if not most_are_gone and last.remaining - best.remaining <= TOLERANCE >= last.excess - best.excess:
                return False
        self.last_curve = curve
        self.rounds.append(curve.record(curve.fewest_measured(best)))
        selective = sorted(candidates.selective, key=_score, reverse=True)
        self.selective.append(selective)
        self.relevant_selective += [
            neuron for neuron in selective if _score(neuron) >= RELEVANT_SHARE * _score(ranking[0])
        ]
        return True

    def with_fewest_of_last_round(self) -> tuple[tuple[Neuron, ...], Effect]:
        """Cut the last round to the fewest neurons that are as good; returns the neurons of all rounds."""
        assert self.last_curve is not None
        best = self.rounds[-1].effect
        self.rounds[-1] = self.last_curve.record(self.last_curve.fewest_by_bisection(best))
        return self.added, self.rounds[-1].effect

    def with_all_selective(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Add all selective candidates to a set, if it is as good with them, and attention more even."""
        selective = [neuron for of_round in self.selective for neuron in of_round]
        larger, effect_of_larger = self._with_if_as_good(selective, neurons, effect)
        return (neurons, effect) if draws_as_little(effect, effect_of_larger) else (larger, effect_of_larger)

    def effects_by_num_registers(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[Effect, ...]:
        """Measure a set with more and more of the `NUMBERS_OF_REGISTERS`.

        None is tried after the first number with which features change no less than with the number before. Once the
        search is over, numbers above `TRIED_WITHOUT_TIME` are not tried. `effect` is the effect with one register.
        Returns the effects with all numbers that were tried, from 1 upwards.
        """
        effects = [effect]
        for number in NUMBERS_OF_REGISTERS[1:]:
            if len(effects) > 1 and effects[-1].change >= effects[-2].change:
                break
            if number > TRIED_WITHOUT_TIME and self.is_over():
                break
            effects.append(self.effect_of(neurons, number))
        return tuple(effects)

    def with_best_num_registers(self, effects: Sequence[Effect]) -> Effect:
        """The effect with the smallest number of registers with which features change least, or nearly least.

        `effects` are those with 1, 2, ... registers. Only numbers that are as good as one register come into question.
        """
        good = (effect for effect in effects if self.is_as_good(effect, effects[0]))
        return _first_with_nearly_least(lambda effect: effect.change, good)

    def without_needless(
        self, neurons: tuple[Neuron, ...], effect: Effect, *, must_change_as_much: bool
    ) -> tuple[tuple[Neuron, ...], Effect]:
        """Drop needless neurons of a set.

        Neurons that are not selective are dropped as far as possible. Moving a selective neuron takes nothing from
        normal patches, so all selective neurons of a block are tried at once. The last block comes first, since late
        neurons may fire because of outliers. If a block is needed, its selective neurons that score less than half of
        the best of them are tried as well, unless `must_change_as_much`.

        Args:
            must_change_as_much: whether features must change as much, and maps be as clean, without the dropped
                selective neurons. This is asked of sets to which selective neurons were added on purpose: which of
                these are needed depends on the images.
        """
        pruning = _Pruning(self, neurons, effect, must_change_as_much)
        pruning.drop_unselective()
        for block in sorted({block for block, _, _ in pruning.kept}, reverse=True):
            of_block = [neuron for neuron in pruning.kept if neuron in pruning.selective and neuron[0] == block]
            if of_block and not pruning.drop_if_needless(of_block) and not must_change_as_much:
                best_score = max(_score(neuron) for neuron in of_block)
                pruning.drop_if_needless([neuron for neuron in of_block if _score(neuron) < best_score / 2])
        return pruning.kept, pruning.effect

    def without_unselective(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Drop needless neurons of a set, of those that are not selective."""
        pruning = _Pruning(self, neurons, effect, must_change_as_much=False)
        pruning.drop_unselective()
        return pruning.kept, pruning.effect

    def with_similarly_scored(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Add the selective candidates that score similarly to the neurons of a set, if the set is as good then."""
        similarly_scored: list[Neuron] = []
        for of_round in self.selective:
            chosen = [neuron for neuron in of_round if neuron in neurons]
            for block in {block for block, _, _ in chosen}:
                weakest = min(_score(neuron) for neuron in chosen if neuron[0] == block)
                lowest_score = SIMILAR_SCORE * weakest
                similarly_scored += [each for each in of_round if each[0] == block and _score(each) >= lowest_score]
        return self._with_if_as_good(similarly_scored, neurons, effect)

    def with_relevant_selective(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Add the relevant selective candidates to a set, if it is as good, and the change of features differs with
        them.

        Needless neurons of the larger set are dropped again.
        """
        larger, effect_of_larger = self._with_if_as_good(self.relevant_selective, neurons, effect)
        if changes_the_same(effect_of_larger, effect):
            return neurons, effect
        return self.without_needless(larger, effect_of_larger, must_change_as_much=True)

    def without_by_products(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Drop the by-products of a set: neurons that the set does not need, and that alone remove hardly any of the
        outliers.

        If there are more than `MAX_TRIED_SINGLY` neurons, only those of the last block are tried, since by-products are
        in later blocks than the cause. None is tried if these are more as well, or if only one neuron would be tried.
        """
        pruning = _Pruning(self, neurons, effect, must_change_as_much=True)
        last = max(block for block, _, _ in neurons)
        of_last = [neuron for neuron in neurons if neuron[0] == last]
        tried = neurons if len(neurons) <= MAX_TRIED_SINGLY else of_last
        for neuron in tried if 1 < len(tried) <= MAX_TRIED_SINGLY else ():
            if not pruning.is_needless([neuron]) or self.is_over():
                continue
            alone = self.effect_of((neuron,))
            if min(alone.remaining, alone.excess) > 1 - RELEVANT_SHARE:
                pruning.drop_if_needless([neuron])
        return pruning.kept, pruning.effect

    def _with_if_as_good(
        self, others: Sequence[Neuron], neurons: tuple[Neuron, ...], effect: Effect
    ) -> tuple[tuple[Neuron, ...], Effect]:
        """Add the neurons `others` to a set, if the set is as good with them."""
        taken = {neuron[:2] for neuron in neurons}  # a neuron may be a candidate in several rounds
        added = {neuron[:2]: neuron for neuron in others if neuron[:2] not in taken}
        if not added or self.is_over():
            return neurons, effect
        larger = (*neurons, *added.values())
        effect_of_larger = self.effect_of(larger)
        return (larger, effect_of_larger) if self.is_as_good(effect_of_larger, effect) else (neurons, effect)


@dataclass
class _Pruning:
    """Drops neurons from a set, as long as the rest is as good as the whole set was."""

    search: _Search
    kept: tuple[Neuron, ...]
    effect: Effect
    """The effect of the neurons that are kept."""
    must_change_as_much: bool
    """Whether features must change as much, and maps be as clean, after selective neurons are dropped. This is not
    asked of other neurons: they write at all patches, so moving them changes features in any case."""

    def __post_init__(self) -> None:
        self.best = self.effect
        self.selective = {neuron for of_round in self.search.selective for neuron in of_round}

    def drop_unselective(self) -> None:
        """Drop the neurons that are not selective as far as possible: all at once, else half of them, and so on."""
        untried = [[neuron for neuron in self.kept if neuron not in self.selective]]
        while untried:
            chunk = untried.pop()
            if not self.drop_if_needless(chunk) and (half := len(chunk) // 2):
                untried += [chunk[:half], chunk[half:]]  # the second half, which is popped next, scores lower

    def drop_if_needless(self, chunk: Sequence[Neuron]) -> bool:
        """Drop some neurons if the set is as good without them; returns whether they were dropped."""
        rest = self._without(chunk)
        if rest is None:
            return False
        self.kept, self.effect = rest
        return True

    def is_needless(self, chunk: Sequence[Neuron]) -> bool:
        """Whether the set is as good without some neurons."""
        return self._without(chunk) is not None

    def _without(self, chunk: Sequence[Neuron]) -> tuple[tuple[Neuron, ...], Effect] | None:
        """The set without some neurons, and its effect.

        None if it is not as good as the set with which the pruning began, changes features more than that set, or does
        not meet `must_change_as_much`; if no neuron is left out or none is left; or if the search is over.
        """
        rest = tuple(neuron for neuron in self.kept if neuron not in chunk)
        if not chunk or not rest or self.search.is_over():
            return None
        effect = self.search.effect_of(rest)
        must_do_the_same = self.must_change_as_much and self.selective.issuperset(chunk)
        does_the_same = changes_the_same(effect, self.best) and is_as_clean(effect, self.best)
        if (
            not self.search.is_as_good(effect, self.best)
            or effect.change > _change_limit(self.best.change)
            or (must_do_the_same and not does_the_same)
        ):
            return None
        return rest, effect


@dataclass
class _Curve:
    """What a round measures: the effects of moving the best n neurons of its ranking, for several n.

    The neurons of earlier rounds are always moved as well.
    """

    search: _Search
    round_number: int
    """The number of the round, from 1."""
    of_earlier_rounds: tuple[Neuron, ...]
    ranking: Sequence[Neuron]
    effects: list[Effect] = field(default_factory=list)
    """The effects, in the order in which they were measured."""

    def measure_best(self, number: int) -> Effect:
        """Measure the best `number` neurons of the ranking."""
        self.effects.append(self.search.effect_of((*self.of_earlier_rounds, *self.ranking[:number])))
        return self.effects[-1]

    def bisect(self, low: int, high: int, is_enough: Callable[[Effect], bool]) -> None:
        """Measure numbers between `low`, which is not enough, and `high`, which is, to find the smallest that is."""
        while high - low > 1 and not self.search.is_over():
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(self.measure_best(middle)) else (middle, high)

    def measure_doubling(self) -> None:
        """Measure the best 1, 2, 4, ... neurons, until no more are needed or help, or features change too much."""
        number, last = 1, self.measure_best(1)
        if not self.search.is_allowed(last):
            if not self.of_earlier_rounds:
                raise ValueError(
                    f"the first neuron alone changes features by {last.change:.2g}: more than max_change="
                    f"{self.search.max_change:g}"
                )
            return
        at_start = self.search.rounds[-1].effect.remaining if self.search.rounds else 1.0
        while number < len(self.ranking) and not self.is_enough(last) and not self.search.is_over():
            low, number = number, min(2 * number, len(self.ranking))
            with_half, last = last, self.measure_best(number)
            if not self.search.is_allowed(last):
                self.bisect(low, number, lambda effect: not self.search.is_allowed(effect))
                return
            if with_half.remaining <= self.search.aim and with_half.excess - last.excess < TOLERANCE:
                return
            if at_start <= self.search.target and number >= MAX_WITHOUT_HELP and last.remaining > at_start / 2:
                return
            # Most outliers are gone and the rest stays: the next round looks for the cause of the rest.
            if last.remaining < at_start / 2 and self.removes_as_much(with_half, last):
                return

    def is_enough(self, effect: Effect) -> bool:
        """Whether a set with this effect leaves so few outliers, and so little excess norm, that no more neurons are
        needed."""
        return effect.remaining <= self.search.aim and effect.excess < TOLERANCE

    def removes_as_much(self, effect: Effect, best: Effect) -> bool:
        """Whether a set with this effect leaves no more outliers and no more excess norm than the best one, each within
        `TOLERANCE`."""
        return effect.remaining <= best.remaining + TOLERANCE and effect.excess <= best.excess + TOLERANCE

    def best(self) -> Effect | None:
        """The effect that comes closest to the aim, and leaves the least excess norm.

        Returns None if all sets change features by more than `max_change`.
        """
        allowed = filter(self.search.is_allowed, self.effects)
        return min(allowed, key=lambda effect: (max(effect.remaining, self.search.aim), effect.excess), default=None)

    def record(self, effect: Effect) -> Round:
        """The record of the round, if the round ends with the set that has this effect."""
        added = tuple(self.ranking[: effect.neurons - len(self.of_earlier_rounds)])
        return Round(self.round_number, added, tuple(sorted(self.effects, key=lambda effect: effect.neurons)), effect)

    def fewest_measured(self, best: Effect) -> Effect:
        """The effect of the smallest measured set that is as good as the best one.

        If the best set does not reach the aim, the set need only remove as much of the outliers, since the next round
        adds to it.
        """
        is_enough = self.search.is_as_good if best.remaining <= self.search.aim else self.removes_as_much
        enough = (effect for effect in self.effects if is_enough(effect, best) and self.search.is_allowed(effect))
        return min(enough, key=lambda effect: effect.neurons)

    def fewest_by_bisection(self, best: Effect) -> Effect:
        """The effect of the smallest set that is as good as the best one, found by bisection.

        If the best set does not reach the aim, its effect is returned.
        """
        num_earlier = len(self.of_earlier_rounds)
        if best.remaining > self.search.aim:
            return best
        high = min(effect.neurons for effect in self.effects if self.search.is_as_good(effect, best))
        low = max((effect.neurons for effect in self.effects if effect.neurons < high), default=num_earlier)
        self.bisect(low - num_earlier, high - num_earlier, lambda effect: self.search.is_as_good(effect, best))
        return min(
            (effect for effect in self.effects if self.search.is_as_good(effect, best)),
            key=lambda effect: effect.neurons,
        )
