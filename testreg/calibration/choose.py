"""Choose the register neurons among the ranked neurons, by measuring what moving them does.

A neuron is *moved* when its activation is taken from the patches and placed on extra tokens, the registers. *Outliers*
are patches with huge norms. A *selective* neuron is active at outliers and hardly anywhere else. A *view* is the model
at one image size; its *meters* measure what moving a set of neurons does there.

`selection` has the search itself. This file gives it a way to rank neurons and a way to measure them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

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
    TRIED_WITHOUT_TIME,
    Candidates,
    Selection,
    select,
    with_best_start,
)
from testreg.io.processes import world_size
from testreg.io.progress import progress_bar
from testreg.measure.ranking import SELECTIVE, best_neurons
from testreg.neurons import Neuron
from testreg.records.calibration import Effect
from testreg.records.options import Start

NEGLIGIBLE = 0.01  # neurons that score less than this share of the best score are not measured
NEGLIGIBLE_SELECTIVE = 0.001  # the limit for selective neurons: many small ones may together keep attention on a patch
FORWARDS_TO_RANK = 3  # ranking by one image costs as much as this many forwards: a forward, a backward and the sums
# The list keeps at least this many neurons, or all with positive scores, so that it can be truncated differently later.
MIN_LISTED = 1000


@dataclass(frozen=True)
class Choice:
    """The recommended neurons, and the ranking of the unpatched model.

    Not all of the neurons need be in this ranking: later rounds of the search rank neurons anew, in the model in which
    some are moved, and selective neurons may be added whose scores are negative.
    """

    neurons: tuple[Neuron, ...]
    ranking: tuple[Neuron, ...]
    """The best neurons of the unpatched model, best first. All of them have positive scores. They are at most
    `MIN_LISTED`, or ten times `top_k` if that is more."""
    last_ranked_block: int
    selection: Selection | None
    """How the neurons were chosen; None if the user gave their number (`top_k`)."""
    num_registers: int = 1
    start: Start = "zeros"

    @property
    def dropped(self) -> tuple[Neuron, ...]:
        """The neurons that the search added at first, and then dropped: the set is as good without them. There are none
        if there was no search."""
        return () if self.selection is None else self.selection.dropped

    @property
    def not_chosen(self) -> tuple[Neuron, ...]:
        """The neurons of the ranking that are neither recommended nor dropped."""
        # Scores are not compared: a neuron that was added in a later round has the score of that round.
        taken = {neuron[:2] for neuron in (*self.neurons, *self.dropped)}
        return tuple(neuron for neuron in self.ranking if neuron[:2] not in taken)


def choose(ranked: Ranked, meters: Sequence[Meters], options: Options, budget: Budget, state: State) -> Choice:
    """Choose the best `top_k` neurons if the user gives that number; otherwise search for the set to recommend.

    Args:
        meters: the meters of each view.

    Raises:
        ImmovableOutliersError: no neuron is ranked with a positive score. It is raised if `top_k` is given, too.
    """
    last_in_first_round, last_in_later_rounds = last_blocks(ranked.leader, options)
    ranking = best_neurons(
        ranked.scores(ranked.totals()), last_in_first_round, max(MIN_LISTED, 10 * (options.top_k or 0))
    )
    if not ranking:
        raise ImmovableOutliersError(
            f"{ranked.leader.diagnosis.verdict}, but no neuron of the blocks up to {last_in_first_round} has a "
            "positive score"
        )
    if options.top_k is not None:
        return Choice(ranking[: options.top_k], ranking, last_in_first_round, None)
    # Three steps still follow once the budget is spent, and need these forwards: the set that is being measured is
    # finished, numbers and starts of registers are compared, and the chosen neurons are verified.
    forwards_to_finish = (
        sum(each.num_images for each in set(meters[0])) + TRIED_WITHOUT_TIME * meters[0].choosing.num_images
    )
    forwards_to_rank_again = FORWARDS_TO_RANK * NUM_RANKED_AGAIN * world_size()
    with ExitStack() as stack:
        for each in meters:
            stack.enter_context(each.choosing.comparing())
        bar = stack.enter_context(progress_bar("choosing", MAX_MEASUREMENTS, options.progress, unit="set"))

        def measure(neurons: Sequence[Neuron], num_registers: int, start: Start = "zeros") -> Effect:
            """The worst effect over the views; it is read from the state if it was measured before."""
            bar.update()
            key = key_of(neurons, num_registers, start)
            if key not in state.effects:
                state.effects[key] = worst_of([each.choosing.effect(neurons, num_registers, start) for each in meters])
                state.save()
            return state.effects[key]

        def rank(moved: Sequence[Neuron]) -> Candidates:
            """Rank the neurons of the model in which some are moved; no candidates if there is no time to rank
            again."""
            forwards_to_come = forwards_to_rank_again + forwards_to_finish
            if moved and budget.is_spent("choosing", forwards_to_come=forwards_to_come):
                return Candidates(())
            totals = ranked.totals_with(moved) if moved else ranked.totals()
            scores = ranked.scores(totals)
            last = last_in_later_rounds if moved else last_in_first_round
            is_selective = torch.stack([each.selectivity for each in totals]).amin(0) >= SELECTIVE
            candidates = best_neurons(scores, last, MAX_NEURONS, at_least=NEGLIGIBLE, without=moved)
            # Neurons that weaken outliers have negative scores, but belong to the mechanism as well.
            magnitudes = scores.abs() * is_selective
            selective = best_neurons(magnitudes, last, MAX_NEURONS, at_least=NEGLIGIBLE_SELECTIVE, without=moved)
            return Candidates(candidates, [(block, unit, float(scores[block, unit])) for block, unit, _ in selective])

        out_of_time = partial(budget.is_spent, "choosing", forwards_to_come=forwards_to_finish)
        selection = select(
            rank,
            measure,
            target=options.target,
            max_change=options.max_change,
            out_of_time=out_of_time,
        )
        selection = with_best_start(
            selection, lambda number: measure(selection.neurons, number, "mean"), out_of_time=out_of_time
        )
    last = max(last_in_first_round, *(block for block, _, _ in selection.neurons))
    effect = selection.effect
    return Choice(selection.neurons, ranking, last, selection, effect.num_registers, effect.start)
