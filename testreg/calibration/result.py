"""The result of a calibration: the neurons with all that is known of how they were found."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from testreg.calibration.budget import Cut
from testreg.calibration.effects import Effect, EffectMeter, what_is_wrong_with_maps
from testreg.calibration.options import Options
from testreg.calibration.selection import Selection
from testreg.calibration.view import MIN_VERIFYING, View, stability_of
from testreg.io.processes import gathered
from testreg.measure.diagnosis import named
from testreg.neurons import Neuron, RegisterNeurons, describe_model


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

    meters: list[EffectMeter]
    """One for each view."""
    effects: list[Effect]
    target_met: bool
    on_others: bool
    """Whether these images had no part in the choice."""

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What was measured, as the neuron JSON holds it: one entry for each meter."""
        return [
            {
                "grid": list(meter.grid),
                "images": meter.num_images,
                "outlier_fraction": meter.outlier_fraction,
                **asdict(effect),
                "before": {"sink": meter.untouched.sink, "hottest": meter.untouched.hottest},
            }
            for meter, effect in zip(self.meters, self.effects, strict=True)
        ]

    @property
    def verified(self) -> bool:
        """Whether the target was met, and maps are clean, on enough images, with outliers, that had no part in the
        choice."""
        # Images without an outlier would verify any list.
        enough = all(each.num_images >= MIN_VERIFYING and each.outlier_fraction > 0 for each in self.meters)
        are_clean = not any(map(what_is_wrong_with_maps, self.facts))
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
    overlapping, compared = stability_of(views, options.score, choice.last, len(choice.neurons))
    total = found.statistics.total()
    return RegisterNeurons(
        choice.neurons + choice.others,
        top_k=len(choice.neurons),
        num_registers=choice.num_registers,
        model=describe_model(found.model, found.tower),
        calibration={
            **facts_before_ranking(found, options),
            "images": int(total.num_images),
            "held_out": sum(gathered(len(found.held_out))),
            "unreadable_images": sum(gathered(found.stream.num_skipped)),
            "verdict": _verdict(found, target_met=checks is not None and checks.target_met),
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
            **({"out_of_time": list(out_of_time)} if out_of_time else {}),
            **({} if choice.selection is None else _facts_of_choice(choice.selection)),
            **({} if checks is None else _facts_of_checks(views, choice, checks, options)),
            "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
        },
        verified=checks is not None and checks.verified,
    )


def facts_before_ranking(found: View, options: Options) -> dict[str, Any]:
    """What is known of a run before it ranks."""
    return {
        "source": found.stream.source,
        "image_size": found.diagnosis.image_size,
        "rule": options.outlier_rule.describe(),
        "score": options.score,
        "sparsity_filter": options.sparsity_filter,
        "seed": options.seed,
        "dtype": found.dtype,
    }


def _facts_of_choice(selection: Selection) -> dict[str, Any]:
    return {
        "curve": [asdict(effect) for effect in selection.curve],
        "chosen": asdict(selection.effect),
        "registers": [asdict(effect) for effect in selection.registers],
        "rounds": [
            {
                "round": number,
                "added": [list(neuron) for neuron in each.added],
                "curve": [asdict(effect) for effect in each.curve],
                **asdict(each.effect),
            }
            for number, each in enumerate(selection.rounds, start=1)
        ],
    }


def _facts_of_checks(views: Sequence[View], choice: Choice, checks: Checks, options: Options) -> dict[str, Any]:
    return {
        "target": options.target,
        "target_met": checks.target_met,
        "verified_on_others": checks.on_others,
        "max_change": options.max_change,
        "dropped": [list(neuron) for neuron in choice.dropped],
        "verified_at": [
            {"image_size": view.diagnosis.image_size, "dtype": view.dtype, **measured}
            for view, measured in zip(views, checks.facts, strict=True)
        ],
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
