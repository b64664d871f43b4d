"""The report of a calibration: one HTML page that needs no other file, and the same pictures as PNG for papers.

`look` measures a model without and with its registers; the charts and the page are drawn from what it found, and from
what the neurons' `calibration` says. Any entry of that may be missing: a list may come from elsewhere. All is done by
the process that asks for it: of several (torch.distributed), the others need not know.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor, nn

from testreg.calibration.view import MIN_VERIFYING
from testreg.families import Tower, find_tower
from testreg.files import replacing
from testreg.measure.conclusion import conclude
from testreg.measure.diagnosis import Diagnosis, named
from testreg.measure.observation import observe
from testreg.measure.outliers import OutlierRule, ignored_patches, token_norms
from testreg.neurons import RegisterNeurons, describe_model
from testreg.register import disabled, patch, registers, unpatch
from testreg.report.figures import CSS, Chart, Maps, Panel, charts_of, compare, draw, feature_colours, figure, panels

NUM_PHOTOGRAPHS = 5
PHOTOGRAPH_SIDE = 384  # pixels in the page; the maps have one for each patch
LONG_TABLE = 20  # rows that are shown without being asked for
AGREEMENT = 0.99  # of the head with itself: what is less is said at the top

MEASURED = {
    "neurons": "neurons",
    "remaining": "outliers left",
    "excess": "excess norm left",
    "change_pooled": "change, pooled",
    "change_patches": "change, patches",
    "agreement": "head agrees",
}  # of a point of the trade-off, or of a check at another size
ELSEWHERE = {"curve", "chosen", "dropped", "ignored", "verified_at", "stability", "versions"}  # these have a place


@dataclass(frozen=True)
class Norms:
    """Norms of a tower's patches; L blocks, B images."""

    largest: Tensor
    """(L,), of the image's patches; mean over the images."""
    median: Tensor
    """(L,)"""
    registers: Tensor | None
    """(L,), mean; None without registers."""
    ratios: dict[int, Tensor]
    """(B, N) after some of the blocks: over the median norm of the image's patches."""
    outliers: Tensor
    """(B,), how many patches are outliers after the first of these blocks."""


@dataclass(frozen=True)
class Report:
    """A model without and with its registers."""

    neurons: RegisterNeurons
    model: Mapping[str, Any]
    layer: int
    """The block after which outliers stand out most."""
    ignored: list[tuple[int, int]]
    """Rows and columns of patches that do not count as outliers, since they are fixed: calibration left them out."""
    before: Diagnosis
    after: Diagnosis
    norms_before: Norms
    norms_after: Norms
    photographs: Tensor
    """(b, 3, h, w), the images with most outliers."""
    maps_before: Maps
    maps_after: Maps

    @property
    def chosen(self) -> RegisterNeurons:
        return self.neurons.truncate()

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.neurons.calibration

    @property
    def outliers(self) -> tuple[float, float]:
        """Fraction of the patches that are outliers after the block `layer`, before and after."""
        before, after = (side.blocks[self.layer].after_mlp.outlier_fraction for side in (self.before, self.after))
        return before, after

    @property
    def curve(self) -> list[dict[str, float]]:
        """Points of the trade-off between what is left of the outliers and what else changes."""
        points = [_numbers_in(point) for point in self.facts.get("curve") or ()]
        return [point for point in points if "neurons" in point]

    @property
    def choice(self) -> dict[str, float]:
        """The point that was chosen; empty if unknown."""
        return _numbers_in(self.facts.get("chosen") or {})

    @property
    def checks(self) -> list[dict[str, float]]:
        """What was measured on images that had no part in the choice, at each image size."""
        return [_numbers_in(check) for check in self.facts.get("verified_at") or ()]

    @property
    def limits(self) -> dict[str, float]:
        """What the choice had to meet: target, max_change; as far as known."""
        return _numbers_in({key: self.facts.get(key) for key in ("target", "max_change")})

    @property
    def agreement(self) -> float | None:
        """The lowest share of images to which the user's head gives the same class as before; None if unknown."""
        return min((check["agreement"] for check in self.checks if "agreement" in check), default=None)

    @property
    def headline(self) -> str:
        """What the registers did, in one line."""
        before, after = self.outliers
        count = f"{len(self.chosen.ranking)} register neuron{'s' * (len(self.chosen.ranking) != 1)}"
        if self.before.kind == "none":
            return "No outliers: nothing to fix"
        if after >= before:
            return f"{count}: the outliers stay"
        share = math.floor(1000 * (1 - after / before)) / 10  # never rounded up to 100
        return f"{count}: {'all' if after == 0 else f'{share:g} %'} of the outlier patches are gone"


