"""The charts in the report of a calibration.

*Before* and *after* mean without and with registers. An outlier is a patch of huge norm; the *excess norm* is by how
much outliers exceed the norms of other patches. A calibration measures outliers, excess norm, and how much features
change, for several numbers of register neurons (its curve), and may do so in several rounds. Functions `..._in_words`
describe a chart for people who do not see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from testreg.records.calibration import Calibration, Effect
from testreg.report.charts import (
    FOURTH,
    INK,
    NORM,
    NORMS,
    THIRD,
    Chart,
    Line,
    label_plainly,
    per_block,
)
from testreg.report.map_figures import AFTER, BEFORE
from testreg.report.measure import Norms, Report
from testreg.report.values import Table, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def charts_of(report: Report) -> dict[str, list[Chart]]:
    """{name of a picture: the charts in it, side by side}."""
    charts = {
        "norms": [
            Chart(NORMS, _norms_in_words(report), per_block(_norm_lines(report), NORM, log=True)),
            Chart(
                "Outlier patches after each block",
                _outliers_in_words(report),
                per_block(_outlier_lines(report), "outliers (% of patches)"),
            ),
        ],
        "histograms": [
            Chart(
                f"After block {block}",
                _histogram_in_words(report, block),
                partial(_plot_histogram, report=report, block=block),
            )
            for block in report.norms_before.ratios
        ],
    }
    facts = report.facts
    if facts.curve:
        charts["curve"] = [
            Chart(
                "What is left of the outliers",
                _curve_in_words(facts, REMOVAL_LABELS),
                partial(_plot_removal, facts=facts),
            ),
            Chart("What it changes", _curve_in_words(facts, CHANGE_LABELS), partial(_plot_change, facts=facts)),
        ]
    if len(facts.rounds) > 1 and (curves := curves_of_rounds(facts)):  # the curve of a single round is shown above
        charts["rounds"] = [
            Chart(title, _rounds_in_words(curves, name), partial(_plot_rounds, curves=curves, name=name))
            for name, title in ROUND_CHARTS.items()
        ]
    return charts


def tables_of(report: Report) -> dict[str, Table]:
    """The numbers in the charts of norms and histograms, as tables by the name of the picture."""
    (_, _, before), (_, _, after) = _sides(report)
    outliers = _outlier_percentages(report)
    columns: dict[str, Sequence[float]] = {
        "largest norm, before": before.largest.tolist(),
        "after": after.largest.tolist(),
        "median norm, before": before.median.tolist(),
        "after ": after.median.tolist(),
        "outliers in %, before": outliers["before"],
        "after  ": outliers["after"],
    }
    if after.registers is not None:
        columns["register's norm"] = after.registers.tolist()
    rows = [(i, *row) for i, row in enumerate(zip(*columns.values(), strict=True))]
    levels = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0])
    ratios = [
        (block, side, *norms.ratios[block].flatten().quantile(levels).tolist())
        for block in before.ratios
        for side, _, norms in _sides(report)
    ]
    return {
        "norms": table_of(["block", *columns], rows),
        "histograms": table_of(["block", "", "smallest ratio", "1 %", "median", "99 %", "largest"], ratios),
    }


# Norms and outliers of each block -------------------------------------------------------------------------------------


def _sides(report: Report) -> list[tuple[str, str, Norms]]:
    """("before" or "after", its colour, its norms)."""
    return [("before", BEFORE, report.norms_before), ("after", AFTER, report.norms_after)]


def _norm_lines(report: Report) -> list[Line]:
    """The largest and the median norm of patches after each block, and the register's norm."""
    lines = []
    for side, colour, norms in _sides(report):
        lines.append(Line(norms.largest.tolist(), colour, f"largest patch, {side}"))
        lines.append(Line(norms.median.tolist(), colour, f"median patch, {side}", "median"))
    if report.norms_after.registers is not None:
        lines.append(Line(report.norms_after.registers.tolist(), THIRD, "register", "other"))
    return lines


