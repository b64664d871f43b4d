"""Choose the register neurons by measuring the patched model: add what removes the outliers, in rounds, complete the
set with what keeps the sink alive, choose how many registers hold it, and drop what can stay where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from testreg.measure.ranking import MATTERS
from testreg.neurons import Neuron
from testreg.records.calibration import Effect, Round

TOLERANCE = 0.02  # of the outliers' excess norm: sets that differ by less remove them equally well
SAME_CHANGE = 0.01  # sets whose changes of features differ by less change the same,
SAME_SHARE = 0.02  # or by a smaller share of the change: it may be large, where most of a feature was the artefact
CLEANER = 0.1  # of the attention that a sink, or the hottest patch, draws: less than that is not worth more neurons
AS_CLEAN = 0.02, 0.01  # of the same, and of how unlike former outliers are: what costs less may be left out
SAME_OUTPUTS = 0.002  # sets whose changes differ by less, or by a tenth, keep outputs equally well
ALIKE = 0.7  # of the weakest chosen neuron's score: what scores so much is taken with it
AIM = 0.2  # of the target: a population that is rare among these images may be frequent in others
FEW = (
    8  # neurons: so many may be tried one by one, and end a round that was begun for few outliers, if they help nothing
)
MAX_NEURONS = 512  # that one round adds to a set; InternViT-6B needed 300
MAX_MEASUREMENTS = 64  # of sets of neurons, in one selection
MAX_ROUNDS = 8
REGISTERS_TRIED = 4  # at most

Measure = Callable[[Sequence[Neuron], int], Effect]
"""Neurons, and the number of registers that they are moved to -> the effect."""


@dataclass(frozen=True)
class Candidates:
    """Neurons that may be added to a set, best first."""

    ranking: Sequence[Neuron]
    selective: Collection[Neuron] = ()
    """Those that are active at outliers and hardly anywhere else, which may score too little for the ranking, or below
    zero. What moving them changes at other patches is not their own doing, but that of the outliers, which others look
    at."""


@dataclass(frozen=True)
class Selection:
    """The neurons that were chosen, and why."""

    neurons: tuple[Neuron, ...]
    effect: Effect
    rounds: tuple[Round, ...]
    dropped: tuple[Neuron, ...]
    """Neurons that were added in a round, and then found to have no effect on outliers."""
    registers: tuple[Effect, ...]
    """Effects of moving them to 1, 2, ... registers, as far as they were measured."""

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
    """The fewest neurons that remove the outliers, the attention sink, and what these do to other patches.

    1. In each round, the best 1, 2, 4, ... of a ranking are added and measured, until outliers are down to a fifth of
       `target` and twice as many take less than `TOLERANCE` more of their excess norm. If most outliers are gone, and
       twice as many take no more of the rest, what makes these was hidden: the patched model is ranked anew, in the
       next round, as long as that helps.
    2. Norms are not all: the fewest neurons that leave no outlier may leave patches that draw attention. So all
       selective candidates are added. If less attention is drawn then (`draws_as_little`), the set is this one; else it
       is the smallest number of the ranking that is as good as the last.
    3. Neurons that can stay where they are, all together costing less than the tolerances, are dropped: first those
       that are busy elsewhere too, and then those of late blocks, which may fire at outliers without causing them.
    4. Which of several neurons that do the same is needed depends on the images. So selective candidates are taken with
       those that were chosen of their block, if they score 70 % of the weakest of these or more, and nothing is the
       worse for it.
    5. If the set was not completed in step 2, fewer neurons may have left some of what outliers did to other patches.
       That shows in what changes if all selective candidates of any weight are moved as well. If it is more (by over
       `SAME_CHANGE` and over 2 % of the change), they are added, and those dropped again without which as much changes.
    6. Those that are busy elsewhere are tried again, now that others have come to the set. Then each neuron is tried by
       itself, or, if they are more than `FEW`, each of the last block: one whose being left does nothing, and which
       alone takes less than a tenth of the outliers, fires at them without causing them. It is dropped.
    7. Registers are copies, each with all of the neurons: one has less weight in the softmax of attention than the many
       outliers had. As many are taken as change outputs least, or nearly so.

    Args:
        rank: the neurons that are moved -> others, ranked on the model that is patched with them.
        measure: neurons, number of registers -> the effect of moving them there.
        target: outliers that may be left after any block, as a fraction of those before. If no set reaches it, the one
            that comes closest is chosen.
        max_change: sets that change pooled or patch features more (1 - cosine) are not chosen.
        out_of_time: asked before each measurement but the first; the search ends when it says so, with the best so far,
            of which numbers of registers are measured still.

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
    grown, effect = search.chosen, search.rounds[-1].effect
    kept, effect = search.with_all_selective(grown, effect)
    is_complete = len(kept) > len(grown)
    if not is_complete:
        kept, effect = search.smallest_of_last_round()
    kept, effect = search.without_idle(kept, effect, same_change=is_complete)
    kept, effect = search.with_alike(kept, effect)
    if not is_complete:
        kept, effect = search.completed(kept, effect)
    kept, effect = search.without_busy(kept, effect)
    kept, effect = search.without_bystanders(kept, effect)
    registers = search.with_registers(kept, effect)
    return Selection(
        neurons=kept,
        effect=registers[search.best_number(registers) - 1],
        rounds=tuple(search.rounds),
        dropped=tuple(neuron for neuron in search.chosen if neuron not in kept),
        registers=registers,
    )


