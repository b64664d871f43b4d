"""The report of a calibration: an HTML page that needs no other file, and its pictures as PNG for papers.

This module collects the data; all HTML is in the templates calibration.html and base.html, which escape the data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from testreg.calibration.split import MIN_VERIFYING
from testreg.files import replacing
from testreg.measure.diagnosis import positions_in_words
from testreg.measure.outliers import OutlierRule
from testreg.neurons import Neuron, RegisterNeurons
from testreg.records.calibration import Effect
from testreg.report.calibration_charts import charts_of, tables_of
from testreg.report.charts import draw, svg
from testreg.report.map_figures import feature_colours, figure, panels
from testreg.report.measure import Report, measure_report
from testreg.report.rendering import Card, render, rows_of, write_page
from testreg.report.usage import python_lines, shell_line
from testreg.report.values import Table, share, table_of, value_of, words_of

MAX_ADDED = 8  # so many of the neurons that a round added are named
LONG_TABLE = 20  # tables with more rows are folded

EFFECT_COLUMNS = {
    "neurons": "neurons",
    "num_registers": "registers",
    "remaining": "outliers left",
    "excess": "excess norm left",
    "sink": "attention to former outliers / others",
    "hottest": "share of the hottest patch",
    "hotter": "images that got hotter",
    "unlike": "unlike neighbours, of before",
    "change_pooled": "change, pooled",
    "change_patches": "change, patches",
    "agreement": "head agrees",
}
"""{attribute of `Effect`, i.e. of what a set of neurons does: the title of its column}."""
SHOWN_ELSEWHERE = {
    "curve",
    "rounds",
    "chosen",
    "registers",
    "dropped",
    "ignored",
    "verified_at",
    "stability",
    "versions",
}
"""Attributes of the calibration that other parts of the page show, so that its list of facts leaves them out."""


def write_report(
    path: str | os.PathLike[str] | None,
    model: nn.Module,
    neurons: RegisterNeurons,
    images: Tensor | Sequence[Tensor],
    *,
    command: str | None = None,
    file: str | None = None,
    figures: str | os.PathLike[str] | None = None,
    rule: OutlierRule | None = None,
    batch_size: int = 16,
) -> None:
    """Measure what `neurons` do to `model`, and write it as an HTML page and as pictures.

    Args:
        path: the HTML file; None for no page.
        model: a model that is not patched. It is not changed.
        images: preprocessed images of one size, (B, 3, h, w) or a list of (3, h, w). All are measured, a few are shown.
        command: the command line that made the neurons, to be shown.
        file: the file of the neurons, for the lines of code that use it; None for the file that they were read from.
        figures: a folder for norms.png, histograms.png, maps.png; and curve.png and rounds.png, if the calibration has
            a curve, or curves of several rounds.
        rule: decides which patches are outliers.
        batch_size: how many images are run at once.

    Raises:
        ValueError: the neurons or the images do not fit the model.
        RuntimeError: the model is patched.
    """
    report = measure_report(model, neurons, images, rule=rule, batch_size=batch_size)
    if path is not None:
        write_page(path, page(report, command, file))
    if figures is not None:
        _save_figures(report, Path(figures))


def _save_figures(report: Report, folder: Path) -> None:
    """Write the pictures of the report as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: draw(charts) for name, charts in charts_of(report).items()}
    title = f"{report.model['name']}, norms after block {report.block}"
    pictures["maps"] = figure(report.photographs, report.maps_before, report.maps_after, title)
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as temporary:
            picture.savefig(temporary, format="png", dpi=300)


def page(report: Report, command: str | None = None, file: str | None = None) -> str:
    """The report as HTML."""
    name = str(report.model["name"])
    neurons = file or report.neurons.source or "neurons.json"
    return render(
        "calibration.html",
        name=name,
        headline=report.headline,
        verdict_before=report.before.verdict,
        verdict_after=report.after.verdict,
        notices=_notices(report),
        cards=_cards(report),
        sample=_sample(report),
        block=report.block,
        maps=_maps(report),
        notes=report.before.notes,
        rule=report.before.rule,
        charts={name: [svg(chart) for chart in group] for name, group in charts_of(report).items()},
        tables=tables_of(report),
        python=python_lines(name, neurons),
        shell=shell_line(name, neurons),
        trade_off=_trade_off(report),
        rounds=_rounds(report),
        neurons=_neurons(report),
        command=command,
        facts=_facts(report),
    )


def _notices(report: Report) -> list[str]:
    """Warnings that the page shows above the figures."""
    notices = []
    if report.neurons.provenance.get("synthetic") or "synthetic" in str(report.model["name"]).lower():
        notices.append("A synthetic model: it shows the mechanism, not what patching does for a trained one.")
    if report.model["name"] == "demo":
        notices.append("A planted model: it was trained around outliers that were put there to be found.")
    if report.ignored:
        notices.append(
            f"Artefacts at the fixed positions {positions_in_words(report.ignored)} are not counted here, and stay: a "
            "register fixes nothing there. Maps and norms show them all the same."
        )
    if report.facts.target_met is False:
        notices.append("The calibration did not meet its target: see the trade-off.")
    elif report.facts.target_met and not report.neurons.verified:
        notices.append(
            f"Not verified: that takes clean maps on {MIN_VERIFYING} held-out images that had no part in the choice."
        )
    if report.agreement is not None and report.head_disagrees:
        notices.append(f"The head gives {share(1 - report.agreement)} of the held-out images another class.")
    return notices


