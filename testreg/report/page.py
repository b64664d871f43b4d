"""The report of a calibration: one HTML page that needs no other file, and the same pictures as PNG for papers."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor, nn

from testreg.calibration.calibrate import MIN_VERIFYING
from testreg.files import replacing
from testreg.measure.diagnosis import named
from testreg.measure.outliers import OutlierRule
from testreg.neurons import RegisterNeurons
from testreg.report.charts import Chart, charts_of, draw, svg
from testreg.report.maps import Panel, feature_colours, figure, panels
from testreg.report.measure import AGREEMENT, Report, measure_report, numbers_in

PHOTOGRAPH_SIDE = 384  # pixels in the page; the maps have one for each patch
LONG_TABLE = 20  # rows that are shown without being asked for

MEASURED = {
    "neurons": "neurons",
    "remaining": "outliers left",
    "excess": "excess norm left",
    "change_pooled": "change, pooled",
    "change_patches": "change, patches",
    "agreement": "head agrees",
}  # of a point of the trade-off, or of a check at another size
ELSEWHERE = {"curve", "chosen", "dropped", "ignored", "verified_at", "stability", "versions"}  # these have a place


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
    report = measure_report(model, neurons, images, rule=rule, batch_size=batch_size)
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
    title = f"{report.model['name']}, norms after block {report.block}"
    pictures["maps"] = figure(report.photographs, report.maps_before, report.maps_after, title)
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as temporary:
            picture.savefig(temporary, format="png", dpi=300)


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
    where = f"after block {report.block}"
    ratios = [f"{side.blocks[report.block].after_mlp.max_over_median:.1f}" for side in (report.before, report.after)]
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
        f"{which}. Norms are those after block {report.block}, on one logarithmic colour scale for before and after.",
        "Features are the first three principal components after the last block, in the same colours before and after.",
    ]
    if report.maps_before.attention is not None:
        text.insert(1, "Attention is what the CLS token gives (without one, all patches) in the last block.")
    maps = ("\n".join(_panel(panel, i) for panel in row) for i, row in enumerate(rows, 1))
    return _section("Maps", f"<p>{' '.join(text)}</p>", *(f'<div class="maps">\n{row}\n</div>' for row in maps))


def _panel(panel: Panel, index: int) -> str:
    name = f"{panel.kind} {panel.side}".strip()
    value = "" if panel.largest is None else f"<br>max {panel.largest:.3g}"
    height, width = panel.pixels.shape[:2]
    return (
        f'<figure class="{panel.kind}"><img src="{_data_uri(panel)}" width="{width}" height="{height}" '
        f'alt="Image {index}: {name}">'
        f'<figcaption><span class="{panel.side}">{name}</span>{value}</figcaption></figure>'
    )


def _data_uri(panel: Panel) -> str:
    from PIL import Image

    picture = Image.fromarray((panel.pixels * 255).round().byte().numpy())
    target = io.BytesIO()
    kind = "jpeg" if panel.kind == "photograph" else "png"
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
    drawn = svg(chart, report)
    label = escape(f"{drawn.title}. {drawn.words}")
    return f'<figure><svg role="img" aria-label="{label}" viewBox="{drawn.view_box}">{drawn.markup}</svg></figure>'


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
    return [key for key in MEASURED if any(key in numbers_in(point) for point in points)]


def _measured(point: Mapping[str, Any], keys: Sequence[str]) -> list[float | None]:
    known = numbers_in(point)
    return [known.get(key) for key in keys]


def _neuron_section(report: Report) -> str:
    rows = [[i, *neuron] for i, neuron in enumerate(report.chosen.ranking, 1)]
    table = _table(["rank", "block", "unit", "score"], rows)
    by_block = ", ".join(f"{len(units)} in block {layer}" for layer, units in report.chosen.by_block().items())
    parts = [f"<p>{by_block}; {len(report.neurons.ranking):,} were ranked.</p>"]
    parts.append(_folded(f"All {len(rows)}", table) if len(rows) > LONG_TABLE else table)
    stability = numbers_in(report.facts.get("stability") or {})
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
