"""Choose the fewest register neurons of a ranking that remove the outliers, by measuring the patched model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from testreg.calibration.evaluation import Effect
from testreg.neurons import Neuron

TOLERANCE = 0.02  # of the outliers' excess norm: sets that differ by less remove them equally well
MAX_NEURONS = 512  # in a set that is measured; InternViT-6B needed 300
MAX_MEASUREMENTS = 64  # of sets of neurons, in one selection


@dataclass(frozen=True)
class Selection:
    """The neurons that were chosen, and why."""

    neurons: tuple[Neuron, ...]
    effect: Effect
    curve: tuple[Effect, ...]
    """Effects of the best 1, 2, 4, ... of the ranking, and of the sizes between which the choice was made."""
    dropped: tuple[Neuron, ...]
    """Neurons among the best of the ranking that have no effect on outliers."""


def select(
    ranking: Sequence[Neuron],
    measure: Callable[[Sequence[Neuron]], Effect],
    *,
    target: float,
    max_change: float | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Selection:
    """The fewest neurons that remove the outliers.

    The best 1, 2, 4, ... of the ranking are measured until outliers are down to `target` and twice as many neurons
    take less than `TOLERANCE` more of their excess norm; then the smallest such number is found by bisection. Last,
    neurons that can stay where they are, all together costing less than that, are dropped: those that fire at outliers
    without causing them.

    Args:
        target: outliers that may be left after any block, as a fraction of those before. If no set reaches it, the one
            that comes closest is chosen.
        max_change: sets that change pooled or patch features more (1 - cosine) are not chosen.
        out_of_time: asked before each measurement but the first; the search ends when it says so, with the best so far.

    Raises:
        ValueError: even the first neuron changes more than `max_change`.
    """
    search = _Search(ranking, measure, target, max_change, out_of_time)
    search.grow()
    best = search.best()
    smallest = search.smallest(best)
    kept, effect = search.without_idle(smallest, best)
    return Selection(
        neurons=tuple(kept),
        effect=effect,
        curve=tuple(sorted(search.curve, key=lambda effect: effect.neurons)),
        dropped=tuple(neuron for neuron in ranking[: smallest.neurons] if neuron not in kept),
    )


@dataclass
class _Search:
    """A search along a ranking: what was measured so far, and what is good enough."""

    ranking: Sequence[Neuron]
    measure: Callable[[Sequence[Neuron]], Effect]
    target: float
    max_change: float | None
    out_of_time: Callable[[], bool]
    curve: list[Effect] = field(default_factory=list)
    """Effects of several numbers of the best neurons, in the order in which they were measured."""
    count: int = 0
    """Measurements made."""

    def is_over(self) -> bool:
        """Whether nothing more may be measured."""
        return self.count >= MAX_MEASUREMENTS or self.out_of_time()

    def is_allowed(self, effect: Effect) -> bool:
        """Whether features change as little as they must."""
        return self.max_change is None or effect.change <= self.max_change

    def is_as_good(self, effect: Effect, best: Effect) -> bool:
        """Whether a set removes as much as the best one, or nearly so, and is allowed."""
        removes_as_much = effect.remaining <= max(self.target, best.remaining)
        return removes_as_much and effect.excess <= best.excess + TOLERANCE and self.is_allowed(effect)

    def measured(self, neurons: Sequence[Neuron]) -> Effect:
        self.count += 1
        return self.measure(neurons)

    def add(self, size: int) -> Effect:
        """Measure the best `size` neurons of the ranking."""
        self.curve.append(self.measured(self.ranking[:size]))
        return self.curve[-1]

    def bisect(self, low: int, high: int, is_enough: Callable[[Effect], bool]) -> None:
        """Measure sizes between two, towards the first that is enough: `low` is not, `high` is."""
        while high - low > 1 and not self.is_over():
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(self.add(middle)) else (middle, high)

    def grow(self) -> None:
        """Measure 1, 2, 4, ... neurons, until more of them take no more away, or change too much."""
        last = self.add(1)
        if not self.is_allowed(last):
            raise ValueError(
                f"the first neuron alone changes features by {last.change:.2g}: more than max_change="
                f"{self.max_change:g}"
            )
        while last.neurons < len(self.ranking) and not self.is_over():
            before, last = last, self.add(2 * last.neurons)
            if not self.is_allowed(last):
                self.bisect(before.neurons, last.neurons, lambda effect: not self.is_allowed(effect))
                return
            if before.remaining <= self.target and before.excess - last.excess < TOLERANCE:
                return

    def best(self) -> Effect:
        """The effect, of those measured, that comes closest to the target and leaves the least excess."""
        allowed = filter(self.is_allowed, self.curve)
        return min(allowed, key=lambda effect: (max(effect.remaining, self.target), effect.excess))

    def smallest(self, best: Effect) -> Effect:
        """The effect of the fewest neurons of the ranking that are as good as the best, found by bisection."""
        high = min(effect.neurons for effect in self.curve if self.is_as_good(effect, best))
        low = max((effect.neurons for effect in self.curve if effect.neurons < high), default=0)
        self.bisect(low, high, lambda effect: self.is_as_good(effect, best))
        return min(
            (effect for effect in self.curve if self.is_as_good(effect, best)), key=lambda effect: effect.neurons
        )

    def without_idle(self, effect: Effect, best: Effect) -> tuple[list[Neuron], Effect]:
        """The neurons with this effect, less those that can stay where they are, and the effect of moving the rest."""
        kept = list(self.ranking[: effect.neurons])
        untried = [kept] if len(kept) > 1 else []
        while untried and not self.is_over():
            chunk = untried.pop()
            without = [neuron for neuron in kept if neuron not in chunk]
            if without and self.is_as_good(found := self.measured(without), best):
                kept, effect = without, found
            elif len(chunk) > 1:
                untried += [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]  # the worse half first
        return kept, effect