def _norms_in_words(report: Report) -> str:
    sentences = [
        f"{side.capitalize()}, the largest patch norm peaks at {_peak(norms.largest.tolist())}, where the median is "
        f"{norms.median[norms.largest.argmax()]:.3g}."
        for side, _, norms in _sides(report)
    ]
    if report.norms_after.registers is not None:
        sentences.append(f"The register's norm peaks at {_peak(report.norms_after.registers.tolist())}.")
    return " ".join(sentences)


def _peak(values: Sequence[float], unit: str = "") -> str:
    """The largest of the values after each block, and the block, in words."""
    highest = max(value for value in values if not math.isnan(value))
    return f"{highest:.3g}{unit} after block {values.index(highest)}"


def _outlier_percentages(report: Report) -> dict[str, list[float]]:
    """{"before" or "after": outliers after each block, in percent of the patches}."""
    sides = {"before": report.before, "after": report.after}
    return {
        side: [100 * block.after_mlp.outlier_fraction for block in diagnosis.blocks]
        for side, diagnosis in sides.items()
    }


def _outlier_lines(report: Report) -> list[Line]:
    """The share of outliers after each block, before and after."""
    sides = zip(_outlier_percentages(report).items(), (BEFORE, AFTER), strict=True)
    return [Line(values, colour, side) for (side, values), colour in sides]


def _outliers_in_words(report: Report) -> str:
    return " ".join(
        f"{side.capitalize()}, at most {_peak(values, ' % of the patches')}."
        if any(values)
        else f"{side.capitalize()}, none after any block."
        for side, values in _outlier_percentages(report).items()
    )


def _plot_histogram(axis: Axes, report: Report, *, block: int) -> None:
    """Plot the histogram of norms of patches after a block, divided by the median norm of their image."""
    ratios = torch.stack([norms.ratios[block].flatten() for _, _, norms in _sides(report)])
    low, high = float(ratios.amin().clamp(min=1e-3)), float(ratios.amax())
    bins = torch.logspace(math.log10(low / 1.01), math.log10(high * 1.01), 61).tolist()
    for values, (side, colour, _) in zip(ratios, _sides(report), strict=True):
        axis.hist(values.numpy(), bins=bins, color=colour, alpha=0.25)
        axis.hist(values.numpy(), bins=bins, color=colour, histtype="step", linewidth=1.5, label=side)
    axis.set(xscale="log", yscale="log", ylabel="patches")
    axis.set_xlabel("norm / median norm of the image's patches")
    label_plainly(axis.xaxis)
    label_plainly(axis.yaxis)
    axis.legend()


def _histogram_in_words(report: Report, block: int) -> str:
    sentences = [
        f"{side} from {float(norms.ratios[block].amin()):.2g} to {float(norms.ratios[block].amax()):.3g}"
        for side, _, norms in _sides(report)
    ]
    return f"Histogram of patch norms over the median norm of their image: {', '.join(sentences)}."


# The trade-off over the number of neurons -----------------------------------------------------------------------------

REMOVAL_LABELS = {"remaining": "outliers, at the worst block", "excess": "excess norm"}
CHANGE_LABELS = {"change_pooled": "pooled feature", "change_patches": "patch features"}
"""{attribute of `Effect`: its label}, of the two curves in each of two charts."""
CURVE_STYLES = ((THIRD, "o"), (FOURTH, "s"))  # colour and marker of the first and the second curve of a chart


def _plot_removal(axis: Axes, facts: Calibration) -> None:
    """Plot what is left of outliers and excess norm over the number of neurons."""
    axis.set(ylabel="left (fraction of before)")
    _plot_curves(axis, facts, REMOVAL_LABELS, facts.target, "target")


def _plot_change(axis: Axes, facts: Calibration) -> None:
    """Plot by how much features change over the number of neurons."""
    axis.set(ylabel="change (1 - cosine similarity)")
    _plot_curves(axis, facts, CHANGE_LABELS, facts.max_change, "max change")


