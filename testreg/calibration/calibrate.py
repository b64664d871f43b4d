"""Find the register neurons of a model, in five steps, a file each; what a step has seen is a record, which the next
takes.

1. `split`: images are split as they come. Of the first `2 * held_out`, every other one is put aside: the neurons are
   chosen on images that had no part in diagnosis and ranking, and the result is verified on others still.
2. `detect`: which tokens of the first images are outliers, and may neurons move them?
3. `rank`: neurons are ranked by what they have to do with the outliers, on chunks of images until that is stable.
4. `choose`: the fewest of the best neurons that remove the outliers are found by measuring, in rounds, on one part of
   the images that were put aside.
5. `verify`: what they do is measured on the other part.

A model at several image sizes is seen in several views, each of which goes through all steps. Which image goes where
depends on its number alone, so that several processes (torch.distributed), and a run that was interrupted and resumed,
come to the result of a single one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from testreg.calibration.budget import Budget
from testreg.calibration.choose import choose
from testreg.calibration.detect import Detected, detect, leading
from testreg.calibration.effects import Head
from testreg.calibration.options import Options
from testreg.calibration.rank import rank
from testreg.calibration.result import before_ranking, result
from testreg.calibration.resume import State
from testreg.calibration.split import split
from testreg.calibration.verify import verify
from testreg.calibration.view import evaluating, views_of
from testreg.io.images import Images
from testreg.io.preprocessing import Transform
from testreg.measure.outliers import OutlierRule
from testreg.measure.score import Score
from testreg.neurons import RegisterNeurons


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
        rule: which tokens are outliers; None for `testreg.OutlierRule()`.
        max_block: last block whose neurons are ranked. None for the last one with outliers; with other scores than
            "attribution", which take what fires at outliers for what makes them, for the one after which the outliers
            are there, and later ones only if that fails.
        score: what neurons are ranked by, see `testreg.measure.ranking.SUMS`. "attribution" takes a backward pass;
            "activation" is the paper's.
        sparsity_filter: as in the released code, a neuron counts in an image only if at least half of the tokens have
            |a| < 0.5. Needs all hidden activations, so it is slower.
        top_k: how many neurons to recommend; None chooses them by measuring, see
            `testreg.calibration.selection.select`. The list keeps more, so that it can be truncated anew.
        target: outliers that may be left after any block, as a fraction of those before.
        max_change: how much features may change (1 - cosine, see `testreg.records.calibration.Effect`); None for
            any.
        budget: seconds that the calibration may take, roughly. A model that is too slow for the first images
            gets fewer, by the time that one takes; and once the seconds have passed no more images are ranked, and no
            more sets of neurons measured. `calibration.out_of_time` says which of these happened.
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
        batch_size: images that are run at once.
        num_images: at most so many are read; None for all.
        workers: processes that decode images; 0 for this one.
        amp: torch.bfloat16 or torch.float16 to run under autocast.
        seed: of the order in which images are read, and of the normal tokens that are sampled.
        progress: show how far it is.

    Returns:
        The neurons, with all that is known of the run in `calibration`. They are `verified` if they reach the target on
        at least `MIN_VERIFYING` held-out images that had no part in the choice, at each image size. If the target was
        not reached, `calibration.target_met` is False, and the set is the one that came closest.

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
        splits = split(views, budget_left)
        detected = detect(splits, options)
        state = saved_state(detected, options)
        ranked = rank(detected, options, budget_left, state)
        meters = [each.meters() for each in detected] if options.held_out else []
        choice = choose(ranked, meters, options, budget_left, state)
        checks = verify(detected, choice, meters, options)
    return result(ranked, choice, checks, options, budget_left.cut)


def saved_state(detected: Sequence[Detected], options: Options) -> State:
    """What an interrupted run has left; nothing yet, if there was none."""
    facts = {**before_ranking(leading(detected)).to_json(), "held_out": options.held_out}
    state = State(None if options.resume is None else Path(options.resume), detected, facts)
    state.load()
    return state
