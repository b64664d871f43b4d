"""Find the register neurons of a model: split the images, detect the outliers, rank, choose in rounds, verify.

Images are split as they come. Of the first `2 * held_out`, every other one is put aside: the neurons are chosen on
images that had no part in diagnosis and ranking, and the result is verified on others still. The rest is read in chunks
until the ranking is stable. Which image goes where depends on its number alone, so that several processes
(torch.distributed), and a run that was interrupted and resumed, come to the result of a single one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from testreg.calibration.budget import Budget
from testreg.calibration.effects import EffectMeter, worst_of
from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.calibration.options import Head, Options
from testreg.calibration.result import Checks, Choice, before_ranking, result
from testreg.calibration.resume import State, key_of
from testreg.calibration.selection import MAX_MEASUREMENTS, MAX_NEURONS, REGISTERS_TRIED, Candidates, select
from testreg.calibration.view import (
    CHUNK,
    FIRST_CHUNK,
    NUM_RANKED_AGAIN,
    View,
    evaluating,
    mean_scores,
    stability_of,
    views_of,
)
from testreg.io.images import Images
from testreg.io.preprocessing import Transform
from testreg.io.processes import gathered, world_size
from testreg.io.progress import progress_bar
from testreg.measure.diagnosis import Diagnosis
from testreg.measure.outliers import Detection, OutlierRule
from testreg.measure.ranking import SELECTIVE, Score, best, selectivity
from testreg.neurons import Neuron, RegisterNeurons
from testreg.records.calibration import Effect, PlainAttention, Verification

NEGLIGIBLE = 0.01  # neurons that score less than this share of the best are not measured,
NEGLIGIBLE_SELECTIVE = 0.001  # and selective ones less than this: small ones, together, may keep a sink alive
FORWARDS_TO_RANK = 3  # of an image, that ranking by it takes: forward, backward and what is read of both
MIN_RANKED = 16  # images with outliers, a quarter of them in either half, or the first images are all ranked
MIN_LISTED = 1000  # neurons that the list keeps, so that it can be truncated anew


def calibrate(
    model: nn.Module | Sequence[nn.Module],
    images: Images,
    *,
    transform: Transform | Sequence[Transform] | None = None,
    block: int | None = None,
    threshold: float | None = None,
    rule: OutlierRule | None = None,
    max_block: int | None = None,
    score: Score = "attribution",
    sparsity_filter: bool = False,
    top_k: int | None = None,
    target: float = 0.05,
    max_change: float | None = None,
    budget: float | None = None,
    head: Head | None = None,
    held_out: int = 48,
    stability: float | None = 0.95,
    resume: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    num_images: int | None = None,
    workers: int = 0,
    amp: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RegisterNeurons:
    """Find the register neurons of `model`: rank its MLP neurons on some images, and choose among them on others.

    Example:
        >>> neurons = testreg.calibrate(model, images, progress=False)
        >>> neurons.top_k, len(neurons.by_block()[2])
        (4, 4)
        >>> neurons.calibration.verdict
        'outliers from block 2 (MLP), ... % of patches, movable'
        >>> neurons.save("neurons.json")

    Args:
        model: a vision tower, or any model that contains one; not patched. It is run on the device it is on. Several
            models are one checkpoint at several image sizes: the neurons must do at each of them.
        images: a folder, a Dataset, or any iterable of PIL images or tensors (see `testreg.io.images.ImageStream`).
        transform: PIL image -> tensor (3, h, w), one or one for each model; None takes the preprocessing that the
            model's own library names.
        block: the block (0-based, negative from the end) after which outliers are detected; None takes the one where
            they stand out most.
        threshold: norm above which a token is an outlier; None for the `rule`, which adapts to the model.
        max_block: last block whose neurons are ranked. None for the last one with outliers; with other scores than
            "attribution", which take what fires at outliers for what makes them, for the one after which the outliers
            are there, and later ones only if that fails.
        score: what neurons are ranked by, see `testreg.measure.ranking.scores`. "attribution" takes a backward pass;
            "activation" is the paper's.
        sparsity_filter: as in the released code, a neuron counts in an image only if at least half of the tokens have
            |a| < 0.5. Needs all hidden activations, so it is slower.
        top_k: how many neurons to recommend; None chooses them by measuring, see
            `testreg.calibration.selection.select`. The list keeps more, so that it can be truncated anew.
        target: outliers that may be left after any block, as a fraction of those before.
        max_change: how much features may change (1 - cosine, see `testreg.calibration.effects.Effect`); None for
            any.
        budget: seconds that the calibration may take, roughly. A model that is too slow for the first images
            gets fewer, by the time that one takes; and once the seconds have passed no more images are ranked, and no
            more sets of neurons measured. "out_of_time" in the facts says which of these happened.
        head: model, images (B, 3, h, w) -> scores (B, classes), such as `lambda model, images: model(images)`: how
            often it agrees with itself without registers is measured. The images are on the model's device and in its
            dtype.
        held_out: at most so many images, and at most every other one, are put aside: `NUM_CHOOSING` for choosing, the
            others for verifying, with a like share of the outliers each. If the latter would be fewer than
            `MIN_VERIFYING`, all are for both, and the list does not count as verified. With 0 nothing is measured, and
            `top_k` must be given.
        stability: ranking ends when the rankings by two halves of the images agree on this share of the best neurons
            (`testreg.measure.ranking.overlap`); None reads all images.
        resume: a safetensors file for what was ranked and measured, from which the run goes on if the file exists. With
            several processes, it is that of the first.
        amp: torch.bfloat16 or torch.float16 to run under autocast.

    Returns:
        The neurons, with the facts of the run in `calibration`. They are `verified` if they reach the target on at
        least `MIN_VERIFYING` held-out images that had no part in the choice, at each image size. If the target was not
        reached, "target_met" is false in the facts, and the set is the one that came closest.

    Raises:
        NoOutliersError: there is nothing to fix.
        ImmovableOutliersError: a register would not fix it (unless `block` or `max_block` insists).
        ValueError: an argument does not fit the model; too few images could be read; norms are not finite.
        RuntimeError: the model is patched.
    """
    options = Options(
        transform=transform,
        block=block,
        threshold=threshold,
        rule=rule,
        max_block=max_block,
        score=score,
        sparsity_filter=sparsity_filter,
        top_k=top_k,
        target=target,
        max_change=max_change,
        budget=budget,
        head=head,
        held_out=held_out,
        stability=stability,
        resume=resume,
        batch_size=batch_size,
        num_images=num_images,
        workers=workers,
        amp=amp,
        seed=seed,
        progress=progress,
    )
    budget_left = Budget(options.budget)
    views = views_of(model, images, options)
    options = views[0].options  # with blocks counted from the front
    with evaluating(views):
        for view in views:
            view.split()
        number = budget_left.images(views[0].num_first, lambda: [view.run_one() for view in views])
        if number is not None:
            for view in views:
                view.keep_first(number)
        found = _detect(views, options)
        state = _saved_state(views, found, options)
        _rank(views, found, options, budget_left, state)
        meters = [view.meters() for view in views] if options.held_out else []
        choice = _choose(views, found, meters, options, budget_left, state)
        checks = _verify(views, choice, [verifying for _, verifying in meters], options)
    return result(views, found, choice, checks, options, budget_left.cut)


# Detect ---------------------------------------------------------------------------------------------------------------


def _detect(views: Sequence[View], options: Options) -> View:
    """Decide in each view which tokens are the outliers; returns the first view with any that neurons may move."""
    found: list[View] = []
    of_all: list[Diagnosis] = []  # fixed positions included
    for view in views:
        view.diagnosis = with_fixed = view.diagnose()
        of_all.append(with_fixed)
        # Outliers at the same position in all images say nothing of the neurons that make the others.
        while (outliers := view.diagnosis.outliers) is not None and outliers.fixed_positions:
            view.ignored |= set(outliers.positions)
            view.diagnosis = view.diagnose()
        if outliers is None and options.insists:
            view.diagnosis, view.ignored = with_fixed, frozenset()
            outliers = view.diagnosis.outliers
        if outliers is not None and (outliers.kind == "movable" or options.insists):
            view.onset = outliers.onset_block
            onset = view.onset if options.block is None else None
            view.detection = Detection(options.outlier_rule, outliers.block, view.ignored, onset)
            found.append(view)
    if not found:
        raise _nothing_to_move(of_all, options)
    for view in views:
        if view not in found:  # it has no say in the ranking, but takes part in everything else
            view.detection, view.onset = replace(found[0].detection, ignored=view.ignored), found[0].onset
    return found[0]


def _nothing_to_move(diagnoses: Sequence[Diagnosis], options: Options) -> NoOutliersError | ImmovableOutliersError:
    for diagnosis in diagnoses:
        if diagnosis.outliers is not None:
            return ImmovableOutliersError(diagnosis.verdict)
    diagnosis = diagnoses[0]
    most = max(block.after_mlp.outlier_fraction for block in diagnosis.blocks)
    rule = options.outlier_rule.describe()
    return NoOutliersError(
        f"{diagnosis.verdict} (at most {most:.3%} of the patches of {diagnosis.images} images, {rule})"
    )


# Rank -----------------------------------------------------------------------------------------------------------------


def _saved_state(views: Sequence[View], found: View, options: Options) -> State | None:
    """What an interrupted run has left, or nothing yet; None unless the run is to be resumable."""
    if options.resume is None:
        return None
    state = State(
        Path(options.resume), views, {**before_ranking(found, options).to_json(), "held_out": options.held_out}
    )
    state.load()
    return state


def _rank(views: Sequence[View], found: View, options: Options, budget: Budget, state: State | None) -> None:
    """Add images to the views' statistics, chunk by chunk, until the ranking by them is stable."""
    done = 0 if state is None else state.done  # images with lower numbers are in the statistics
    for view in views:
        view.skip_ranked(done)

    def is_read() -> bool:
        return all(gathered(all(view.is_read for view in views)))

    def is_stable() -> bool:
        if options.stability is None:
            return False
        with_outliers = torch.stack([view.statistics.num_with_outliers for view in views]).sum(0)  # of either half
        if done < views[0].end_of_first and min(with_outliers.sum(), 4 * with_outliers.min()) < MIN_RANKED:
            return False
        return stability_of(views, options.score, _last_blocks(found, options)[0])[0] >= options.stability

    with progress_bar("ranking", views[0].stream.length, options.progress) as bar:
        while not done or not (is_read() or is_stable() or budget.is_spent("ranking")):
            done += FIRST_CHUNK if done < views[0].end_of_first else CHUNK
            for view in views:
                view.add_statistics(view.take_unranked(done), bar.update if view is views[0] else lambda count: None)
            if state is not None:
                state.done = done
                state.save()


