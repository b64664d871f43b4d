"""Choose the register neurons by measuring the patched model.

The search first adds the neurons that remove the outliers, in rounds, and then the neurons that keep the attention sink
alive. It then drops needless neurons, and chooses the number of registers last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from testreg.measure.ranking import MATTERS
from testreg.neurons import Neuron
from testreg.records.calibration import Effect, Round

TOLERANCE = 0.02  # two sets remove the outliers equally well if the excess norms left differ by less than this
# Two sets change features equally if their changes differ by less than SAME_CHANGE, or by less than SAME_SHARE of the
# larger one. The share matters for large changes, which occur where most of a feature was the artefact.
SAME_CHANGE = 0.01
SAME_SHARE = 0.02
CLEANER = 0.1  # more neurons are worth it if they lower the attention to sink or hottest patch by more than this share
# Maps stay as clean if `sink` and `hottest` rise by this share at most, and `unlike` by no more than the second number.
AS_CLEAN = 0.02, 0.01
SAME_OUTPUTS = 0.002  # two sets keep outputs equally well if their changes differ by less than this, or by a tenth
SIMILAR_SCORE = 0.7  # a neuron scores similarly if it has this share of the weakest chosen neuron's score
# The search aims at this share of the target: a cause that is rare among these images may be frequent in others.
AIM = 0.2
MAX_TRIED_SINGLY = 8  # neurons are tried one by one if they are no more than this
MAX_WITHOUT_HELP = 8  # a round that begins with few outliers ends if so many neurons have not halved them
MAX_NEURONS = 512  # one round adds at most this many neurons; InternViT-6B needed 300
MAX_MEASUREMENTS = 64  # one selection measures at most this many sets of neurons
MAX_ROUNDS = 8
REGISTERS_TRIED = 4  # no more registers than this are tried

Measure = Callable[[Sequence[Neuron], int], Effect]
"""Measures the effect of moving neurons to a number of registers."""


@dataclass(frozen=True)
class Candidates:
    """Neurons that may be added to a set, best first."""

    ranking: Sequence[Neuron]
    selective: Collection[Neuron] = ()
    """Neurons that are active at outliers and hardly anywhere else. Their scores may be too low for the ranking, or
    negative. They write next to nothing at other patches. If moving them changes other patches all the same, it is
    because these attended to the outliers, which are now gone."""


@dataclass(frozen=True)
class Selection:
    """The neurons that were chosen, and why."""

    neurons: tuple[Neuron, ...]
    effect: Effect
    rounds: tuple[Round, ...]
    dropped: tuple[Neuron, ...]
    """Neurons that were added in a round, and then found to have no effect on outliers."""
    registers: tuple[Effect, ...]
    """The effects of moving the chosen neurons to 1, 2, ... registers, up to the last number that was measured."""

    @property
    def curve(self) -> tuple[Effect, ...]:
        """The effects that were measured while neurons were added, in all rounds, by their number."""
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
       down to a fifth of `target`, and twice as many neurons remove less than `TOLERANCE` more of their excess norm. It
       also ends when most outliers are gone, but twice as many neurons do not remove the rest. Then the rest has a
       cause that the other outliers masked, and the next round ranks the neurons of the patched model. Rounds go on as
       long as they help.
    2. Complete the set. The fewest neurons that leave no outlier may leave patches that draw attention. So all
       selective candidates are added. If patches draw less attention then (`draws_as_little`), the candidates stay.
       Otherwise the set is cut to the smallest number of neurons of the last ranking that is as good.
    3. Drop needless neurons: those without which the set is as good, within the tolerances. Neurons that are not
       selective are tried first, and then the others from the last block on: late neurons may fire because of outliers.
    4. Add similarly scored neurons. Which of several equivalent neurons is needed depends on the images. So selective
       candidates are added that score at least 70 % of the weakest chosen one of their block, if the set is as good
       with them.
    5. Complete the set by change, unless step 2 completed it. A small set may leave some of the effect that outliers
       have on other patches. So all selective candidates are moved as well that score at least a tenth of the best. If
       features change more then (by over `SAME_CHANGE` and over 2 % of the change), these candidates are added, and
       those that change nothing are dropped again.
    6. Drop what has become needless. Unselective neurons are tried again, since others were added. Then single neurons
       are tried: all of them, or those of the last block if there are more than `MAX_TRIED_SINGLY`. A neuron is
       dropped as a by-product, one that fires at outliers without causing them, if the set is as good without it and it
       alone removes less than a tenth of the outliers.
    7. Choose the number of registers. Each register is a copy that holds all neurons. A single one has less weight in
       the softmax of attention than the many outliers had. The chosen number is the smallest with which outputs change
       least, or nearly so.

    Args:
        rank: given the neurons that are moved already, ranks the others on the model that is patched with these.
        measure: measures the effect of moving neurons to a number of registers.
        target: outliers that may be left after any block, as a fraction of those before. If no set reaches it, the one
            that comes closest is chosen.
        max_change: sets that change pooled or patch features more (1 - cosine) are not chosen.
        out_of_time: called before each measurement but the first. Once it returns True, the search takes the best set
            so far, and only measures it with more registers.

    Raises:
        ValueError: even the first neuron changes more than `max_change`; there are no candidates at all.
    """
    search = _Search(measure, target, max_change, out_of_time)
    while not search.rounds or search.needs_more():
        candidates = rank(search.chosen)
        if not candidates.ranking and not search.rounds:
            raise ValueError("there are no candidates")
        if not candidates.ranking or not search.add_from(candidates):
            break
    from_ranking, effect = search.chosen, search.rounds[-1].effect
    kept, effect = search.with_all_selective(from_ranking, effect)
    is_complete = len(kept) > len(from_ranking)
    if not is_complete:
        kept, effect = search.with_fewest_of_last_round()
    kept, effect = search.without_needless(kept, effect, same_change=is_complete)
    kept, effect = search.with_similarly_scored(kept, effect)
    if not is_complete:
        kept, effect = search.completed_by_change(kept, effect)
    kept, effect = search.without_unselective(kept, effect)
    kept, effect = search.without_by_products(kept, effect)
    registers = search.with_registers(kept, effect)
    return Selection(
        neurons=kept,
        effect=registers[search.best_num_registers(registers) - 1],
        rounds=tuple(search.rounds),
        dropped=tuple(neuron for neuron in search.chosen if neuron not in kept),
        registers=registers,
    )