def _numbers_in(entry: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}


def write_report(
    path: str | os.PathLike[str] | None,
    model: nn.Module,
    neurons: RegisterNeurons,
    images: Tensor | Sequence[Tensor],
    *,
    command: str | None = None,
    figures: str | os.PathLike[str] | None = None,
    rule: OutlierRule | None = None,
    batch_size: int = 16,
) -> None:
    """Write what `neurons` do to `model`, as a page and as pictures.

    Args:
        path: the HTML file; None if only the pictures are wanted.
        model: unpatched, and left so.
        images: (B, 3, h, w), or tensors (3, h, w) of one size, preprocessed. All are measured, a few of them shown.
        command: the command line that made the neurons.
        figures: a folder for norms.png, histograms.png, maps.png, and curve.png if the calibration has a curve.
        rule: which patches are outliers.
        batch_size: images that are run at once.

    Raises:
        ValueError: the neurons or the images do not fit the model.
        RuntimeError: the model is patched.
    """
    report = look(model, neurons, images, rule=rule, batch_size=batch_size)
    if path is not None:
        text = page(report, command)
        with replacing(path) as temporary:
            # Names of folders may be no text, and hold bytes that UTF-8 does not have.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    if figures is not None:
        _save_figures(report, Path(figures))


def _save_figures(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: draw(charts, report) for name, charts in charts_of(report).items()}
    title = f"{report.model['name']}, norms after block {report.layer}"
    pictures["maps"] = figure(report.photographs, report.maps_before, report.maps_after, title)
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as temporary:
            picture.savefig(temporary, format="png", dpi=300)


# Measuring ------------------------------------------------------------------------------------------------------------


def look(
    model: nn.Module,
    neurons: RegisterNeurons,
    images: Tensor | Sequence[Tensor],
    *,
    rule: OutlierRule | None = None,
    batch_size: int = 16,
) -> Report:
    """Measure `model`, which is unpatched and left so, without and with the registers of `neurons`."""
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected image tensors (B, 3, h, w), one at least, got {tuple(images.shape)}")
    rule = rule or OutlierRule()
    tower, batches = find_tower(model), images.split(batch_size)
    patch(model, replace(neurons, verified=True))  # what they do is measured here: no warning
    try:
        with tower.evaluating():
            ignored = _ignored(neurons, tower.grid(images))
            with disabled(model):
                before = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
                before = replace(before, patched=False)
                layer = _most_outlying(before, neurons)
                norms_before = _norms(model, tower, batches, layer, rule, ignored)
            after = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
            norms_after = _norms(model, tower, batches, layer, rule, ignored)
            most = norms_before.outliers.argsort(descending=True, stable=True)[:NUM_PHOTOGRAPHS]
            photographs = images[most.sort().values]
            observable = before.blocks[-1].outlier_attention is not None
            maps_before, maps_after = compare(model, photographs, layer, attention=observable)
    finally:
        unpatch(model)
    return Report(
        neurons=neurons,
        model=describe_model(model, tower),
        layer=layer,
        ignored=ignored,
        before=before,
        after=after,
        norms_before=norms_before,
        norms_after=norms_after,
        photographs=photographs,
        maps_before=maps_before,
        maps_after=maps_after,
    )


def _most_outlying(before: Diagnosis, neurons: RegisterNeurons) -> int:
    """The block to look at: where the diagnosis finds most, else where calibration did, else the last."""
    last = len(before.blocks) - 1
    return before.outliers.block if before.outliers else int(neurons.calibration.get("detection_block", last))


