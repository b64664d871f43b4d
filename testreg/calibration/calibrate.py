"""Find the register neurons of a model: diagnose, rank, choose by measuring the patched model.

Images are dealt out as they come. Of the first `2 * held_out`, every other one is put aside: the neurons are chosen on
images that had no part in diagnosis and ranking, and the result is verified on others still. The rest is read in chunks
until the ranking is stable. Which image goes where depends on its number alone, so that several processes
(torch.distributed), and a run that was interrupted and resumed, come to the result of a single one.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import operator
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.calibration.selection import (
    MAX_MEASUREMENTS,
    MAX_NEURONS,
    Effect,
    Evaluator,
    Head,
    Selection,
    select,
    worst_of,
)
from testreg.families import Tower, find_tower
from testreg.files import replacing
from testreg.io.images import Images, ImageStream, Transform, batched
from testreg.io.models import OwnTransform
from testreg.io.processes import gathered, rank, world_size
from testreg.io.progress import progress_bar
from testreg.measure.diagnosis import Diagnosis, conclude, named, observe
from testreg.measure.outliers import Detection, OutlierRule
from testreg.measure.ranking import Score, Statistics, best, look_at, overlap, scores
from testreg.neurons import Neuron, RegisterNeurons, describe_model, fingerprint
from testreg.register import is_patched

CHUNK = 64  # images between two looks at whether the ranking is stable, and between two saved states
NUM_CHOOSING = 24  # held-out images on which sets of neurons are compared; the rest verifies the one that was chosen
MIN_VERIFYING = 16  # fewer images verify nothing: one more or less of their outliers decides
NEGLIGIBLE = 0.01  # of the best score: what less may do, in some image, is chance
MIN_RANKED = 1000  # neurons that the list keeps, so that it can be cut anew

STATE = "testreg-calibration"


def calibrate(
    model: nn.Module | Sequence[nn.Module],
    images: Images,
    *,
    transform: Transform | Sequence[Transform] | None = None,
    block: int | None = None,
    threshold: float | None = None,
    rule: OutlierRule | None = None,
    max_block: int | None = None,
    score: Score = "contribution",
    sparsity_filter: bool = False,
    top_k: int | None = None,
    target: float = 0.05,
    max_change: float | None = None,
    budget: float | None = None,
    head: Head | None = None,
    held_out: int = 64,
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

    Args:
        model: a vision tower, or any model that contains one; not patched. It is run on the device it is on. Several
            models are one checkpoint at several image sizes: the neurons must do at each of them.
        images: a folder, a Dataset, or any iterable of PIL images or tensors (see `testreg.io.images.ImageStream`).
        transform: PIL image -> tensor (3, h, w), one or one for each model; None takes the preprocessing that the
            model's own library names.
        block: block (0-based, negative from the end) at whose output outliers are looked for; None takes the one
            where they stand out most.
        threshold: norm above which a token is an outlier; None for the `rule`, which adapts to the model.
        max_block: last block whose neurons are ranked; None for the block after which the outliers are there.
            Neurons behind it fire at outliers because of them, so later blocks are tried only if that fails.
        score: what neurons are ranked by, see `testreg.measure.ranking.scores`; "activation" is the paper's.
        sparsity_filter: as in the released code, a neuron counts in an image only if at least half of the tokens have
            |a| < 0.5. Needs all hidden activations, so it is slower.
        top_k: how many neurons to recommend; None chooses them by measuring, see
            `testreg.calibration.selection.select`. The list keeps more, so that it can be cut anew.
        target: outliers that may be left after any block, as a fraction of those before.
        max_change: how much features may change (1 - cosine, see `testreg.calibration.selection.Effect`); None for any.
        budget: seconds after which no more images are ranked and no more sets of neurons measured.
        head: model, images (B, 3, h, w) -> scores (B, classes), such as `lambda model, images: model(images)`: how
            often it agrees with itself without registers is measured. The images are on the model's device and in its
            dtype.
        held_out: at most so many images, and at most every other one, are put aside: the first `NUM_CHOOSING` for
            choosing, the others for verifying. If these are fewer than `MIN_VERIFYING`, all are for both, and the list
            does not count as verified. With 0 nothing is measured, and `top_k` must be given.
        stability: ranking ends when the rankings by two halves of the images have this share of the best neurons in
            common; None reads all images.
        resume: a safetensors file for the state of the ranking, which goes on from there if the file exists. With
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
    started = time.monotonic()
    models = [model] if isinstance(model, nn.Module) else list(model)
    transforms = list(transform) if isinstance(transform, Sequence) else [transform] * len(models)
    if not models or len(transforms) != len(models):
        raise ValueError(f"{len(models)} models and {len(transforms)} transforms: give one transform for each")
    towers = [find_tower(each) for each in models]
    if any(is_patched(each) for each in models):
        raise RuntimeError("the model is patched: calibrate it before, or after testreg.unpatch(model)")
    if len({fingerprint(tower) for tower in towers}) > 1:
        raise ValueError("several models must be one checkpoint at several image sizes, but their weights differ")
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {score!r}")
    for name, value in (("target", target), ("max_change", max_change), ("budget", budget), ("stability", stability)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, number in (("top_k", top_k), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if held_out < 0 or (held_out == 0 and top_k is None):
        raise ValueError(f"with held_out={held_out} no set of neurons can be measured: give top_k")
    if threshold is not None and rule is not None:
        raise ValueError("give a threshold or a rule, not both")
    rule = rule or OutlierRule(threshold=threshold)
    depth = towers[0].depth
    block = None if block is None else _block(block, depth, "block")
    max_block = None if max_block is None else _block(max_block, depth, "max_block")
    if isinstance(images, Iterator) and (len(models) > 1 or resume is not None):
        raise ValueError("several models, and resumed runs, need images that can be read again: not an iterator")

    def out_of_time() -> bool:
        return budget is not None and any(gathered(time.monotonic() - started > budget))

    views = []
    for each, tower, own in zip(models, towers, transforms, strict=True):
        stream = ImageStream(images, own or OwnTransform(each), num_images=num_images, workers=workers, seed=seed)
        views.append(_View(each, tower, stream, batch_size, seed, progress))
    with ExitStack() as stack:
        for tower in towers:
            stack.enter_context(tower.evaluating())
        if amp is not None:
            stack.enter_context(torch.autocast(towers[0].device.type, amp))
        for view in views:
            view.deal(held_out)
        found = _detect(views, rule, block, insist=block is not None or max_block is not None)
        last = found.onset if max_block is None else max_block
        facts: dict[str, Any] = {
            "source": found.stream.source,
            "image_size": found.diagnosis.image_size,
            "rule": rule.describe(),
            "score": score,
            "sparsity_filter": sparsity_filter,
            "seed": seed,
            "dtype": str(amp or found.tower.dtype).removeprefix("torch."),
        }
        _rank(
            views,
            state=None if resume is None else _State(Path(resume), views, {**facts, "held_out": held_out}),
            is_enough=lambda: stability is not None and _stability(views, score, last)[0] >= stability,
            out_of_time=out_of_time,
            sparsity_filter=sparsity_filter,
            include_prefix=score == "activation",
        )
        lasts = {last} if max_block is not None else {last, found.detection.block}
        choice = _choose(
            views,
            score,
            sorted(lasts),
            verifies=held_out > 0,
            dtype=facts["dtype"],
            top_k=top_k,
            target=target,
            max_change=max_change,
            head=head,
            out_of_time=out_of_time,
            progress=progress,
        )
    overlapping, compared = _stability(views, score, choice.last, len(choice.neurons))
    total = found.statistics.total()
    return RegisterNeurons(
        choice.neurons + choice.others,
        top_k=len(choice.neurons),
        model=describe_model(found.model, found.tower),
        calibration={
            **facts,
            "images": int(total.num_images),
            "held_out": sum(gathered(len(found.held_out))),
            "unreadable_images": sum(gathered(found.stream.num_skipped)),
            "verdict": _verdict(found, choice),
            "ignored": [
                {"grid": list(view.grid), "positions": sorted(map(list, view.ignored))}
                for view in views
                if view.ignored
            ],
            "detection_block": found.detection.block,
            "onset_block": found.onset,
            "max_block": choice.last,
            "outlier_fraction": float(total.num_outliers / total.num_patches),
            "images_with_outliers": int(total.num_with_outliers),
            "stability": {"overlap": overlapping, "neurons": compared},
            **choice.facts,
            "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
        },
        verified=choice.verified,
    )


def _is_held_out(number: int, held_out: int) -> bool:
    return number % 2 == 1 and number < 2 * held_out


def held_out_images(
    images: Images, transform: Transform, *, held_out: int, num_images: int | None, seed: int
) -> list[Tensor]:
    """The images that `calibrate` with these arguments puts aside, read again."""
    numbered = ImageStream(images, transform, num_images=num_images, seed=seed).numbered()
    first = itertools.takewhile(lambda item: item[0] < 2 * held_out, numbered)
    return [image for number, image in first if _is_held_out(number, held_out)]


def _block(index: int, depth: int, name: str) -> int:
    if not -depth <= index < depth:
        raise ValueError(f"{name}={index} is out of range: the model has {depth} blocks")
    return index % depth


@dataclass(eq=False)
class _View:
    """A model at one image size, the images prepared for it, and what they showed."""

    model: nn.Module
    tower: Tower
    stream: ImageStream
    batch_size: int
    seed: int
    progress: bool
    first: list[tuple[int, Tensor]] = field(default_factory=list)
    """Numbers and images of this process for diagnosis and ranking, of those read at once."""
    held_out: list[tuple[int, Tensor]] = field(default_factory=list)
    end_of_first: int = 0
    """All images with lower numbers have been dealt to one or the other."""

    def __post_init__(self) -> None:
        self.statistics = Statistics.zeros(self.tower)
        self.ignored: frozenset[tuple[int, int]] = frozenset()
        """Fixed positions of outliers, which are not those that neurons are looked for."""
        self.diagnosis: Diagnosis  # of the others
        self.detection: Detection
        self.onset: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.tower.grid(self.first[0][1])

    def deal(self, held_out: int) -> None:
        """Read the first images."""
        self.go_to(0)
        self.end_of_first = max(2 * held_out, CHUNK)
        for number, image in self.take(self.end_of_first):
            if _is_held_out(number, held_out):
                self.held_out.append((number, image))
            else:
                self.first.append((number, image))
        if 0 in gathered(len(self.first)):
            if world_size() > 1:
                raise ValueError(f"{self.stream.source} has fewer images than there are processes ({world_size()})")
            raise self.stream.nothing_read()
        if held_out and not any(gathered(len(self.held_out))):
            raise ValueError(
                f"{self.stream.source} has a single image, and none to hold out: give more, or held_out=0 and top_k"
            )

    @property
    def is_split(self) -> bool:
        """Whether there are enough held-out images to choose on some and to verify on others."""
        return sum(gathered(len(self.held_out))) >= NUM_CHOOSING + MIN_VERIFYING

    def held_out_for(self, purpose: Literal["choosing", "verifying"]) -> list[Tensor]:
        if not self.is_split:
            return [image for _, image in self.held_out]
        chooses = purpose == "choosing"
        return [image for number, image in self.held_out if (number < 2 * NUM_CHOOSING) == chooses]

    def go_to(self, number: int) -> None:
        self.numbered = self.stream.numbered(number, rank(), world_size())
        self.next = next(self.numbered, None)

    def take(self, end: int) -> Iterator[tuple[int, Tensor]]:
        """Those of this process that are numbered below `end` and were not taken yet."""
        while self.next is not None and self.next[0] < end:
            yield self.next
            self.next = next(self.numbered, None)

    def diagnose(self, rule: OutlierRule, block: int | None, ignored: frozenset[tuple[int, int]]) -> Diagnosis:
        """Of the first images of all processes."""
        batches = batched((image for _, image in self.first), self.batch_size)
        with progress_bar("diagnosing", len(self.first), self.progress) as bar:
            seen = observe(self.tower, batches, rule, ignored=ignored, on_images=bar.update)
        return conclude(self.model, gathered(seen), rule, block=block)


def _detect(views: Sequence[_View], rule: OutlierRule, block: int | None, *, insist: bool) -> _View:
    """Decide in each view which tokens are the outliers; returns the first view that has any."""
    found: list[_View] = []
    of_all: list[Diagnosis] = []  # fixed positions included
    for view in views:
        view.diagnosis = view.diagnose(rule, block, view.ignored)
        of_all.append(view.diagnosis)
        # Outliers at the same position in all images say nothing of the neurons that make the others.
        while (outliers := view.diagnosis.outliers) is not None and outliers.fixed_positions:
            view.ignored |= set(outliers.positions)
            view.diagnosis = view.diagnose(rule, block, view.ignored)
        if outliers is None and insist:
            view.diagnosis, view.ignored = of_all[-1], frozenset()
            outliers = view.diagnosis.outliers
        if outliers is not None and (outliers.kind == "movable" or insist):
            view.detection, view.onset = Detection(rule, outliers.block, view.ignored), outliers.onset_block
            found.append(view)
    if not found:
        diagnosis = next((each for each in of_all if each.outliers is not None), of_all[0])
        if diagnosis.outliers is not None:
            raise ImmovableOutliersError(diagnosis.verdict)
        most = max(block.after_mlp.outlier_fraction for block in diagnosis.blocks)
        raise NoOutliersError(
            f"{diagnosis.verdict} (at most {most:.3%} of the patches of {diagnosis.images} images, {rule.describe()})"
        )
    for view in views:
        if view not in found:  # it has no say in the ranking, but its images are looked at all the same
            view.detection, view.onset = replace(found[0].detection, ignored=view.ignored), found[0].onset
    return found[0]


def _verdict(view: _View, choice: _Choice) -> str:
    """Of the outliers that the neurons are for, which are those at no fixed position."""
    outliers = view.diagnosis.outliers
    assert outliers is not None
    if outliers.kind != "movable" and choice.facts.get("target_met"):
        verdict = f"{outliers.summary}, which these neurons move against the diagnosis"
    else:
        verdict = view.diagnosis.verdict
    if not view.ignored:
        return verdict
    return f"{verdict}; besides, artefacts at {named(sorted(view.ignored))}, where a register fixes nothing"


def _rank(
    views: Sequence[_View],
    *,
    state: _State | None,
    is_enough: Callable[[], bool],
    out_of_time: Callable[[], bool],
    sparsity_filter: bool,
    include_prefix: bool,
) -> None:
    """Add images to the views' statistics, chunk by chunk."""
    done = 0 if state is None else state.load()  # images with lower numbers are in the statistics
    for view in views if done else ():
        view.go_to(done)

    def is_read() -> bool:
        return all(gathered(all(view.next is None for view in views)))

    with progress_bar("ranking", views[0].stream.length, views[0].progress) as bar:
        while not done or not (is_read() or out_of_time() or (done > views[0].end_of_first and is_enough())):
            end = done + CHUNK if done else views[0].end_of_first
            for view in views:
                images = view.take(end) if done else iter(view.first)
                added = Statistics.zeros(view.tower)
                while batch := list(itertools.islice(images, view.batch_size)):
                    numbers = [number for number, _ in batch]
                    (tensor,) = batched((image for _, image in batch), view.batch_size)
                    added += look_at(
                        view.tower,
                        tensor,
                        numbers,
                        view.detection,
                        sparsity_filter=sparsity_filter,
                        include_prefix=include_prefix,
                        seed=view.seed,
                    )
                    bar.update(len(batch) if view is views[0] else 0)
                view.statistics += functools.reduce(operator.add, gathered(added))
            done = end
            if state is not None:
                state.save(done)


