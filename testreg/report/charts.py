"""Charts: as figures for papers, and as SVG for a page."""

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

NORMS, NORM = "Norms after each block", "token norm (mean over images)"  # title and axis of that chart
THIRD, FOURTH = "#009e73", "#cc79a7"
INK, PAPER, GRID = "#1f2328", "#ffffff", "#d5dae0"
CSS = {
    INK: "currentColor",
    PAPER: "var(--page)",
    GRID: "var(--grid)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
}  # what the colours are in a page, which is light or dark


@dataclass(frozen=True)
class Chart:
    """A chart, how it is plotted, and what it shows in words for those who do not see it."""

    title: str
    words: str
    plot: Callable[[Axes], None]


@dataclass(frozen=True)
class Svg:
    """A chart as a part of a page."""

    id: str
    title: str
    words: str
    view_box: str
    markup: str
    """What is inside the <svg> element; matplotlib has escaped all text in it."""


@dataclass(frozen=True)
class Line:
    """One value after each block, for `per_block`."""

    values: Sequence[float]
    colour: str
    label: str | None = None
    """None for a line that has its label from another one."""
    kind: Literal["largest", "median", "prefix", "other"] = "largest"


_STYLES: Mapping[str, Mapping[str, Any]] = {
    "largest": {"marker": "o", "markersize": 4},
    "median": {"linestyle": "--", "linewidth": 1.2},
    "prefix": {"linestyle": ":", "linewidth": 1.2},
    "other": {"marker": "s", "markersize": 4, "linestyle": ":"},
}


def per_block(lines: Sequence[Line], ylabel: str, *, log: bool = False) -> Callable[[Axes], None]:
    """Plots what is measured after each block, on a logarithmic axis or on one that begins with 0."""

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
        drawn = Figure(figsize=(4.5 * len(charts), 3.5), layout="constrained")
        for axis, chart in zip(drawn.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            axis.set_axisbelow(True)
            axis.set_title(chart.title)
            chart.plot(axis)
    return drawn


def svg(chart: Chart) -> Svg:
    """The chart with text that stays text, in the colours of the page."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw([chart]).savefig(target, format="svg", transparent=True, metadata=metadata)
    document = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', target.getvalue(), re.DOTALL)
    assert document is not None
    view_box, markup = document.groups()
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)  # figure_1, axes_1: every chart has these
    for colour, variable in CSS.items():
        markup = markup.replace(colour, variable)
    name = re.sub(r"\W+", "-", chart.title.lower())
    return Svg(f"chart-{name}", chart.title, chart.words, view_box, markup)


# Axes -----------------------------------------------------------------------------------------------------------------


def label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis 1, 2, 5, 10, ...: powers of 10 say little where there are only a few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
