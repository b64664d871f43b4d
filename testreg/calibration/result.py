"""The result of a calibration: the neurons with all that is known of how they were found."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from testreg.calibration.budget import Cut
from testreg.calibration.effects import what_is_wrong_with_maps
from testreg.calibration.options import Options
from testreg.calibration.selection import Selection
from testreg.calibration.view import MIN_VERIFYING, View, stability_of
from testreg.io.processes import gathered
from testreg.measure.diagnosis import named
from testreg.neurons import Neuron, RegisterNeurons, describe_model
from testreg.records.calibration import Calibration, FixedPositions, Stability, Verification


@dataclass(frozen=True)
class Choice:
    """The neurons that are recommended, and the ranking that they are from."""

    neurons: tuple[Neuron, ...]
    ranking: tuple[Neuron, ...]
    last: int
    """The last block whose neurons were ranked."""
    selection: Selection | None
    """How they were chosen; None if the user says how many."""
    num_registers: int = 1

    @property
    def dropped(self) -> tuple[Neuron, ...]:
        """Neurons of the ranking that were found to have no effect."""
        return () if self.selection is None else self.selection.dropped

    @property
    def others(self) -> tuple[Neuron, ...]:
        """The rest of the ranking, without those that were dropped."""
        taken = {neuron[:2] for neuron in (*self.neurons, *self.dropped)}  # later rounds score anew
        return tuple(neuron for neuron in self.ranking if neuron[:2] not in taken)


@dataclass(frozen=True)
class Checks:
    """What the chosen neurons do on the images that verify them."""

    measured: tuple[Verification, ...]
    """At each image size."""
    target_met: bool
    on_others: bool
    """Whether these images had no part in the choice."""

    @property
    def verified(self) -> bool:
        """Whether the target was met, and maps are clean, on enough images, with outliers, that had no part in the
        choice."""
        # Images without an outlier would verify any list.
        enough = all(each.images >= MIN_VERIFYING and each.outlier_fraction > 0 for each in self.measured)
        are_clean = not any(map(what_is_wrong_with_maps, self.measured))
        return self.target_met and are_clean and self.on_others and enough


def result(
    views: Sequence[View],
    found: View,
    choice: Choice,
    checks: Checks | None,
    options: Options,
    out_of_time: Sequence[Cut],
) -> RegisterNeurons:
    """The list of neurons that a calibration gives.

    Args:
        found: the first view that has outliers.
        checks: None if no images were held out.
        out_of_time: what the budget cut short.
    """
    total = found.statistics.total()
    return RegisterNeurons(
        choice.neurons + choice.others,
        top_k=len(choice.neurons),
        num_registers=choice.num_registers,
        model=describe_model(found.model, found.tower),
        calibration=replace(
            before_ranking(found, options),
            images=int(total.num_images),
            held_out=sum(gathered(len(found.held_out))),
            unreadable_images=sum(gathered(found.stream.num_skipped)),
            verdict=_verdict(found, target_met=checks is not None and checks.target_met),
            ignored=tuple(FixedPositions(view.grid, tuple(sorted(view.ignored))) for view in views if view.ignored),
            detection_block=found.detection.block,
            onset_block=found.onset,
            max_block=choice.last,
            outlier_fraction=float(total.num_outliers / total.num_patches),
            images_with_outliers=int(total.num_with_outliers),
            stability=Stability(*stability_of(views, options.score, choice.last, len(choice.neurons))),
            out_of_time=tuple(out_of_time),
            **({} if choice.selection is None else _facts_of_choice(choice.selection)),
            **({} if checks is None else _facts_of_checks(choice, checks, options)),
            made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=_versions(),
        ),
        verified=checks is not None and checks.verified,
    )


def before_ranking(found: View, options: Options) -> Calibration:
    """What is known of a run before it ranks."""
    height, width = found.diagnosis.image_size
    return Calibration(
        source=found.stream.source,
        image_size=(height, width),
        rule=options.outlier_rule.describe(),
        score=options.score,
        sparsity_filter=options.sparsity_filter,
        seed=options.seed,
        dtype=found.dtype,
    )


def _facts_of_choice(selection: Selection) -> dict[str, Any]:
    return {
        "curve": selection.curve,
        "chosen": selection.effect,
        "registers": selection.registers,
        "rounds": selection.rounds,
    }


def _facts_of_checks(choice: Choice, checks: Checks, options: Options) -> dict[str, Any]:
    return {
        "target": options.target,
        "target_met": checks.target_met,
        "verified_on_others": checks.on_others,
        "max_change": options.max_change,
        "dropped": choice.dropped,
        "verified_at": checks.measured,
    }


def _verdict(found: View, *, target_met: bool) -> str:
    """What the outliers at no fixed position are, which the neurons are for, and where there are others."""
    outliers = found.diagnosis.outliers
    assert outliers is not None
    if outliers.kind != "movable" and target_met:
        verdict = f"{outliers.summary}, which these neurons move against the diagnosis"
    else:
        verdict = found.diagnosis.verdict
    if not found.ignored:
        return verdict
    return f"{verdict}; besides, artefacts at {named(sorted(found.ignored))}, where a register fixes nothing"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("testreg", "torch", "timm", "transformers", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