def _last_blocks(found: View, options: Options) -> tuple[int, int]:
    """The block up to which neurons are ranked in the first round, and in all others."""
    if options.max_block is not None:
        return options.max_block, options.max_block
    if options.score == "attribution":  # it tells causes from what fires at outliers because of them
        last = max(found.detection.block, *found.blocks_with_outliers)
        return last, last
    return found.onset, found.detection.block


# Choose ---------------------------------------------------------------------------------------------------------------


def _choose(
    views: Sequence[View],
    found: View,
    meters: Sequence[tuple[EffectMeter, EffectMeter]],
    options: Options,
    budget: Budget,
    state: State | None,
) -> Choice:
    """As many of the best neurons as the user says, or the fewest with which the target is met, or nearly so."""
    first_last, later_last = _last_blocks(found, options)
    combined = mean_scores(views, options.score, [view.statistics.total() for view in views])
    ranking = best(combined, first_last, max(MIN_LISTED, 10 * (options.top_k or 0)))
    if not ranking:
        raise ImmovableOutliersError(
            f"{found.diagnosis.verdict}, but no neuron of the blocks up to {first_last} has a positive score"
        )
    if options.top_k is not None:
        return Choice(ranking[: options.top_k], ranking, first_last, None)
    # What is left to do once no more time is to be spent: one more set of neurons, if it was begun, numbers of
    # registers, and to verify.
    to_come = sum(each.num_images for each in set(meters[0])) + (REGISTERS_TRIED - 1) * meters[0][0].num_images
    ranked_again = FORWARDS_TO_RANK * NUM_RANKED_AGAIN * world_size()
    with ExitStack() as stack:
        for choosing, _ in meters:
            stack.enter_context(choosing.comparing())
        bar = stack.enter_context(progress_bar("choosing", MAX_MEASUREMENTS, options.progress, unit="set"))

        def measure(neurons: Sequence[Neuron], num_registers: int) -> Effect:
            bar.update()
            key = key_of(neurons, num_registers)
            if state is not None and key in state.effects:
                return state.effects[key]
            effect = worst_of([choosing.effect(neurons, num_registers) for choosing, _ in meters])
            if state is not None:
                state.effects[key] = effect
                state.save()
            return effect

        def rank(moved: Sequence[Neuron]) -> Candidates:
            if moved and budget.is_spent("choosing", forwards_to_come=ranked_again + to_come):
                return Candidates(())
            found = [view.statistics_with(moved) if moved else view.statistics.total() for view in views]
            scores = mean_scores(views, options.score, found)
            last = later_last if moved else first_last
            is_selective = torch.stack([selectivity(each) for each in found]).amin(0) >= SELECTIVE
            ranked = best(scores, last, MAX_NEURONS, at_least=NEGLIGIBLE, without=moved)
            # Those that hold outliers back score below zero, and belong to what makes them nevertheless.
            weights = scores.abs() * is_selective
            selective = best(weights, last, MAX_NEURONS, at_least=NEGLIGIBLE_SELECTIVE, without=moved)
            return Candidates(ranked, [(block, unit, float(scores[block, unit])) for block, unit, _ in selective])

        selection = select(
            rank,
            measure,
            target=options.target,
            max_change=options.max_change,
            out_of_time=lambda: budget.is_spent("choosing", forwards_to_come=to_come),
        )
    last = max(first_last, *(block for block, _, _ in selection.neurons))
    return Choice(selection.neurons, ranking, last, selection, selection.effect.num_registers)


# Verify ---------------------------------------------------------------------------------------------------------------


def _verify(views: Sequence[View], choice: Choice, meters: Sequence[EffectMeter], options: Options) -> Checks | None:
    """Measure the chosen neurons at each image size; None if no images are held out."""
    if not meters:
        return None
    measured = []
    for view, meter in zip(views, meters, strict=True):
        (height, width), before = view.diagnosis.image_size, meter.untouched
        measured.append(
            Verification(
                image_size=(height, width),
                dtype=view.dtype,
                grid=meter.grid,
                images=meter.num_images,
                outlier_fraction=meter.outlier_fraction,
                effect=meter.effect(choice.neurons, choice.num_registers),
                before=PlainAttention(before.sink, before.hottest),
            )
        )
    return Checks(
        tuple(measured),
        target_met=worst_of([each.effect for each in measured]).remaining <= options.target,
        on_others=choice.selection is None or all(view.is_split for view in views),
    )