class _State:
    """The views' statistics of a run that may be interrupted, in a safetensors file."""

    def __init__(self, path: Path, views: Sequence[_View], facts: dict[str, Any]) -> None:
        self.path, self.views = path, views
        run = {
            **facts,
            "weights": fingerprint(views[0].tower),
            "sizes": [view.diagnosis.image_size for view in views],
            "detection": [[view.detection.block, view.onset, sorted(view.detection.ignored)] for view in views],
        }
        self.run: dict[str, Any] = json.loads(json.dumps(run))
        """What must be the same for the sums to be of the same run; as JSON gives it back."""

    def save(self, done: int) -> None:
        if rank() != 0:
            return
        tensors = {
            f"{i}.{name}": tensor
            for i, view in enumerate(self.views)
            for name, tensor in view.statistics.tensors().items()
        }
        saved = {"format": STATE, "done": done, "run": self.run}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={"testreg": json.dumps(saved)})

    def load(self) -> int:
        """Fill the views' statistics; returns the number of the first image that is not in them.

        The first process reads the file for all of them: on other machines it may be missing, or another one.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        found: tuple[int, list[Statistics]] | ValueError | None = None
        if rank() == 0 and self.path.exists():
            try:
                found = self._read()
            except ValueError as error:
                found = error
        found = gathered(found)[0]
        if isinstance(found, ValueError):
            raise found
        if found is None:
            return 0
        done, statistics = found
        for view, saved in zip(self.views, statistics, strict=True):
            view.statistics = saved
        return done

    def _read(self) -> tuple[int, list[Statistics]]:
        try:
            with safe_open(self.path, "pt") as file:
                saved = json.loads((file.metadata() or {}).get("testreg", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.path} is not a saved state: {reason[:200]}. Delete it to start anew") from error
        if not isinstance(saved, dict) or saved.get("format") != STATE:
            raise ValueError(f"{self.path} is not the saved state of a calibration: name another file")
        if not isinstance(run := saved.get("run"), dict):
            raise self._damage("it does not say of which run it is")
        for key in self.run | run:
            if self.run.get(key) != run.get(key):
                name = key if key in self.run else _short(key)
                raise ValueError(
                    f"{self.path} is of another run: {name} was {_short(run.get(key))}, and is "
                    f"{_short(self.run.get(key))}. Name another file, or delete it to start anew"
                )
        done = saved.get("done")
        first = self.views[0].end_of_first
        if type(done) is not int or not first <= done <= sys.maxsize or (done - first) % CHUNK:
            raise self._damage(f"it cannot have ended at image {_short(done)}")
        return done, [self._statistics(tensors, i, done) for i in range(len(self.views))]

    def _statistics(self, tensors: dict[str, Tensor], index: int, done: int) -> Statistics:
        """Those of one view, checked."""
        expected = Statistics.zeros(self.views[index].tower).tensors()
        found = {name: tensors.get(f"{index}.{name}") for name in expected}
        for name, like in expected.items():
            value = found[name]
            if value is None or value.shape != like.shape or value.dtype != like.dtype:
                raise self._damage(f"{name} is missing, or does not fit the model")
            if not value.isfinite().all():
                raise self._damage(f"{name} is not finite")
        statistics = Statistics(**found)  # type: ignore[arg-type]
        if not 0 < float(statistics.num_images.sum()) <= done:
            raise self._damage(f"it cannot be of {float(statistics.num_images.sum()):g} images, if it ended at {done}")
        return statistics

    def _damage(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged: {what}. Delete it to start anew")


def _short(value: object) -> str:
    """Of a file that may hold anything, at any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mean_scores(views: Sequence[_View], score: Score, part: Callable[[Statistics], Statistics]) -> Tensor:
    """(L, H), of the views that show outliers."""
    showing = [view for view in views if view.statistics.total().num_with_outliers > 0]
    return torch.stack([scores(part(view.statistics), view.tower, score) for view in showing]).mean(0)