def _cards(report: Report) -> list[Card]:
    """The most important figures, which the page shows in large print."""
    where = f"after block {report.block}"
    outliers, outliers_after = map(share, report.outliers)
    ratio, ratio_after = (
        f"{side.blocks[report.block].after_mlp.max_over_median:.1f}" for side in (report.before, report.after)
    )
    blocks = list(report.chosen.by_block())
    in_blocks = f"in block {blocks[0]}" if len(blocks) == 1 else f"in {len(blocks)} blocks"
    total = report.model["depth"] * report.model["mlp_width"]
    cards = [
        Card("Outlier patches", outliers, where, outliers_after),
        Card("Largest norm / median norm", ratio, f"{where}, mean over the images", ratio_after),
        Card("Register neurons", str(len(report.chosen.ranking)), f"{in_blocks}, of {total:,} MLP neurons"),
        Card("Registers", str(report.chosen.num_registers), "tokens, each with all of these neurons"),
    ]
    if (sink := report.worst_sink) is not None:
        cards.append(
            Card("Attention to former outliers", f"{sink[0]:.1f}", "times that to other patches", f"{sink[1]:.1f}")
        )
    if report.change is not None:
        cards.append(
            Card("Change of the pooled feature", f"{report.change:.2g}", "1 \N{MINUS SIGN} cosine similarity to before")
        )
    return cards


def _sample(report: Report) -> str:
    """Which images the figures were measured on, in words."""
    count = f"{report.before.images} image{'s' * (report.before.images != 1)}"
    if report.facts.held_out is None:
        return f"Before and after are measured on the {count} that this report was given."
    on_others = report.facts.curve and report.facts.verified_on_others is not False
    also = " How many of the ranked neurons to use was chosen on others still." if on_others else ""
    return f"Before and after are measured on {count} held out: the neurons were ranked without them.{also}"


def _maps(report: Report) -> dict[str, Any]:
    """The photographs with their maps, and which photographs they are."""
    before, after = report.maps_before, report.maps_after
    colours = feature_colours(before, after)
    rows = rows_of([panels(image, i, before, after, colours) for i, image in enumerate(report.photographs)])
    which = f"The {len(rows)} images with most outliers" if len(rows) < report.before.images else "All images"
    return {"which": which, "with_attention": before.attention is not None, "rows": rows}


def _trade_off(report: Report) -> dict[str, Any]:
    """Tables of what different numbers of neurons and registers do, which the choice was made by (each None if
    unknown), and whether the checks are on other images than the choice."""
    facts = report.facts
    points = [*facts.curve, *([facts.chosen] if facts.chosen is not None else ())] if facts.curve else []
    notes = [""] * len(facts.curve) + ["chosen"]
    on_others = facts.verified_on_others is not False
    return {
        "curve": _table_of_effects(points, [""], [[note] for note in notes[: len(points)]]),
        "registers": _table_of_effects(facts.registers),
        "checks": _table_of_effects(
            [check.effect for check in facts.verified_at],
            ["image size", "dtype", "images"],
            [[check.image_size, check.dtype, check.images] for check in facts.verified_at],
        ),
        "on_others": on_others,
    }


def _table_of_effects(
    effects: Sequence[Effect], header: Sequence[str] = (), first_cells: Sequence[Sequence[object]] | None = None
) -> Table | None:
    """A table with a row for each effect and a column for each figure that was measured; None without effects.

    Args:
        header: titles of further columns, which come first.
        first_cells: the cells of each row in these columns.
    """
    if not effects:
        return None
    names = [name for name in EFFECT_COLUMNS if any(getattr(effect, name) is not None for effect in effects)]
    rows = zip(first_cells or [()] * len(effects), effects, strict=True)
    return table_of(
        [*header, *(EFFECT_COLUMNS[name] for name in names)],
        [[*cells_before, *(getattr(effect, name) for name in names)] for cells_before, effect in rows],
    )


def _rounds(report: Report) -> Table | None:
    """A table of the neurons that each round of the calibration added, and what it left; None without rounds."""
    header = ("round", "neurons", "added (block, unit)", "outliers left", "excess norm left")
    rows = [
        (each.round, each.effect.neurons, _pairs(each.added), each.effect.remaining, each.effect.excess)
        for each in report.facts.rounds
    ]
    return table_of(header, rows) if rows else None


def _pairs(neurons: Sequence[Neuron]) -> str:
    """Neurons as text, each as (block, unit); only the first few if there are many."""
    more = f" and {len(neurons) - MAX_ADDED} more" if len(neurons) > MAX_ADDED else ""
    return " ".join(f"({block}, {unit})" for block, unit, _ in neurons[:MAX_ADDED]) + more


def _neurons(report: Report) -> dict[str, Any]:
    """The neurons that are used, and how stable their ranking is."""
    by_block = ", ".join(f"{len(units)} in block {block}" for block, units in report.chosen.by_block().items())
    stability = report.facts.stability
    overlap = None if stability is None else f"{share(stability.overlap)} of the best {stability.neurons}"
    ranking = [[i, *neuron] for i, neuron in enumerate(report.chosen.ranking, 1)]
    return {
        "by_block": by_block,
        "ranked": f"{len(report.neurons.ranking):,}",
        "ranking": table_of(["rank", "block", "unit", "score"], ranking),
        "is_long": len(ranking) > LONG_TABLE,
        "overlap": overlap,
        "dropped": table_of(["block", "unit", "score"], report.facts.dropped),
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    """How the neurons were made, as (name, value), so that it can be done again."""
    calibration = report.facts.to_json().items()
    facts = {words_of(key): value for key, value in calibration if key not in SHOWN_ELSEWHERE and value is not None}
    facts["fingerprint of the weights"] = report.model["fingerprint"]
    facts |= {f"provenance: {key}": value for key, value in report.neurons.provenance.items()}
    if report.facts.versions:
        facts["versions"] = [f"{package} {version}" for package, version in report.facts.versions.items()]
    return [(key, value_of(value)) for key, value in facts.items()]
