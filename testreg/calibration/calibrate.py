"""Find the register neurons of a model, in five steps.

*Outliers* are patch tokens with huge norms. *Register neurons* are the MLP neurons that cause them. A neuron is *moved*
when its activation is taken from the patches and placed on extra tokens, the registers.

Each step is a function in the file of its name. It returns a record, which the next step takes.

1. `split` reads the first images and keeps them in two parts. Of the first `2 * held_out` images, every other one is
   *held out*: it takes no part in steps 2 and 3. The other images are *diagnosed* in step 2.
2. `detect` decides which patches of the diagnosed images are outliers, and whether moving neurons can remove them.
3. `rank` ranks the neurons by how far they cause the outliers, first on the diagnosed images and then on new ones. It
   reads images in chunks until the ranking is stable.
4. `choose` searches for the fewest neurons that remove the outliers. It measures patched models on one part of the
   held-out images.
5. `verify` measures the chosen neurons on the other part of the held-out images.

A *view* is the model at one image size. If there are several, each step is done for every view.

The number of an image alone decides which part of the calibration it takes. So several processes (torch.distributed)
have the same result as one, and a resumed run has the same result as one that was never interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from testreg.calibration.budget import Budget
from testreg.calibration.choose import choose
from testreg.calibration.detect import Detected, detect, leader_of
from testreg.calibration.effects import Head
from testreg.calibration.options import Options
from testreg.calibration.rank import rank
from testreg.calibration.result import facts_before_ranking, result
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
    """Find the register neurons of `model`: rank its MLP neurons on some images, and choose among them on other images.

    Example:
        >>> neurons = testreg.calibrate(model, images, progress=False)
        >>> neurons.top_k, len(neurons.by_block()[2])
        (4, 4)
        >>> neurons.calibration.verdict
        'outliers from block 2 (MLP), ... % of patches, movable'
        >>> neurons.save("neurons.json")

    Args:
        model: a vision tower, or any model that contains one; not patched. It is run on the device it is on. Several
            models must be one checkpoint at several image sizes: the neurons are then chosen to remove the outliers at
            every size.
        images: a folder, a Dataset, or any iterable of PIL images or tensors (see `testreg.io.images.ImageStream`).
        transform: a function PIL image -> tensor (3, h, w), or a list of one for each model; None takes the
            preprocessing that the model's library names.
        block: the block (0-based, negative from the end) after which outliers are detected; None takes the block
            after which they stand out most.
        threshold: the norm above which a token is an outlier; None uses the `rule`, which adapts to the model.
        rule: decides which tokens are outliers; None uses `testreg.OutlierRule()`.
        max_block: the last block whose neurons are ranked. None means, with the score "attribution", the last block
            after which there are outliers. The other scores cannot tell neurons that make outliers from neurons that
            merely fire at them. With these scores, None means the onset block, after which outliers first have most of
            their norm. Later blocks are then ranked only if the neurons up to this block do not remove the outliers.
        score: what the neurons are ranked by, see `testreg.measure.ranking.SUMS`. "attribution" takes a backward pass;
            "activation" is the paper's score.
        sparsity_filter: count a neuron in an image only if its |activation| is below 0.5 at half of the tokens or more,
            as the paper's released code does. This needs all hidden activations, so it is slower.
        top_k: how many neurons to recommend; None chooses them by measuring, see
            `testreg.calibration.selection.select`. The list keeps more neurons, so that it can be truncated differently
            later.
        target: how many outliers may be left after any block, as a fraction of those of the unpatched model.
        max_change: how much features may change (1 - cosine, see `testreg.records.calibration.Effect`); None sets no
            limit.
        budget: roughly how many seconds the calibration may take. If the model is slow, fewer images are held out and
            diagnosed. Once the time is over, no more images rank neurons and no more sets of neurons are measured.
            `calibration.out_of_time` says which steps were cut short.
        head: a function model, images (B, 3, h, w) -> scores (B, classes), such as
            `lambda model, images: model(images)`. The calibration then measures in how many images the best class stays
            the same with registers. The images are on the model's device and in its dtype.
        held_out: how many images are held out, at most; never more than every other image. `NUM_CHOOSING` of them
            choose the neurons and the others verify these, with similar shares of the outliers in both parts. If fewer
            than `MIN_VERIFYING` images would verify, all held-out images do both, and neurons that they chose do not
            count as verified. With 0, nothing is measured, and `top_k` must be given.
        stability: ranking ends when the rankings by two halves of the images have this share of the best neurons in
            common (`testreg.measure.ranking.overlap`); None reads all images.
        resume: a safetensors file that keeps what was ranked and measured. If it exists, the run goes on from it. Of
            several processes, only the first reads and writes it.
        batch_size: how many images are run at once.
        num_images: how many images are read, at most; None reads all.
        workers: how many processes decode images; with 0, this process decodes them.
        amp: torch.bfloat16 or torch.float16 runs the model under autocast in this dtype.
        seed: the seed of the order in which images are read, and of the sample of normal tokens.
        progress: whether to show progress bars.

    Returns:
        The neurons. Their `calibration` is the record of this run. They are `verified` if they reach the target, and
        leave clean attention maps, on at least `MIN_VERIFYING` held-out images that had no part in the choice, at each
        image size. If they do not reach the target there, `calibration.target_met` is False. If no set reached it on
        the images that choose, the neurons are the set that came closest to it.

    Raises:
        NoOutliersError: the model has no outliers, so there is nothing to fix.
        ImmovableOutliersError: moving neurons would not remove the outliers by the diagnosis, which is passed over if
            `block` or `max_block` is given; or no neuron has a positive score.
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
    time_budget = Budget(options.budget)
    views = views_of(model, images, options)
    options = views[0].options  # with blocks counted from the front
    with evaluating(views):
        splits = split(views, time_budget)
        detected = detect(splits, options)
        state = resumed_state(detected, options)
        ranked = rank(detected, options, time_budget, state)
        meters = [each.meters() for each in detected] if options.held_out else []
        choice = choose(ranked, meters, options, time_budget, state)
        checks = verify(detected, choice, meters, options)
    return result(ranked, choice, checks, options, time_budget.cut_steps)


def resumed_state(detected: Sequence[Detected], options: Options) -> State:
    """The state that an interrupted run saved in the file `options.resume`; an empty state if there is no such file."""
    facts = {**facts_before_ranking(leader_of(detected)).to_json(), "held_out": options.held_out}
    state = State(None if options.resume is None else Path(options.resume), detected, facts)
    state.load()
    return state
