"""The result of a calibration: the list of register neurons, with the record of how they were found.

If the model was calibrated at several image sizes (in several *views*), facts that are recorded once are those of the
*leading* view, the first that has outliers which neurons can move.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from testreg.calibration.budget import Step
from testreg.calibration.choose import Choice
from testreg.calibration.detect import Detected
from testreg.calibration.options import Options
from testreg.calibration.rank import Ranked
from testreg.calibration.selection import Selection
from testreg.calibration.verify import Checks
from testreg.io.processes import all_gather
from testreg.measure.diagnosis import positions_in_words
from testreg.neurons import RegisterNeurons, describe_model
from testreg.records.calibration import Calibration, FixedPositions, Stability


def result(
    ranked: Ranked, choice: Choice, checks: Checks | None, options: Options, out_of_time: Sequence[Step]
) -> RegisterNeurons:
    """Make the list of neurons that a calibration returns.

    Args:
        checks: what verified the neurons; None if no images were held out.
        out_of_time: the steps that the budget cut short.
    """
    leader, sums = ranked.leader, ranked.leader_statistics
    ignored_in_views = ((each.split.grid, sorted(each.detection.ignored)) for each in ranked.detected)
    entries = {
        "images": int(sums.num_images),
        "held_out": sum(all_gather(len(leader.split.held_out))),
        "unreadable_images": sum(all_gather(leader.view.stream.num_skipped)),
        "verdict": _verdict(leader, target_met=checks is not None and checks.target_met),
        "ignored": tuple(FixedPositions(grid, tuple(positions)) for grid, positions in ignored_in_views if positions),
        "detection_block": leader.detection.block,
        "onset_block": leader.onset,
        "max_block": choice.last_ranked_block,
        "outlier_fraction": float(sums.num_outliers / sums.num_patches),
        "images_with_outliers": int(sums.num_with_outliers),
        "stability": Stability(*ranked.stability(choice.last_ranked_block, len(choice.neurons))),
        **({"out_of_time": tuple(out_of_time)} if out_of_time else {}),
        **({} if choice.selection is None else _entries_of_choice(choice.selection)),
        **({} if checks is None else _entries_of_checks(choice, checks, options)),
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    facts = facts_before_ranking(leader)
    return RegisterNeurons(
        choice.neurons + choice.not_chosen,
        top_k=len(choice.neurons),
        num_registers=choice.num_registers,
        start=choice.start,
        model=describe_model(leader.view.model, leader.tower),
        calibration=replace(facts, **entries, order=(*facts.to_json(), *entries)),
        verified=checks is not None and checks.verified,
    )


def facts_before_ranking(leader: Detected) -> Calibration:
    """The facts of a calibration that are known before it ranks neurons: its options, and the leading view's images."""
    view, options = leader.view, leader.view.options
    return Calibration(
        source=view.stream.source,
        image_size=leader.image_size,
        rule=options.outlier_rule.describe(),
        score=options.score,
        sparsity_filter=options.sparsity_filter,
        seed=options.seed,
        dtype=view.dtype,
    )


def _entries_of_choice(selection: Selection) -> dict[str, Any]:
    """The entries of the record that say how the neurons were chosen."""
    return {
        "curve": selection.curve,
        "chosen": selection.effect,
        "registers": selection.effects_by_num_registers,
        "rounds": selection.rounds,
    }


def _entries_of_checks(choice: Choice, checks: Checks, options: Options) -> dict[str, Any]:
    """The entries of the record that say how the neurons were verified."""
    return {
        "target": options.target,
        "target_met": checks.target_met,
        "verified_on_others": checks.on_new_images,
        "max_change": options.max_change,
        "dropped": choice.dropped,
        "verified_at": checks.measured,
    }


def _verdict(leader: Detected, *, target_met: bool) -> str:
    """The verdict of the diagnosis, in one line, with a note on outliers at fixed positions, which no neurons make."""
    outliers, ignored = leader.diagnosis.outliers, leader.detection.ignored
    assert outliers is not None
    if outliers.kind != "movable" and target_met:
        verdict = f"{outliers.summary}, which these neurons move against the diagnosis"
    else:
        verdict = leader.diagnosis.verdict
    if not ignored:
        return verdict
    return f"{verdict}; besides, artefacts at {positions_in_words(sorted(ignored))}, where a register fixes nothing"


def _versions() -> dict[str, str]:
    """The versions of Python and of the packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("testreg", "torch", "timm", "transformers", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