def _stability(views: Sequence[_View], score: Score, last: int, count: int | None = None) -> tuple[float, int]:
    """Share of the best neurons that the rankings by two halves of the images have in common, and their number."""
    first, second = (_mean_scores(views, score, functools.partial(Statistics.half, index=i)) for i in (0, 1))
    return overlap(first, second, last, count)


@dataclass(frozen=True)
class _Choice:
    neurons: tuple[Neuron, ...]
    others: tuple[Neuron, ...]
    """The rest of the ranking, without those that were found to have no effect."""
    last: int
    """The last block with neurons in the ranking."""
    facts: dict[str, Any]
    verified: bool


def _choose(
    views: Sequence[_View],
    score: Score,
    lasts: Sequence[int],
    *,
    verifies: bool,
    dtype: str,
    top_k: int | None,
    target: float,
    max_change: float | None,
    head: Head | None,
    out_of_time: Callable[[], bool],
    progress: bool,
) -> _Choice:
    """The neurons of the ranking up to the first of the blocks `lasts` with which the target is met, or nearly so."""
    combined = _mean_scores(views, score, Statistics.total)
    rankings = {last: best(combined, last, max(MIN_RANKED, 10 * (top_k or 0))) for last in lasts}
    if not all(rankings.values()):
        raise ImmovableOutliersError(
            f"{views[0].diagnosis.verdict}, but no neuron of the blocks up to {lasts[0]} has a positive score"
        )

    def held_out(purpose: Literal["choosing", "verifying"]) -> list[Evaluator]:
        return [
            Evaluator(
                view.model,
                view.tower,
                view.held_out_for(purpose),
                view.detection,
                view.onset,
                batch_size=view.batch_size,
                head=head,
                seed=view.seed,
            )
            for view in views
        ]

    facts: dict[str, Any] = {}
    verified = False
    last, dropped = lasts[0], tuple[Neuron, ...]()
    if top_k is None:
        selections: dict[int, Selection] = {}
        choosing = held_out("choosing")
        with progress_bar("choosing", MAX_MEASUREMENTS, progress, unit="set") as bar:

            def measure(neurons: Sequence[Neuron]) -> Effect:
                bar.update()
                return worst_of([each.effect(neurons) for each in choosing])

            for tried in lasts:
                candidates = best(combined, tried, MAX_NEURONS, at_least=NEGLIGIBLE)
                selections[tried] = select(
                    candidates, measure, target=target, max_change=max_change, out_of_time=out_of_time
                )
                if selections[tried].effect.remaining <= target:
                    break
        last = min(selections, key=lambda each: max(selections[each].effect.remaining, target))
        chosen, dropped = selections[last].neurons, selections[last].dropped
        facts["curve"] = [asdict(effect) for effect in selections[last].curve]
        facts["chosen"] = asdict(selections[last].effect)
    else:
        chosen = rankings[last][:top_k]
    if verifies:
        verifying = held_out("verifying")
        effects = [each.effect(chosen) for each in verifying]
        target_met = worst_of(effects).remaining <= target
        on_others = top_k is not None or all(view.is_split for view in views)
        # Images without an outlier would verify any list.
        enough = all(each.num_images >= MIN_VERIFYING and each.outlier_fraction > 0 for each in verifying)
        verified = target_met and on_others and enough
        facts |= {
            "target": target,
            "target_met": target_met,
            "verified_on_others": on_others,
            "max_change": max_change,
            "dropped": [list(neuron) for neuron in dropped],
            "verified_at": [
                {
                    "image_size": view.diagnosis.image_size,
                    "grid": list(each.grid),
                    "dtype": dtype,
                    "images": each.num_images,
                    "outlier_fraction": each.outlier_fraction,
                    **asdict(effect),
                }
                for view, each, effect in zip(views, verifying, effects, strict=True)
            ],
        }
    taken = {*chosen, *dropped}
    others = tuple(neuron for neuron in rankings[last] if neuron not in taken)
    return _Choice(chosen, others, last, facts, verified)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("testreg", "torch", "timm", "transformers", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
