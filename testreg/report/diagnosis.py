"""The HTML page of a diagnosis: where outliers (patches of huge norm) are, how they look, and what to do about them."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from testreg.families import find_tower
from testreg.measure.diagnosis import ATTENTION_LEGEND, LEGEND, Diagnosis
from testreg.measure.outliers import OutlierRule, token_norms
from testreg.report.charts import FOURTH, NORM, NORMS, THIRD, Chart, Line, per_block, svg
from testreg.report.map_figures import BEFORE, Maps, feature_colours, measure_maps, panels
from testreg.report.measure import NUM_PHOTOGRAPHS, images_with_most
from testreg.report.rendering import Card, Row, render, rows_of, write_page
from testreg.report.values import Table, share, table_of, value_of

if TYPE_CHECKING:
    pass

NEXT = {
    "none": "There is nothing to fix: registers would change this model and make nothing better. Artefacts that you "
    "still see are not outlier tokens.",
    "movable": "Test-time registers move these outliers. Find the register neurons, and see what they do:",
    "fixed": "These artefacts stay at the same positions whatever the image, and no MLP neuron that the image makes "
    "fire writes them: a register does not fix them. Crop or interpolate these positions.",
    "repairable": "These artefacts stay at the same positions whatever the image: a register does not fix them, but "
    "testreg.repair(model) does, which puts the mean of their neighbours in place of the position embeddings that make "
    "them.",
    "left": "These outliers are what the registers of this patched model leave. More register neurons may move them: "
    "calibrate the model anew, without its patch.",
    "immovable": "MLP neurons do not make these outliers, so that no register moves them.",
}
"""{kind of a diagnosis, or "repairable" for fixed outliers that `testreg.repair` removes: what to do next}.