def with_best_start(selection: Selection, from_mean: Effect) -> Selection:
    """The selection, with registers that start as the mean of their image's patches if outputs change less then.

    `from_mean` is the effect of the same neurons on as many registers with that start. It is taken if the two changes
    together are smaller by a tenth, and by more than `SAME_OUTPUTS`, no more
    outliers are left, no more attention is drawn, and the larger of the changes is no larger.
    """
    from_zeros = selection.effect
    is_better = _change_limit(_both_changes(from_mean)) < _both_changes(from_zeros)
    is_as_good = from_mean.change <= from_zeros.change and from_mean.remaining <= from_zeros.remaining
    effect = from_mean if is_better and is_as_good and draws_as_little(from_mean, from_zeros) else from_zeros
    return replace(selection, effect=effect, registers=(*selection.registers, from_mean))


def _both_changes(effect: Effect) -> float:
    return effect.change_pooled + effect.change_patches


def draws_as_little(one: Effect, other: Effect) -> bool:
    """Whether attention is as even with one set as with another, within the tolerance `CLEANER`.

    Former outliers must draw no more attention than with the other set, or no more than other patches do, and the
    hottest patch must draw no more than with the other set.
    """
    is_sink = one.sink is not None and one.sink > (1 + CLEANER) * max(1.0, other.sink or 0.0)
    return not is_sink and _is_at_most(one.hottest, other.hottest, share=CLEANER)


def is_as_clean(one: Effect, other: Effect) -> bool:
    """Whether one set leaves maps as clean as another, within the tolerances `AS_CLEAN`.

    Former outliers must draw no more attention and be no less like their neighbours, and the hottest patch must be no
    hotter.
    """
    share, more = AS_CLEAN
    return (
        _is_at_most(one.sink, other.sink, share=share)
        and _is_at_most(one.hottest, other.hottest, share=share)
        and _is_at_most(one.unlike, other.unlike, more=more)
    )