def _plot_curves(
    axis: Axes, facts: Calibration, labels: Mapping[str, str], limit: float | None, limit_name: str
) -> None:
    """Plot curves over the number of neurons, with a ring at the chosen number, and a line at the limit.

    Args:
        labels: {attribute of `Effect`: its label}, for each curve.
        limit: the value that the curves should not exceed; None for no line.
        limit_name: the label of that line.
    """
    for (name, label), (colour, marker) in zip(labels.items(), CURVE_STYLES, strict=True):
        axis.plot(*zip(*_points(facts, name), strict=True), color=colour, marker=marker, markersize=4, label=label)
        if facts.chosen is not None:
            _ring(axis, [facts.chosen.neurons], [getattr(facts.chosen, name)])
    if limit is not None:
        axis.axhline(limit, color=INK, linestyle=":", linewidth=1.2, label=limit_name)
    if facts.chosen is not None:
        _ring(axis, [], [], "chosen")
    axis.set_xlabel("register neurons")
    if min(point.neurons for point in facts.curve) > 0:
        axis.set_xscale("log")
        label_plainly(axis.xaxis)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)  # below the chart, so that it hides no point


def _points(facts: Calibration, name: str) -> list[tuple[int, float]]:
    """(number of neurons, value) of one curve; `name` is an attribute of `Effect`."""
    return sorted((point.neurons, getattr(point, name)) for point in facts.curve)


def _ring(axis: Axes, x: Sequence[float], y: Sequence[float], label: str | None = None) -> None:
    """Draw rings at points."""
    axis.scatter(x, y, s=100, marker="o", facecolors="none", edgecolors=INK, linewidths=1.5, zorder=3, label=label)


def _curve_in_words(facts: Calibration, labels: Mapping[str, str]) -> str:
    sentences = []
    for name, label in labels.items():
        points = _points(facts, name)
        (fewest, first), (most, last) = points[0], points[-1]
        sentences.append(f"{label} {first:.2g} at {fewest} and {last:.2g} at {most}")
    chosen = f" Chosen: {facts.chosen.neurons}." if facts.chosen is not None else ""
    return f"Over the number of register neurons: {'; '.join(sentences)}.{chosen}"


# Rounds ---------------------------------------------------------------------------------------------------------------

ROUND_CHARTS = {  # {attribute of `Effect`: title of its chart}
    "remaining": "Outliers that each round left",
    "excess": "Excess norm that each round left",
    "change": "What each round changes",
}
MARKERS = ("o", "s", "^", "D", "v", "P")  # of the rounds


def curves_of_rounds(facts: Calibration) -> dict[str, list[Effect]]:
    """{name of a round: the effects that it measured, by number of neurons}."""
    return {
        f"round {each.round}": sorted(each.curve, key=lambda effect: effect.neurons)
        for each in facts.rounds
        if each.curve
    }


def _plot_rounds(axis: Axes, *, curves: Mapping[str, Sequence[Effect]], name: str) -> None:
    """Plot one attribute of `Effect` over the number of neurons, with a curve for each round."""
    colours = itertools.cycle((BEFORE, AFTER, THIRD, FOURTH))
    for (label, points), colour, marker in zip(curves.items(), colours, itertools.cycle(MARKERS), strict=False):
        neurons, values = [point.neurons for point in points], [getattr(point, name) for point in points]
        axis.plot(neurons, values, color=colour, marker=marker, markersize=4, label=label)
    ylabel = "1 - cosine similarity" if name == "change" else "fraction of before"
    axis.set(xlabel="neurons of the round", ylabel=ylabel)
    axis.set_ylim(bottom=0)
    if min(points[0].neurons for points in curves.values()) > 0:
        axis.set_xscale("log")
        label_plainly(axis.xaxis)
    axis.legend()


def _rounds_in_words(curves: Mapping[str, Sequence[Effect]], name: str) -> str:
    sentences = [
        f"{label}, {getattr(points[0], name):.2g} at {points[0].neurons} and {getattr(points[-1], name):.2g} at "
        f"{points[-1].neurons} neurons"
        for label, points in curves.items()
    ]
    return f"{'; '.join(sentences).capitalize()}."
