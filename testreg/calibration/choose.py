"""Choose among the ranked neurons by measuring what moving them does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from testreg.calibration.budget import Budget
from testreg.calibration.detect import Meters
from testreg.calibration.effects import worst_of
from testreg.calibration.errors import ImmovableOutliersError
from testreg.calibration.options import Options
from testreg.calibration.rank import NUM_RANKED_AGAIN, Ranked, last_blocks
from testreg.calibration.resume import State, key_of
from testreg.calibration.selection import (
    MAX_MEASUREMENTS,
    MAX_NEURONS,
    REGISTERS_TRIED,
    Candidates,
    Selection,
    select,
    with_best_start,
)
from testreg.io.processes import world_size
from testreg.io.progress import progress_bar
from testreg.measure.ranking import SELECTIVE, best
from testreg.neurons import Neuron
from testreg.records.calibration import Effect
from testreg.records.record import Start

NEGLIGIBLE = 0.01  # neurons that score less than this share of the best are not measured
NEGLIGIBLE_SELECTIVE = 0.001  # the same of selective neurons: many small ones together may keep a sink alive
FORWARDS_TO_RANK = 3  # what ranking by an image costs: its forward, its backward, and the sums
MIN_LISTED = 1000  # neurons that the list keeps at least, so that it can be truncated differently


@dataclass(frozen=True)
class Choice:
    """The recommended neurons, and the ranking that they come from."""

    neurons: tuple[Neuron, ...]
    ranking: tuple[Neuron, ...]
    last: int
    """The last block whose neurons were ranked."""
    selection: Selection | None
    """How they were chosen; None if the user has said how many to take."""
    num_registers: int = 1
    start: Start = "zeros"

    @property
    def dropped(self) -> tuple[Neuron, ...]:
        """Neurons of the ranking that were found to have no effect."""
        return () if self.selection is None else self.selection.dropped

    @property
    def others(self) -> tuple[Neuron, ...]:
        """The rest of the ranking, without those that were dropped."""
        taken = {neuron[:2] for neuron in (*self.neurons, *self.dropped)}  # later rounds score anew
        return tuple(neuron for neuron in self.ranking if neuron[:2] not in taken)


def choose(ranked: Ranked, meters: Sequence[Meters], options: Options, budget: Budget, state: State) -> Choice:
    """Take the best `top_k` neurons if the user gives that number; otherwise search for the set to recommend."""
    first_last, later_last = last_blocks(ranked.leader, options)
    ranking = best(ranked.scores(ranked.totals()), first_last, max(MIN_LISTED, 10 * (options.top_k or 0)))
    if not ranking:
        raise ImmovableOutliersError(
            f"{ranked.leader.diagnosis.verdict}, but no neuron of the blocks up to {first_last} has a positive score"
        )
    if options.top_k is not None:
        return Choice(ranking[: options.top_k], ranking, first_last, None)
    # Forwards that follow once the budget is spent: of a set that is being measured, of the numbers of registers, and
    # of the verification.
    to_come = sum(each.num_images for each in set(meters[0])) + REGISTERS_TRIED * meters[0].choosing.num_images
    ranked_again = FORWARDS_TO_RANK * NUM_RANKED_AGAIN * world_size()
    with ExitStack() as stack:
        for each in meters:
            stack.enter_context(each.choosing.comparing())
        bar = stack.enter_context(progress_bar("choosing", MAX_MEASUREMENTS, options.progress, unit="set"))

        def measure(neurons: Sequence[Neuron], num_registers: int, start: Start = "zeros") -> Effect:
            bar.update()
            key = key_of(neurons, num_registers, start)
            if key not in state.effects:
                state.effects[key] = worst_of([each.choosing.effect(neurons, num_registers, start) for each in meters])
                state.save()
            return state.effects[key]

        def rank(moved: Sequence[Neuron]) -> Candidates:
            if moved and budget.is_spent("choosing", forwards_to_come=ranked_again + to_come):
                return Candidates(())
            totals = ranked.totals_with(moved) if moved else ranked.totals()
            scores = ranked.scores(totals)
            last = later_last if moved else first_last
            is_selective = torch.stack([each.selectivity for each in totals]).amin(0) >= SELECTIVE
            candidates = best(scores, last, MAX_NEURONS, at_least=NEGLIGIBLE, without=moved)
            # Neurons that hold outliers back score below zero, but are part of the mechanism as well.
            weights = scores.abs() * is_selective
            selective = best(weights, last, MAX_NEURONS, at_least=NEGLIGIBLE_SELECTIVE, without=moved)
            return Candidates(candidates, [(block, unit, float(scores[block, unit])) for block, unit, _ in selective])

        selection = select(
            rank,
            measure,
            target=options.target,
            max_change=options.max_change,
            out_of_time=lambda: budget.is_spent("choosing", forwards_to_come=to_come),
        )
        selection = with_best_start(selection, measure(selection.neurons, selection.effect.num_registers, "mean"))
    last = max(first_last, *(block for block, _, _ in selection.neurons))
    effect = selection.effect
    return Choice(selection.neurons, ranking, last, selection, effect.num_registers, effect.start)