def draws_as_little(one: Effect, other: Effect) -> bool:
    """Whether former outliers draw no more attention with one set than with another, or no more than other patches, and
    the hottest patch is no hotter, but for the tolerance."""
    is_sink = one.sink is not None and one.sink > (1 + CLEANER) * max(1.0, other.sink or 0.0)
    return not is_sink and _is_at_most(one.hottest, other.hottest, share=CLEANER)


def is_as_clean(one: Effect, other: Effect) -> bool:
    """Whether one set leaves maps as clean as another, but for the tolerances: its former outliers draw no more
    attention and are no less like their neighbours, and the hottest patch is no hotter."""
    share, more = AS_CLEAN
    return (
        _is_at_most(one.sink, other.sink, share=share)
        and _is_at_most(one.hottest, other.hottest, share=share)
        and _is_at_most(one.unlike, other.unlike, more=more)
    )


def _is_at_most(one: float | None, other: float | None, *, share: float = 0.0, more: float = 0.0) -> bool:
    return one is None or other is None or one <= (1 + share) * other + more


def changes_the_same(one: Effect, other: Effect) -> bool:
    """Whether two sets of neurons change features by the same amount, but for the tolerance."""
    is_same = partial(math.isclose, rel_tol=SAME_SHARE, abs_tol=SAME_CHANGE)
    return is_same(one.change_pooled, other.change_pooled) and is_same(one.change_patches, other.change_patches)


def _as_little(change: float) -> float:
    """The largest change of features that keeps outputs as well as this one, or nearly so."""
    return change + max(SAME_OUTPUTS, change / 10)


def _score(neuron: Neuron) -> float:
    """The score of a candidate, which has one."""
    score = neuron[2]
    assert score is not None
    return score