def _is_at_most(one: float | None, other: float | None, *, share: float = 0.0, more: float = 0.0) -> bool:
    return one is None or other is None or one <= (1 + share) * other + more


def changes_the_same(one: Effect, other: Effect) -> bool:
    """Whether two sets of neurons change features by the same amount, within the tolerance."""
    is_same = partial(math.isclose, rel_tol=SAME_SHARE, abs_tol=SAME_CHANGE)
    return is_same(one.change_pooled, other.change_pooled) and is_same(one.change_patches, other.change_patches)


def _change_limit(change: float) -> float:
    """The largest change of features that counts as no larger than this one."""
    return change + max(SAME_OUTPUTS, change / 10)


def _score(neuron: Neuron) -> float:
    """The score of a neuron that was ranked."""
    score = neuron[2]
    assert score is not None
    return score


@dataclass
class _Search:
    """The state of a selection: the rounds, the effects measured so far, and what makes a set good enough."""

    measure: Measure
    target: float
    """The fraction of the outliers that the caller allows to be left."""
    max_change: float | None
    out_of_time: Callable[[], bool]
    rounds: list[Round] = field(default_factory=list)
    selective: list[list[Neuron]] = field(default_factory=list)
    """The selective candidates of each round, best first."""
    relevant_selective: list[Neuron] = field(default_factory=list)
    """The selective candidates that score at least a tenth of the best of their round."""
    last_curve: _Curve | None = None
    """The measurements of the last round."""
    effects: dict[tuple[frozenset[tuple[int, int]], int], Effect] = field(default_factory=dict)
    """The effects measured so far, by set of neurons and number of registers."""

    @property
    def aim(self) -> float:
        """The fraction of the outliers that the search tries to reach, below the target."""
        return AIM * self.target

    @property
    def chosen(self) -> tuple[Neuron, ...]:
        return tuple(neuron for each in self.rounds for neuron in each.added)

    def is_over(self) -> bool:
        """Whether the search measures no more sets of neurons. It still measures numbers of registers then."""
        return len(self.effects) > MAX_MEASUREMENTS - REGISTERS_TRIED or self.out_of_time()

    def needs_more(self) -> bool:
        """Whether outliers are left that another round may remove."""
        return self.rounds[-1].effect.remaining > self.aim and len(self.rounds) < MAX_ROUNDS and not self.is_over()

    def is_allowed(self, effect: Effect) -> bool:
        """Whether features change by no more than `max_change`."""
        return self.max_change is None or effect.change <= self.max_change

    def is_as_good(self, effect: Effect, best: Effect) -> bool:
        """Whether a set removes as much as the best one, draws as little attention, and is allowed."""
        removes_as_much = effect.remaining <= max(self.aim, best.remaining) and effect.excess <= best.excess + TOLERANCE
        return removes_as_much and draws_as_little(effect, best) and self.is_allowed(effect)

    def effect_of(self, neurons: Sequence[Neuron], num_registers: int = 1) -> Effect:
        """The effect of a set of neurons, which is measured only the first time."""
        key = frozenset(neuron[:2] for neuron in neurons), num_registers
        if key not in self.effects:
            self.effects[key] = self.measure(neurons, num_registers)
        return self.effects[key]

    def add_from(self, candidates: Candidates) -> bool:
        """Add a round with the best n neurons, where n is the smallest measured number that removes the most outliers.

        Returns False, and adds nothing, if that does not help.
        """
        moved, ranking = self.chosen, candidates.ranking
        curve = _Curve(self, len(self.rounds) + 1, moved, ranking)
        curve.grow()
        best = curve.best()
        if best is None:
            return False
        if self.rounds:
            before = self.rounds[-1].effect
            most_are_gone = best.remaining <= max(before.remaining / 2, self.aim)
            if not most_are_gone and before.remaining - best.remaining <= TOLERANCE >= before.excess - best.excess:
                return False
        self.last_curve = curve
        self.rounds.append(curve.round(curve.fewest_measured(best)))
        selective = sorted(candidates.selective, key=_score, reverse=True)
        self.selective.append(selective)
        self.relevant_selective += [neuron for neuron in selective if _score(neuron) >= MATTERS * _score(ranking[0])]
        return True

    def with_fewest_of_last_round(self) -> tuple[tuple[Neuron, ...], Effect]:
        """Cut the last round to the neurons that are needed; returns the neurons of all rounds, and their effect."""
        assert self.last_curve is not None
        best = self.rounds[-1].effect
        self.rounds[-1] = self.last_curve.round(self.last_curve.fewest_by_bisection(best))
        return self.chosen, self.rounds[-1].effect

    def with_all_selective(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Add all selective candidates to the neurons, if patches draw less attention then.

        `effect` is that of the neurons alone. Returns the set that is taken, and its effect.
        """
        selective = [neuron for of_round in self.selective for neuron in of_round]
        together, effect_together = self._with_if_as_good(selective, neurons, effect)
        return (neurons, effect) if draws_as_little(effect, effect_together) else (together, effect_together)

    def with_registers(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[Effect, ...]:
        """Measure the neurons with 2, 3, ... registers, until one more register changes outputs more again.

        `effect` is that with one register. Returns the effects with 1, 2, ... registers.
        """
        effects = [effect]
        while len(effects) < REGISTERS_TRIED:
            if len(effects) > 1 and effects[-1].change > effects[-2].change:
                break
            effects.append(self.effect_of(neurons, len(effects) + 1))
        return tuple(effects)

    def best_num_registers(self, registers: Sequence[Effect]) -> int:
        """The smallest number of registers with which outputs change least, or nearly so."""
        good = {
            number: each.change for number, each in enumerate(registers, start=1) if self.is_as_good(each, registers[0])
        }
        return next(number for number, change in good.items() if change <= _change_limit(min(good.values())))

    def without_needless(
        self, neurons: tuple[Neuron, ...], effect: Effect, *, same_change: bool
    ) -> tuple[tuple[Neuron, ...], Effect]:
        """Drop needless neurons of a set with this effect; returns the rest and its effect.

        Unselective neurons are dropped as far as possible. Moving a selective neuron takes nothing from other patches,
        so all selective neurons of a block are tried at once. The last block comes first, since late neurons may fire
        because of outliers. If a block is needed, those of its neurons that score less than half of its best are tried
        as well. In a complete set they stay, since which of them are needed depends on the images.

        Args:
            same_change: whether the set is complete, so that features must change as much without the dropped neurons.
        """
        pruning = _Pruning(self, neurons, effect, same_change)
        pruning.drop_unselective()
        for block in sorted({block for block, _, _ in pruning.kept}, reverse=True):
            of_block = [neuron for neuron in pruning.kept if neuron in pruning.selective and neuron[0] == block]
            if of_block and not pruning.drop(of_block) and not same_change:
                most = max(_score(neuron) for neuron in of_block)
                pruning.drop([neuron for neuron in of_block if _score(neuron) < most / 2])
        return pruning.kept, pruning.effect

    def without_unselective(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Drop needless unselective neurons of a set with this effect; returns the rest and its effect."""
        pruning = _Pruning(self, neurons, effect, same_change=False)
        pruning.drop_unselective()
        return pruning.kept, pruning.effect

    def with_similarly_scored(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Add selective neurons that score similarly to neurons with this effect; returns the set and its effect."""
        similarly_scored: list[Neuron] = []
        for of_round in self.selective:
            chosen = [neuron for neuron in of_round if neuron in neurons]
            for block in {block for block, _, _ in chosen}:
                weakest = min(_score(neuron) for neuron in chosen if neuron[0] == block)
                least = SIMILAR_SCORE * weakest
                similarly_scored += [each for each in of_round if each[0] == block and _score(each) >= least]
        return self._with_if_as_good(similarly_scored, neurons, effect)

    def completed_by_change(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Add relevant selective neurons to a set with this effect, if features change more with them.

        Returns the set, without needless neurons, and its effect.
        """
        together, effect_together = self._with_if_as_good(self.relevant_selective, neurons, effect)
        if changes_the_same(effect_together, effect):
            return neurons, effect
        return self.without_needless(together, effect_together, same_change=True)

    def without_by_products(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Drop by-products from a set with this effect: neurons that it does not need, and that alone remove little.

        If there are more than `MAX_TRIED_SINGLY` neurons, only those of the last block are tried, since by-products
        are in later blocks than the cause. Returns the rest and its effect.
        """
        pruning = _Pruning(self, neurons, effect, same_change=True)
        last = max(block for block, _, _ in neurons)
        of_last = [neuron for neuron in neurons if neuron[0] == last]
        tried = neurons if len(neurons) <= MAX_TRIED_SINGLY else of_last
        for neuron in tried if 1 < len(tried) <= MAX_TRIED_SINGLY else ():
            if not pruning.is_needless([neuron]) or self.is_over():
                continue
            alone = self.effect_of((neuron,))
            if min(alone.remaining, alone.excess) > 1 - MATTERS:
                pruning.drop([neuron])
        return pruning.kept, pruning.effect

    def _with_if_as_good(
        self, others: Sequence[Neuron], neurons: tuple[Neuron, ...], effect: Effect
    ) -> tuple[tuple[Neuron, ...], Effect]:
        """Add others to neurons with this effect, if the set is as good with them; returns the set and its effect."""
        taken = {neuron[:2] for neuron in neurons}  # a neuron may be a candidate in several rounds
        added = {neuron[:2]: neuron for neuron in others if neuron[:2] not in taken}
        if not added or self.is_over():
            return neurons, effect
        together = (*neurons, *added.values())
        effect_together = self.effect_of(together)
        return (together, effect_together) if self.is_as_good(effect_together, effect) else (neurons, effect)


@dataclass
class _Pruning:
    """Drops neurons from a set, as long as the set is as good without them."""

    search: _Search
    kept: tuple[Neuron, ...]
    effect: Effect
    """The effect of the neurons that are kept."""
    same_change: bool
    """Whether features must change as much after a selective neuron is dropped. This is not asked of unselective ones:
    they write at other patches too, so that moving them changes features in any case."""

    def __post_init__(self) -> None:
        self.best = self.effect
        self.selective = {neuron for of_round in self.search.selective for neuron in of_round}

    def drop_unselective(self) -> None:
        """Drop unselective neurons as far as possible: all at once, else half of them, a quarter, and so on."""
        untried = [[neuron for neuron in self.kept if neuron not in self.selective]]
        while untried:
            chunk = untried.pop()
            if not self.drop(chunk) and (half := len(chunk) // 2):
                untried += [chunk[:half], chunk[half:]]  # the later half first

    def drop(self, chunk: Sequence[Neuron]) -> bool:
        """Drop some neurons if the set is as good without them; returns whether it is."""
        without = self._without(chunk)
        if without is None:
            return False
        self.kept, self.effect = without
        return True

    def is_needless(self, chunk: Sequence[Neuron]) -> bool:
        """Whether the set is as good without some neurons."""
        return self._without(chunk) is not None

    def _without(self, chunk: Sequence[Neuron]) -> tuple[tuple[Neuron, ...], Effect] | None:
        without = tuple(neuron for neuron in self.kept if neuron not in chunk)
        if not chunk or not without or self.search.is_over():
            return None
        effect = self.search.effect_of(without)
        must_do_the_same = self.same_change and self.selective.issuperset(chunk)
        does_the_same = changes_the_same(effect, self.best) and is_as_clean(effect, self.best)
        if (
            not self.search.is_as_good(effect, self.best)
            or effect.change > _change_limit(self.best.change)
            or (must_do_the_same and not does_the_same)
        ):
            return None
        return without, effect


@dataclass
class _Curve:
    """The effects of moving the best n neurons of a ranking, for several n, on top of those that are moved already."""

    search: _Search
    number: int
    """The number of the round, from 1."""
    moved: tuple[Neuron, ...]
    ranking: Sequence[Neuron]
    effects: list[Effect] = field(default_factory=list)
    """In the order in which they were measured."""

    def add(self, number: int) -> Effect:
        """Measure the best `number` neurons of the ranking."""
        self.effects.append(self.search.effect_of((*self.moved, *self.ranking[:number])))
        return self.effects[-1]

    def bisect(self, low: int, high: int, is_enough: Callable[[Effect], bool]) -> None:
        """Bisect for the smallest number of neurons that is enough; the number `low` is not enough, and `high` is."""
        while high - low > 1 and not self.search.is_over():
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(self.add(middle)) else (middle, high)

    def grow(self) -> None:
        """Measure 1, 2, 4, ... neurons, until more of them remove no more, or change features too much."""
        number, last = 1, self.add(1)
        if not self.search.is_allowed(last):
            if not self.moved:
                raise ValueError(
                    f"the first neuron alone changes features by {last.change:.2g}: more than max_change="
                    f"{self.search.max_change:g}"
                )
            return
        at_first = self.search.rounds[-1].effect.remaining if self.search.rounds else 1.0
        while number < len(self.ranking) and not self.is_enough(last) and not self.search.is_over():
            low, number = number, min(2 * number, len(self.ranking))
            before, last = last, self.add(number)
            if not self.search.is_allowed(last):
                self.bisect(low, number, lambda effect: not self.search.is_allowed(effect))
                return
            if before.remaining <= self.search.aim and before.excess - last.excess < TOLERANCE:
                return
            if at_first <= self.search.target and number >= MAX_WITHOUT_HELP and last.remaining > at_first / 2:
                return
            # Most outliers are gone and the rest stays: a ranking of the patched model finds the cause of the rest.
            if last.remaining < at_first / 2 and self.removes_as_much(before, last):
                return

    def is_enough(self, effect: Effect) -> bool:
        """Whether a set leaves so little that no more neurons are needed."""
        return effect.remaining <= self.search.aim and effect.excess < TOLERANCE

    def removes_as_much(self, effect: Effect, best: Effect) -> bool:
        """Whether a set removes as much as the best one, within the tolerance."""
        return effect.remaining <= best.remaining + TOLERANCE and effect.excess <= best.excess + TOLERANCE

    def best(self) -> Effect | None:
        """The effect that comes closest to the target and leaves the least excess; None if none is allowed."""
        allowed = filter(self.search.is_allowed, self.effects)
        return min(allowed, key=lambda effect: (max(effect.remaining, self.search.aim), effect.excess), default=None)

    def round(self, effect: Effect) -> Round:
        """The record of the round, in which the set with this effect was taken."""
        added = tuple(self.ranking[: effect.neurons - len(self.moved)])
        return Round(self.number, added, tuple(sorted(self.effects, key=lambda effect: effect.neurons)), effect)

    def fewest_measured(self, best: Effect) -> Effect:
        """The effect of the smallest measured set that is as good as the best one.

        If the best one does not reach the aim, a set need only remove as much: the next round adds to it.
        """
        is_enough = self.search.is_as_good if best.remaining <= self.search.aim else self.removes_as_much
        enough = (effect for effect in self.effects if is_enough(effect, best) and self.search.is_allowed(effect))
        return min(enough, key=lambda effect: effect.neurons)

    def fewest_by_bisection(self, best: Effect) -> Effect:
        """The effect of the fewest neurons that are as good as the best, found by bisection.

        If the best does not reach the aim, it is returned itself.
        """
        moved = len(self.moved)
        if best.remaining > self.search.aim:
            return best
        high = min(effect.neurons for effect in self.effects if self.search.is_as_good(effect, best))
        low = max((effect.neurons for effect in self.effects if effect.neurons < high), default=moved)
        self.bisect(low - moved, high - moved, lambda effect: self.search.is_as_good(effect, best))
        return min(
            (effect for effect in self.effects if self.search.is_as_good(effect, best)),
            key=lambda effect: effect.neurons,
        )
