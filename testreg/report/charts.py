"""Draws charts with matplotlib: as figures for papers, and as SVG for HTML pages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from testreg.report.map_figures import AFTER, BEFORE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NORMS, NORM = "Norms after each block", "token norm (mean over images)"  # title and y axis of the chart of norms
THIRD, FOURTH = "#009e73", "#cc79a7"  # colours of curves, after `BEFORE` and `AFTER`
INK, PAPER, GRID = "#1f2328", "#ffffff", "#d5dae0"  # colours of text, background and grid
CSS = {
    INK: "currentColor",
    PAPER: "var(--page)",
    GRID: "var(--grid)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
}
"""{colour: the CSS that replaces it in a page}, since a page may be light or dark."""


@dataclass(frozen=True)
class Chart:
    """A chart."""

    title: str
    words: str
    """What the chart shows, in words, for people who do not see it."""
    plot: Callable[[Axes], None]
    """Plots the chart on matplotlib's axes."""


@dataclass(frozen=True)
class Svg:
    """A chart as SVG, to be put into a page."""

    id: str
    title: str
    words: str
    """What the chart shows, in words."""
    view_box: str
    markup: str
    """The content of the <svg> element. Matplotlib has escaped all text in it."""


@dataclass(frozen=True)
class Line:
    """A line in a chart over the blocks."""

    values: Sequence[float]
    """The value after each block."""
    colour: str
    label: str | None = None
    """The line's name in the legend; None if another line of the same kind is named there."""
    kind: Literal["largest", "median", "prefix", "other"] = "largest"
    """What the values are, which decides the style of the line."""


_STYLES: Mapping[str, Mapping[str, Any]] = {
    "largest": {"marker": "o", "markersize": 4},
    "median": {"linestyle": "--", "linewidth": 1.2},
    "prefix": {"linestyle": ":", "linewidth": 1.2},
    "other": {"marker": "s", "markersize": 4, "linestyle": ":"},
}


def per_block(lines: Sequence[Line], ylabel: str, *, log: bool = False) -> Callable[[Axes], None]:
    """A function that plots lines over the blocks. The y axis begins with 0, unless it is logarithmic (`log`)."""

    def plot(axis: Axes) -> None:
        for line in lines:
            axis.plot(line.values, color=line.colour, label=line.label, **_STYLES[line.kind])
        axis.set(xlabel="block", ylabel=ylabel, yscale="log" if log else "linear")
        if log:
            label_plainly(axis.yaxis)
        else:
            axis.set_ylim(bottom=0)
        label_whole_numbers(axis.xaxis)
        axis.legend()

    return plot


def draw(charts: Sequence[Chart]) -> Figure:
    """A figure with the charts side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "font.size": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "legend.edgecolor": "none",
        "legend.facecolor": PAPER,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.5 * len(charts), 3.5), layout="constrained")
        for axis, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            axis.set_axisbelow(True)
            axis.set_title(chart.title)
            chart.plot(axis)
    return figure


def svg(chart: Chart) -> Svg:
    """The chart as SVG, with its text as text (not as shapes), and in the colours of the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw([chart]).savefig(buffer, format="svg", transparent=True, metadata=metadata)
    document = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert document is not None
    view_box, markup = document.groups()
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)  # ids such as axes_1, which would not be unique in a page
    for colour, variable in CSS.items():
        markup = markup.replace(colour, variable)
    name = re.sub(r"\W+", "-", chart.title.lower())
    return Svg(f"chart-{name}", chart.title, chart.words, view_box, markup)


# Axes -----------------------------------------------------------------------------------------------------------------


def label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, ... if it spans few decades, where powers of 10 would be too few."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_whole_numbers(axis: Axis) -> None:
    """Label an axis with whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