@dataclass
class _Search:
    """A search in rounds: what was added and measured so far, and what is good enough."""

    measure: Measure
    target: float
    """What the caller is content with."""
    max_change: float | None
    out_of_time: Callable[[], bool]
    rounds: list[Round] = field(default_factory=list)
    selective: list[list[Neuron]] = field(default_factory=list)
    """The selective candidates of each round, best first."""
    weighty: list[Neuron] = field(default_factory=list)
    """Those of them that score a tenth of the best of their round or more."""
    last_curve: _Curve | None = None
    """That of the last round."""
    known: dict[tuple[frozenset[tuple[int, int]], int], Effect] = field(default_factory=dict)
    """The effects of the sets that were measured, with so many registers."""

    @property
    def aim(self) -> float:
        """How many outliers may be left, as a fraction, if fewer can be reached."""
        return AIM * self.target

    @property
    def chosen(self) -> tuple[Neuron, ...]:
        return tuple(neuron for each in self.rounds for neuron in each.added)

    def is_over(self) -> bool:
        """Whether nothing more may be measured but numbers of registers."""
        return len(self.known) > MAX_MEASUREMENTS - REGISTERS_TRIED or self.out_of_time()

    def needs_more(self) -> bool:
        """Whether outliers are left that another round may remove."""
        return self.rounds[-1].effect.remaining > self.aim and len(self.rounds) < MAX_ROUNDS and not self.is_over()

    def is_allowed(self, effect: Effect) -> bool:
        """Whether features change as little as they must."""
        return self.max_change is None or effect.change <= self.max_change

    def is_as_good(self, effect: Effect, best: Effect) -> bool:
        """Whether a set removes as much as the best one, leaves maps as clean, or nearly so, and is allowed."""
        removes_as_much = effect.remaining <= max(self.aim, best.remaining) and effect.excess <= best.excess + TOLERANCE
        return removes_as_much and draws_as_little(effect, best) and self.is_allowed(effect)

    def measured(self, neurons: Sequence[Neuron], num_registers: int = 1) -> Effect:
        key = frozenset(neuron[:2] for neuron in neurons), num_registers
        if key not in self.known:
            self.known[key] = self.measure(neurons, num_registers)
        return self.known[key]

    def add_from(self, candidates: Candidates) -> bool:
        """Add the fewest measured of a ranking that remove the most; returns whether that helped, else nothing is
        added."""
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
        self.rounds.append(curve.round(curve.fewest(best)))
        selective = sorted(candidates.selective, key=_score, reverse=True)
        self.selective.append(selective)
        self.weighty += [neuron for neuron in selective if _score(neuron) >= MATTERS * _score(ranking[0])]
        return True

    def smallest_of_last_round(self) -> tuple[tuple[Neuron, ...], Effect]:
        """All neurons that were added, in the last round only as many as are needed, and their effect."""
        assert self.last_curve is not None
        best = self.rounds[-1].effect
        self.rounds[-1] = self.last_curve.round(self.last_curve.smallest(best))
        return self.chosen, self.rounds[-1].effect

    def with_all_selective(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """The neurons, which have this effect, with all selective candidates if less attention is drawn then, and the
        effect of them all."""
        selective = [neuron for of_round in self.selective for neuron in of_round]
        whole, effect_of_whole = self._with(selective, neurons, effect)
        return (neurons, effect) if draws_as_little(effect, effect_of_whole) else (whole, effect_of_whole)

    def with_registers(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[Effect, ...]:
        """The effects of moving the neurons, which have this effect with one register, to 1, 2, ... registers, until
        outputs change more again."""
        effects = [effect]
        while len(effects) < REGISTERS_TRIED:
            if len(effects) > 1 and effects[-1].change > effects[-2].change:
                break
            effects.append(self.measured(neurons, len(effects) + 1))
        return tuple(effects)

    def best_number(self, registers: Sequence[Effect]) -> int:
        """The smallest number of registers with which outputs change least, or nearly so."""
        good = {
            number: each.change for number, each in enumerate(registers, start=1) if self.is_as_good(each, registers[0])
        }
        return next(number for number, change in good.items() if change <= _as_little(min(good.values())))

    def without_idle(
        self, neurons: tuple[Neuron, ...], effect: Effect, *, same_change: bool
    ) -> tuple[tuple[Neuron, ...], Effect]:
        """Neurons that have this effect, less those that can stay where they are, and the effect of moving the rest.

        Selective ones take nothing from other patches, so of these it is enough to try whole blocks, from the last,
        where neurons may fire at outliers without causing them; and in blocks that are needed, those that score less
        than half of the best, unless the set is complete: which of its neurons are needed depends on the images.

        Args:
            same_change: whether the set is complete: features must change as much without them.
        """
        drop = _Drop(self, neurons, effect, same_change)
        drop.busy()
        for block in sorted({block for block, _, _ in drop.kept}, reverse=True):
            of_block = [neuron for neuron in drop.kept if neuron in drop.selective and neuron[0] == block]
            if of_block and not drop.dropped(of_block) and not same_change:
                most = max(_score(neuron) for neuron in of_block)
                drop.dropped([neuron for neuron in of_block if _score(neuron) < most / 2])
        return drop.kept, drop.effect

    def without_busy(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """Neurons that have this effect, less those that are busy elsewhere and can stay there, and the effect."""
        drop = _Drop(self, neurons, effect, same_change=False)
        drop.busy()
        return drop.kept, drop.effect

    def with_alike(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """The neurons, which have this effect, with selective ones that score alike, and the effect of them all."""
        alike: list[Neuron] = []
        for of_round in self.selective:
            chosen = [neuron for neuron in of_round if neuron in neurons]
            for block in {block for block, _, _ in chosen}:
                weakest = min(_score(neuron) for neuron in chosen if neuron[0] == block)
                alike += [each for each in of_round if each[0] == block and _score(each) >= ALIKE * weakest]
        return self._with(alike, neurons, effect)

    def completed(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """The neurons, which have this effect, with selective ones if these change more, and the effect of them all."""
        whole, effect_of_whole = self._with(self.weighty, neurons, effect)
        if changes_the_same(effect_of_whole, effect):
            return neurons, effect
        return self.without_idle(whole, effect_of_whole, same_change=True)

    def without_bystanders(self, neurons: tuple[Neuron, ...], effect: Effect) -> tuple[tuple[Neuron, ...], Effect]:
        """The neurons, which have this effect, less those that do nothing beside the others, and little alone.

        Of more than `FEW`, only those of the last block are tried: what fires because of outliers comes last.
        """
        drop = _Drop(self, neurons, effect, same_change=True)
        last = max(block for block, _, _ in neurons)
        tried = neurons if len(neurons) <= FEW else [neuron for neuron in neurons if neuron[0] == last]
        for neuron in tried if 1 < len(tried) <= FEW else ():
            if not drop.is_needless([neuron]) or self.is_over():
                continue
            alone = self.measured((neuron,))
            if min(alone.remaining, alone.excess) > 1 - MATTERS:
                drop.dropped([neuron])
        return drop.kept, drop.effect

    def _with(
        self, others: Sequence[Neuron], neurons: tuple[Neuron, ...], effect: Effect
    ) -> tuple[tuple[Neuron, ...], Effect]:
        """Neurons and others, and the effect of them all; the neurons alone, with theirs, if that is not as good."""
        taken = {neuron[:2] for neuron in neurons}  # a neuron may be a candidate in several rounds
        added = {neuron[:2]: neuron for neuron in others if neuron[:2] not in taken}
        if not added or self.is_over():
            return neurons, effect
        whole = (*neurons, *added.values())
        effect_of_whole = self.measured(whole)
        return (whole, effect_of_whole) if self.is_as_good(effect_of_whole, effect) else (neurons, effect)


@dataclass
class _Drop:
    """Drops neurons of a set that can stay where they are."""

    search: _Search
    kept: tuple[Neuron, ...]
    effect: Effect
    """Of moving those that are kept."""
    same_change: bool
    """Whether features must change as much without a neuron that is selective. What moving others changes is their own
    doing."""

    def __post_init__(self) -> None:
        self.best = self.effect
        self.selective = {neuron for of_round in self.search.selective for neuron in of_round}

    def busy(self) -> None:
        """Drop what can stay of the neurons that are busy elsewhere too: all at once, or their halves, and so on."""
        untried = [[neuron for neuron in self.kept if neuron not in self.selective]]
        while untried:
            chunk = untried.pop()
            if not self.dropped(chunk) and (half := len(chunk) // 2):
                untried += [chunk[:half], chunk[half:]]  # the later half first

    def dropped(self, chunk: Sequence[Neuron]) -> bool:
        """Drop these if the set is as good without them; returns whether it is."""
        without = self._without(chunk)
        if without is None:
            return False
        self.kept, self.effect = without
        return True

    def is_needless(self, chunk: Sequence[Neuron]) -> bool:
        """Whether the set would be as good without these."""
        return self._without(chunk) is not None

    def _without(self, chunk: Sequence[Neuron]) -> tuple[tuple[Neuron, ...], Effect] | None:
        without = tuple(neuron for neuron in self.kept if neuron not in chunk)
        if not chunk or not without or self.search.is_over():
            return None
        effect = self.search.measured(without)
        must_do_the_same = self.same_change and self.selective.issuperset(chunk)
        does_the_same = changes_the_same(effect, self.best) and is_as_clean(effect, self.best)
        if (
            not self.search.is_as_good(effect, self.best)
            or effect.change > _as_little(self.best.change)
            or (must_do_the_same and not does_the_same)
        ):
            return None
        return without, effect


@dataclass
class _Curve:
    """The effects of several numbers of the best neurons of a ranking, on top of those that are moved already."""

    search: _Search
    number: int
    """Of the round, from 1."""
    moved: tuple[Neuron, ...]
    ranking: Sequence[Neuron]
    effects: list[Effect] = field(default_factory=list)
    """In the order in which they were measured."""

    def add(self, number: int) -> Effect:
        """Measure the best `number` neurons of the ranking."""
        self.effects.append(self.search.measured((*self.moved, *self.ranking[:number])))
        return self.effects[-1]

    def bisect(self, low: int, high: int, is_enough: Callable[[Effect], bool]) -> None:
        """Measure numbers between two, towards the first that is enough: `low` is not, `high` is."""
        while high - low > 1 and not self.search.is_over():
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(self.add(middle)) else (middle, high)

    def grow(self) -> None:
        """Measure 1, 2, 4, ... neurons, until more of them take no more away, or change too much."""
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
            if at_first <= self.search.target and number >= FEW and last.remaining > at_first / 2:
                return
            # Where most outliers are gone and others stay, a ranking of the patched model finds what makes those.
            if last.remaining < at_first / 2 and self.is_near(before, last):
                return

    def is_enough(self, effect: Effect) -> bool:
        """Whether more neurons could not remove more."""
        return effect.remaining <= self.search.aim and effect.excess < TOLERANCE

    def is_near(self, effect: Effect, best: Effect) -> bool:
        """Whether a set removes as much as the best one, but for the tolerance."""
        return effect.remaining <= best.remaining + TOLERANCE and effect.excess <= best.excess + TOLERANCE

    def best(self) -> Effect | None:
        """The effect that comes closest to the target and leaves the least excess; None if none is allowed."""
        allowed = filter(self.search.is_allowed, self.effects)
        return min(allowed, key=lambda effect: (max(effect.remaining, self.search.aim), effect.excess), default=None)

    def round(self, effect: Effect) -> Round:
        """The round that ends with this effect."""
        added = tuple(self.ranking[: effect.neurons - len(self.moved)])
        return Round(self.number, added, tuple(sorted(self.effects, key=lambda effect: effect.neurons)), effect)

    def fewest(self, best: Effect) -> Effect:
        """The effect of the fewest neurons measured that are as good as the best; if that is not what the search aims
        at, that are nearly as good: the next round goes on from there."""
        is_enough = self.search.is_as_good if best.remaining <= self.search.aim else self.is_near
        enough = (effect for effect in self.effects if is_enough(effect, best) and self.search.is_allowed(effect))
        return min(enough, key=lambda effect: effect.neurons)

    def smallest(self, best: Effect) -> Effect:
        """The effect of the fewest neurons that are as good as the best, found by bisection, if that is what the search
        aims at."""
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
