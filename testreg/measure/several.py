"""Text that compares the diagnoses of several models on the same images.

*Outliers* are patch tokens with huge norms; the *prefix tokens* are those in front of the patches, such as CLS.
"""

from __future__ import annotations

from collections.abc import Mapping

from testreg.measure.diagnosis import Diagnosis

LONGEST = 40  # how many characters of a model's name are shown; of a longer name, the end is shown
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
    """The verdicts as text, with a line for each model; `diagnoses` are given by the name of the model."""
    width = max(len(_short(name)) for name in diagnoses)
    return "\n".join(f"{_short(name):<{width}}  {each.verdict}" for name, each in diagnoses.items())


def table(diagnoses: Mapping[str, Diagnosis]) -> str:
    """The figures as a table, with a line for each model; `diagnoses` are given by the name of the model.

    The fraction of outliers and the largest norm are those after the block whose outliers stand out most, or, if there
    are no outliers, after the block whose largest norm is furthest above the median. Attention and value are those of
    the block in which outliers draw the most attention. The norm of the prefix is the largest of any prefix token after
    any block.
    """
    rows = [_cells(each) for each in diagnoses.values()]
    columns = zip(_HEADS, zip(*rows, strict=True), strict=True)
    widths = [max(len(cell) for cell in (*head, *column)) for head, column in columns]
    width_of_names = max(len(_short(name)) for name in diagnoses)

    def line(name: str, cells: tuple[str, ...]) -> str:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return f"{name:<{width_of_names}}  " + "  ".join(padded)

    upper, lower = zip(*_HEADS, strict=True)
    lines = [line("", upper), line("model", lower)]
    return "\n".join([*lines, *(line(_short(name), cells) for name, cells in zip(diagnoses, rows, strict=True))])


def _cells(diagnosis: Diagnosis) -> tuple[str, ...]:
    """The cells of a model's line, one for each column of `_HEADS`."""
    after, outliers = [block.after_mlp for block in diagnosis.blocks], diagnosis.outliers
    strongest = max(after, key=lambda each: each.max_over_median) if outliers is None else after[outliers.block]
    prefix_ratio = max((max(each.prefix_ratio, default=0.0) for each in after), default=0.0)
    sink = None if outliers is None else outliers.sink
    blocks_with_outliers = "-"
    if outliers is not None:
        blocks_with_outliers = f"{0 if outliers.first_block is None else outliers.first_block} to {outliers.last_block}"
    return (
        " x ".join(map(str, diagnosis.image_size)),
        f"{100 * strongest.outlier_fraction:.1f}",
        f"{strongest.max_over_median:.1f}",
        blocks_with_outliers,
        "-" if outliers is None else str(outliers.block),
        "-" if sink is None else f"{100 * sink.attention:.0f}",
        "-" if sink is None or sink.value_ratio is None else f"{sink.value_ratio:.2f}",
        f"{prefix_ratio:.1f}" if prefix_ratio else "-",
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"