A register is an extra token onto which outliers are moved."""


def write_diagnosis_report(
    path: str | os.PathLike[str],
    diagnosis: Diagnosis,
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    *,
    command: str | None = None,
    rule: OutlierRule | None = None,
    batch_size: int = 16,
) -> None:
    """Write the diagnosis of `model` as an HTML page.

    Args:
        path: the HTML file.
        images: preprocessed images of the diagnosis, (B, 3, h, w) or a list of (3, h, w). Those with most outliers are
            shown, of those that have the size of the first image.
        command: the command line that made the diagnosis, to be shown.
        rule: decides which patches are outliers.
        batch_size: how many images are run at once.

    Raises:
        ValueError: there is no image.
    """
    if not len(images):
        raise ValueError("the page of a diagnosis shows images: give one at least")
    same_size = [image for image in images if image.shape == images[0].shape]
    block = diagnosis.outliers.block if diagnosis.outliers else len(diagnosis.blocks) - 1
    photographs, maps = _measured(diagnosis, model, torch.stack(same_size), block, rule or OutlierRule(), batch_size)
    write_page(path, page(diagnosis, photographs, maps, block, command))


def _measured(
    diagnosis: Diagnosis, model: nn.Module, images: Tensor, block: int, rule: OutlierRule, batch_size: int
) -> tuple[Tensor, Maps]:
    """The images with most outliers after `block`, and maps of them."""
    tower = find_tower(model)
    with tower.evaluating():
        norms = torch.cat(
            [token_norms(tower, batch)[block, :, tower.patches(batch)] for batch in images.split(batch_size)]
        )
        photographs = images[images_with_most((norms > rule.limit(norms)).sum(1).cpu(), NUM_PHOTOGRAPHS)]
        observable = diagnosis.blocks[-1].outlier_attention is not None
        maps, _ = measure_maps(tower, photographs, block, attention=observable)
    return photographs, maps


def page(diagnosis: Diagnosis, photographs: Tensor, maps: Maps, block: int, command: str | None = None) -> str:
    """The diagnosis as HTML."""
    return render(
        "diagnosis.html",
        name=str(diagnosis.model["name"]),
        headline=_headline(diagnosis),
        sample=f"Measured on {diagnosis.images} image{'s' * (diagnosis.images != 1)} "
        f"at {value_of(diagnosis.image_size)}" + (", the model being patched." if diagnosis.patched else "."),
        next=_next(diagnosis),
        calibrate=shlex.join(
            ["testreg", "calibrate", str(diagnosis.model["name"]), "--images", "IMAGES", "-o", "neurons.json"]
        )
        if diagnosis.kind == "movable"
        else None,
        cards=_cards(diagnosis, block),
        block=block,
        with_attention=maps.attention is not None,
        rows=_rows(photographs, maps),
        notes=diagnosis.notes,
        rule=diagnosis.rule,
        charts=[svg(chart) for chart in charts_of(diagnosis)],
        stream=_stream_table(diagnosis),
        attention=_attention_table(diagnosis),
        legend=LEGEND + ATTENTION_LEGEND,
        command=command,
        facts=_facts(diagnosis),
    )


def _next(diagnosis: Diagnosis) -> str:
    if diagnosis.patched and diagnosis.kind == "none":
        return "The registers do their work."
    is_repairable = diagnosis.outliers is not None and diagnosis.outliers.is_repairable
    return NEXT["repairable" if is_repairable else diagnosis.kind]


def _headline(diagnosis: Diagnosis) -> str:
    """The verdict as a headline, without line breaks between numbers and %."""
    return (diagnosis.verdict[:1].upper() + diagnosis.verdict[1:]).replace(" %", "\N{NO-BREAK SPACE}%")


def _cards(diagnosis: Diagnosis, block: int) -> list[Card]:
    """The most important figures, which the page shows in large print."""
    after, where = diagnosis.blocks[block].after_mlp, f"after block {block}"
    cards = [
        Card("Outlier patches", share(after.outlier_fraction), where),
        Card("Largest norm / median norm", f"{after.max_over_median:.1f}", f"{where}, mean over the images"),
    ]
    attention = [each.outlier_attention for each in diagnosis.blocks if each.outlier_attention is not None]
    if attention:
        cards.append(
            Card(
                "Attention to outliers",
                share(max(attention)),
                f"at most, in block {_block_of_most_attention(diagnosis)}",
            )
        )
    return cards


def _block_of_most_attention(diagnosis: Diagnosis) -> int:
    """The block in which outliers get the largest share of the attention."""
    return max(range(len(diagnosis.blocks)), key=lambda i: diagnosis.blocks[i].outlier_attention or 0.0)


def _rows(photographs: Tensor, maps: Maps) -> list[Row]:
    """The photographs and their maps. There is no before and after, since a diagnosis adds no registers."""
    colours = feature_colours(maps, maps)
    made = [panels(image, i, maps, maps, colours) for i, image in enumerate(photographs)]
    return rows_of([[panel for panel in row if panel.side != "after"] for row in made], with_sides=False)


def _facts(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """How the diagnosis was made, as (name, value)."""
    facts: dict[str, Any] = {
        "images": diagnosis.images,
        "unreadable images": diagnosis.unreadable_images,
        "image size": diagnosis.image_size,
        "rule": diagnosis.rule,
        "patches whose attention is measured": diagnosis.attention_queries,
        **{
            key.replace("_", " "): diagnosis.model.get(key)
            for key in ("depth", "mlp_width", "activation", "fingerprint")
        },
    }
    return [(key, value_of(value)) for key, value in facts.items() if value is not None]


# Charts ---------------------------------------------------------------------------------------------------------------


def charts_of(diagnosis: Diagnosis) -> list[Chart]:
    """The charts of the page: norms and outliers after each block."""
    return [
        Chart(NORMS, _norms_in_words(diagnosis), per_block(_norm_lines(diagnosis), NORM, log=True)),
        Chart("Outliers after each block", _outliers_in_words(diagnosis), per_block(_outlier_lines(diagnosis), "%")),
    ]


def _norms(diagnosis: Diagnosis) -> tuple[list[float], list[float]]:
    """The largest and the median norm of patches after each block. The largest is the mean ratio times the median."""
    after = [block.after_mlp for block in diagnosis.blocks]
    return [each.max_over_median * each.median_norm for each in after], [each.median_norm for each in after]


def _norm_lines(diagnosis: Diagnosis) -> list[Line]:
    """The largest and the median norm of patches after each block, and the norms of prefix tokens."""
    largest, median = _norms(diagnosis)
    after = [block.after_mlp for block in diagnosis.blocks]
    prefix = [
        Line(
            [each.prefix_ratio[token] * each.median_norm for each in after],
            THIRD,
            "prefix tokens" if token == 0 else None,
            "prefix",
        )
        for token in range(len(after[0].prefix_ratio))
    ]
    return [Line(largest, BEFORE, "largest patch"), Line(median, BEFORE, "median patch", "median"), *prefix]


def _norms_in_words(diagnosis: Diagnosis) -> str:
    """The chart of norms in words."""
    largest, median = _norms(diagnosis)
    block = largest.index(max(largest))
    peak = f"The largest patch norm peaks at {largest[block]:.3g} after block {block}"
    return f"{peak}, where the median is {median[block]:.3g}."


def _outlier_lines(diagnosis: Diagnosis) -> list[Line]:
    """The share of outliers after each block, and the share of attention that they get."""
    lines = [
        Line([100 * block.after_mlp.outlier_fraction for block in diagnosis.blocks], BEFORE, "share of the patches")
    ]
    attention = [block.outlier_attention for block in diagnosis.blocks]
    if any(each is not None for each in attention):
        shares = [math.nan if each is None else 100 * each for each in attention]
        lines.append(Line(shares, FOURTH, "attention that they draw", "other"))
    return lines


def _outliers_in_words(diagnosis: Diagnosis) -> str:
    """The chart of outliers in words."""
    fractions = [block.after_mlp.outlier_fraction for block in diagnosis.blocks]
    if not any(fractions):
        return "There are none after any block."
    return f"At most {share(max(fractions))} of the patches, after block {fractions.index(max(fractions))}."


def _stream_table(diagnosis: Diagnosis) -> Table:
    """A table with a row for each block: norms, outliers and similarities of the residual stream."""
    header = (
        *("block", "median norm", "99 % / median", "max / median", "prefix / median", "kurtosis"),
        *("outliers after attention, %", "outliers after MLP, %", "cosine of normal patches", "of outliers"),
    )
    rows = []
    for i, block in enumerate(diagnosis.blocks):
        after, before = block.after_mlp, block.after_attention
        rows.append(
            (
                *(i, after.median_norm, after.quantiles[-1], after.max_over_median),
                *(max(after.prefix_ratio, default=None), after.kurtosis),
                None if before is None else 100 * before.outlier_fraction,
                *(100 * after.outlier_fraction, after.normal_cosine, after.outlier_cosine),
            )
        )
    return table_of(header, rows)


def _attention_table(diagnosis: Diagnosis) -> Table | None:
    """A table with a row for each block: attention to prefix tokens and outliers; None if it was not measured."""
    if all(block.heads is None for block in diagnosis.blocks):
        return None
    header = (
        *("block", "attention to prefix tokens, %", "to outliers, %", "in the head with most, %", "which"),
        *("column ratio", "value of outliers / median", "rank of what is taken from them"),
    )
    rows: list[tuple[float | None, ...]] = []
    for i, block in enumerate(diagnosis.blocks):
        shares = [head.outlier_attention for head in block.heads or ()]
        if not shares or block.outlier_attention is None:
            rows.append((i, *[None] * (len(header) - 1)))
            continue
        to_prefix = 100 * sum(block.prefix_attention or ())
        most = max(shares)
        rows.append(
            (
                *(i, to_prefix, 100 * block.outlier_attention, 100 * most, shares.index(most) if most else None),
                *(block.column_ratio, block.value_ratio, block.broadcast_rank),
            )
        )
    return table_of(header, rows)