def _ignored(neurons: RegisterNeurons, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The fixed positions that calibration left out at this size, as far as the list says any."""
    ignored: list[tuple[int, int]] = []
    entries = neurons.calibration.get("ignored")
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"grid": [rows, columns], "positions": [*positions]} if (rows, columns) == grid:
                ignored += [tuple(each) for each in positions if _is_pair(each)]
    return ignored


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, int) and each >= 0 for each in value)


def _norms(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Tensor],
    layer: int,
    rule: OutlierRule,
    ignored: Sequence[tuple[int, int]],
) -> Norms:
    """Of batches of images (b, 3, h, w)."""
    rows, columns = tower.grid(batches[0])
    largest, median, on_registers, kept = [], [], [], []
    for batch in batches:
        with registers(model) as seen:
            norms = token_norms(tower, batch)[..., tower.num_prefix : tower.num_prefix + rows * columns]  # (L, B, N)
        largest.append(norms.amax(-1))
        median.append(norms.median(-1).values)
        kept.append(norms[[layer, -1]])
        if seen:
            on_registers.append(torch.stack([each.float().norm(dim=-1).mean(-1) for each in seen]))  # (L, B)
    shown = torch.cat(kept, 1).cpu()  # (2, B, N)
    return Norms(
        largest=torch.cat(largest, 1).mean(1).cpu(),
        median=torch.cat(median, 1).mean(1).cpu(),
        registers=torch.cat(on_registers, 1).mean(1).cpu() if on_registers else None,
        ratios=dict(zip((layer, tower.depth - 1), shown / shown.median(-1, keepdim=True).values, strict=True)),
        outliers=((shown[0] > rule.limit(shown[0])) & ~ignored_patches(ignored, (rows, columns))).sum(1),
    )


# The page -------------------------------------------------------------------------------------------------------------


def page(report: Report, command: str | None = None) -> str:
    """The report as HTML. Whatever comes from outside is escaped."""
    rows = _panels(report)
    sections = [
        _map_section(rows, report),
        _norm_section(report),
        _curve_section(report),
        _neuron_section(report),
        _origin_section(report, command),
    ]
    template = Template(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        name=escape(str(report.model["name"])),
        columns=len(rows[0]),
        head=_head(report),
        sections="\n".join(filter(None, sections)),
    )


def _head(report: Report) -> str:
    """The verdict, and the figures that matter most."""
    lines = [f'<p class="verdict">{escape(report.headline)}</p>']
    for side, diagnosis in (("before", report.before), ("after", report.after)):
        lines.append(f'<p><strong class="{side}">{side.capitalize()}</strong>: {escape(diagnosis.verdict)}.</p>')
    if report.neurons.provenance.get("synthetic") or "synthetic" in str(report.model["name"]).lower():
        lines.append(_notice("A synthetic model: it shows the mechanism, not what patching does for a trained one."))
    if report.ignored:
        lines.append(
            _notice(
                f"Artefacts at the fixed positions {named(report.ignored)} are not counted here, and stay: a register "
                "fixes nothing there. Maps and norms show them all the same."
            )
        )
    if report.facts.get("target_met") is False:
        lines.append(_notice("The calibration did not meet its target: see the trade-off."))
    elif report.facts.get("target_met") and not report.neurons.verified:
        lines.append(
            _notice(f"Not verified: that takes {MIN_VERIFYING} held-out images that had no part in the choice.")
        )
    if report.agreement is not None and report.agreement < AGREEMENT:
        lines.append(_notice(f"The head gives {_percent(1 - report.agreement)} of the held-out images another class."))
    return "\n".join([*lines, _cards(report), f'<p class="quiet">{_sample(report)}</p>'])


def _notice(text: str) -> str:
    return f'<p class="notice">{text}</p>'


def _sample(report: Report) -> str:
    """Which images the figures are of."""
    count = f"{report.before.images} image{'s' * (report.before.images != 1)}"
    if report.facts.get("held_out") is None:
        return f"Before and after are measured on the {count} that this report was given."
    on_others = report.curve and report.facts.get("verified_on_others", True)
    also = " How many of the ranked neurons to use was chosen on others still." if on_others else ""
    return f"Before and after are measured on {count} held out: the neurons were ranked without them.{also}"


def _cards(report: Report) -> str:
    where = f"after block {report.layer}"
    ratios = [f"{side.blocks[report.layer].after_mlp.max_over_median:.1f}" for side in (report.before, report.after)]
    blocks = list(report.chosen.by_block())
    in_blocks = f"in block {blocks[0]}" if len(blocks) == 1 else f"in {len(blocks)} blocks"
    total = report.model["depth"] * report.model["mlp_width"]
    cards = [
        ("Outlier patches", _change(*map(_percent, report.outliers)), where),
        ("Largest norm / median norm", _change(*ratios), f"{where}, mean over the images"),
        ("Register neurons", str(len(report.chosen.ranking)), f"{in_blocks}, of {total:,} MLP neurons"),
    ]
    if changes := [check["change_pooled"] for check in report.checks if "change_pooled" in check]:
        note = "1 &minus; cosine similarity to before"
        cards.append(("Change of the pooled feature", f"{max(changes):.2g}", note))
    items = (f"<div><dt>{name}</dt><dd>{value} <small>{note}</small></dd></div>" for name, value, note in cards)
    return f'<dl class="numbers">{"".join(items)}</dl>'


def _change(before: str, after: str) -> str:
    return f'<span class="before">{before}</span> &rarr; <span class="after">{after}</span>'


def _panels(report: Report) -> list[list[Panel]]:
    """One row a photograph."""
    before, after = report.maps_before, report.maps_after
    colours = feature_colours(before, after)
    return [panels(image, i, before, after, colours) for i, image in enumerate(report.photographs)]


def _map_section(rows: Sequence[Sequence[Panel]], report: Report) -> str:
    which = f"The {len(rows)} images with most outliers" if len(rows) < report.before.images else "All images"
    text = [
        f"{which}. Norms are those after block {report.layer}, on one logarithmic colour scale for before and after.",
        "Features are the first three principal components after the last block, in the same colours before and after.",
    ]
    if report.maps_before.attention is not None:
        text.insert(1, "Attention is what the CLS token gives (without one, all patches) in the last block.")
    maps = ("\n".join(_panel(panel, i) for panel in row) for i, row in enumerate(rows, 1))
    return _section("Maps", f"<p>{' '.join(text)}</p>", *(f'<div class="maps">\n{row}\n</div>' for row in maps))


def _panel(panel: Panel, index: int) -> str:
    name = f"{panel.what} {panel.side}".strip()
    value = "" if panel.largest is None else f"<br>max {panel.largest:.3g}"
    height, width = panel.pixels.shape[:2]
    return (
        f'<figure class="{panel.what}"><img src="{_data_uri(panel)}" width="{width}" height="{height}" '
        f'alt="Image {index}: {name}">'
        f'<figcaption><span class="{panel.side}">{name}</span>{value}</figcaption></figure>'
    )


def _data_uri(panel: Panel) -> str:
    from PIL import Image

    picture = Image.fromarray((panel.pixels * 255).round().byte().numpy())
    target = io.BytesIO()
    kind = "jpeg" if panel.what == "photograph" else "png"
    if kind == "jpeg":
        picture.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    picture.save(target, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}"


def _norm_section(report: Report) -> str:
    charts = charts_of(report)
    return _section(
        "Token norms",
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in report.before.notes)}</ul>",
        _svgs(charts["norms"], report),
        f"<p>A patch is an outlier if its {escape(report.before.rule)}.</p>",
        _svgs(charts["histograms"], report),
    )


def _svgs(charts: Sequence[Chart], report: Report) -> str:
    return f'<div class="charts">{"".join(_svg(chart, report) for chart in charts)}</div>'


def _svg(chart: Chart, report: Report) -> str:
    """A chart as a part of the page, with text that is text, in the colours of the page."""
    from matplotlib import rc_context

    drawn, target = draw([chart], report), io.StringIO()
    title = drawn.axes[0].get_title(loc="left")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn.savefig(target, format="svg", transparent=True, metadata=metadata)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # figure_1, axes_1: every chart has these
    for colour, variable in CSS.items():
        text = text.replace(colour, variable)
    return f'<figure><svg role="img" aria-label="{escape(title)}"{text.removeprefix("<svg")}</figure>'


def _curve_section(report: Report) -> str:
    """How many neurons, and why so many."""
    parts = []
    if report.curve:
        points = [("", point) for point in report.facts["curve"]]
        if report.choice:
            points.append(("chosen", report.facts["chosen"]))
        keys = _keys([point for _, point in points])
        figures = _table(
            ["", *(MEASURED[key] for key in keys)], [[note, *_measured(point, keys)] for note, point in points]
        )
        parts += [_svgs(charts_of(report)["curve"], report), _folded("The figures", figures)]
    if verified := report.facts.get("verified_at"):
        made_with = ("image_size", "dtype", "images")
        keys = _keys(verified)
        rows = [[*(point.get(key) for key in made_with), *_measured(point, keys)] for point in verified]
        table = _table([*map(_words, made_with), *(MEASURED[key] for key in keys)], rows)
        on_others = report.facts.get("verified_on_others", True)
        title = "Verified on other images" if on_others else "Measured on the images of the choice"
        parts.append(f"<h3>{title}</h3>\n{table}")
    return _section("Trade-off", *parts) if parts else ""


def _keys(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was measured at any of the points: without a head, there is no agreement."""
    return [key for key in MEASURED if any(key in _numbers_in(point) for point in points)]


def _measured(point: Mapping[str, Any], keys: Sequence[str]) -> list[float | None]:
    known = _numbers_in(point)
    return [known.get(key) for key in keys]


def _neuron_section(report: Report) -> str:
    rows = [[i, *neuron] for i, neuron in enumerate(report.chosen.ranking, 1)]
    table = _table(["rank", "block", "unit", "score"], rows)
    by_block = ", ".join(f"{len(units)} in block {layer}" for layer, units in report.chosen.by_block().items())
    parts = [f"<p>{by_block}; {len(report.neurons.ranking):,} were ranked.</p>"]
    parts.append(_folded(f"All {len(rows)}", table) if len(rows) > LONG_TABLE else table)
    stability = _numbers_in(report.facts.get("stability") or {})
    if stability.keys() >= {"overlap", "neurons"}:
        overlap = f"{_percent(stability['overlap'])} of the best {stability['neurons']:g}"
        parts.append(f"<p>Ranked by either half of the images alone, {overlap} are the same.</p>")
    if dropped := report.facts.get("dropped"):
        parts.append(_folded(f"{len(dropped)} ranked, but left out", _table(["block", "unit", "score"], dropped)))
    return _section("The neurons", *parts)


def _origin_section(report: Report, command: str | None) -> str:
    """How to get there again."""
    facts = {_words(key): value for key, value in report.facts.items() if key not in ELSEWHERE and value is not None}
    facts["fingerprint of the weights"] = report.model["fingerprint"]
    facts |= {f"provenance: {key}": value for key, value in report.neurons.provenance.items()}
    if versions := report.facts.get("versions"):
        facts["versions"] = [f"{package} {version}" for package, version in versions.items()]
    items = "".join(f"<dt>{escape(key)}</dt><dd>{escape(_value(value))}</dd>" for key, value in facts.items())
    shown = [f"<pre><code>{escape(command)}</code></pre>"] if command else []
    return _section("How it was made", *shown, f'<dl class="facts">{items}</dl>')


def _section(title: str, *parts: str) -> str:
    content = "\n".join(parts)
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_value(value))}</td>' for value in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _value(value: object) -> str:
    """Anything that JSON holds, for a person."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        is_size = len(value) == 2 and all(isinstance(each, int) for each in value)
        return (" x " if is_size else ", ").join(map(_value, value))
    return str(value)


def _percent(value: float) -> str:
    return "&lt; 0.01 %" if 0 < value < 1e-4 else f"{100 * value:.3g} %"
