"""The diagnoses of several models on the same images, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from testreg.measure.diagnosis import Diagnosis

LONGEST = 40  # characters of a model's name: of a longer one, the end
_HEADS = (
    ("", "pixels"),
    ("outliers,", "% of patches"),
    ("largest /", "median norm"),
    ("after", "blocks"),
    ("strongest", "after"),
    ("attention,", "% to them"),
    ("their", "value"),
    ("prefix /", "median norm"),
)


def verdicts(diagnoses: Mapping[str, Diagnosis]) -> str:
    """The verdict of each model, by name, a line each."""
    width = max(len(_short(name)) for name in diagnoses)
    return "\n".join(f"{_short(name):<{width}}  {each.verdict}" for name, each in diagnoses.items())


def table(diagnoses: Mapping[str, Diagnosis]) -> str:
    """The figures of each model, by name, a line each.

    Outliers and norms are those after the block where outliers are strongest, or where norms differ most if there are
    none; attention and value are those of the block where outliers draw most; the prefix is the largest prefix token of
    any block.
    """
    rows = [_cells(each) for each in diagnoses.values()]
    columns = zip(_HEADS, zip(*rows, strict=True), strict=True)
    widths = [max(len(cell) for cell in (*head, *column)) for head, column in columns]
    first = max(len(_short(name)) for name in diagnoses)

    def line(name: str, cells: tuple[str, ...]) -> str:
        return f"{name:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    upper, lower = zip(*_HEADS, strict=True)
    lines = [line("", upper), line("model", lower)]
    return "\n".join([*lines, *(line(_short(name), cells) for name, cells in zip(diagnoses, rows, strict=True))])


def _cells(diagnosis: Diagnosis) -> tuple[str, ...]:
    after, outliers = [block.after_mlp for block in diagnosis.blocks], diagnosis.outliers
    shown = max(after, key=lambda each: each.max_over_median) if outliers is None else after[outliers.block]
    prefix = max((max(each.prefix_ratio, default=0.0) for each in after), default=0.0)
    sink = None if outliers is None else outliers.sink
    where = "-"
    if outliers is not None:
        where = f"{0 if outliers.first_block is None else outliers.first_block} to {outliers.last_block}"
    return (
        " x ".join(map(str, diagnosis.image_size)),
        f"{100 * shown.outlier_fraction:.1f}",
        f"{shown.max_over_median:.1f}",
        where,
        "-" if outliers is None else str(outliers.block),
        "-" if sink is None else f"{100 * sink.attention:.0f}",
        "-" if sink is None or sink.value_ratio is None else f"{sink.value_ratio:.2f}",
        f"{prefix:.1f}" if prefix else "-",
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
