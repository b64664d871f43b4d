"""The arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from testreg.io.names import CLIP_KINDS, KINDS, NAMES

Model = Annotated[str, typer.Argument(metavar="MODEL", help=NAMES, show_default=False)]
Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"one or several: {NAMES}", show_default=False)]
_SIZE = "side of the input in pixels (default: the model's own)"
ImageSize = Annotated[int | None, typer.Option(help=_SIZE)]
ImageSizes = Annotated[list[int] | None, typer.Option("--image-size", help=f"{_SIZE}; may be repeated")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (default: the best there is)")]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="what the model computes in (default: as its library loads it)"),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="run the Python code that a model's repository or folder brings along (default: never)",
    ),
]

Images = Annotated[
    str,
    typer.Option("--images", metavar="IMAGES", help=f"{KINDS}; for a model of videos {CLIP_KINDS}", show_default=False),
]
NumImages = Annotated[int, typer.Option(help="at most so many")]
BatchSize = Annotated[int, typer.Option(help="images that are run at once")]
Workers = Annotated[int, typer.Option(help="processes that decode images")]
Seed = Annotated[int, typer.Option(help="of the order of the images")]
Threshold = Annotated[float | None, typer.Option(help="norm of an outlier (default: median + 5 robust sigma)")]
Rule = Annotated[
    Literal["robust", "mixture"],
    typer.Option(help="what an outlier is; mixture: of the upper of two components of an image's log norms"),
]

Neurons = Annotated[
    str | None,
    typer.Option(help="neuron JSON, a name from `testreg list`, or hf:ORG/NAME of the Hub (default: the bundled list)"),
]
TopK = Annotated[int | None, typer.Option(help="use the best so many (default: as the list recommends)")]
NumRegisters = Annotated[
    int | None, typer.Option(help="extra tokens, each with all of the neurons (default: as the list recommends)")
]
SplitNeurons = Annotated[
    bool, typer.Option("--split-neurons", help="share the neurons out among the registers (paper A.5)")
]
MaxOver = Annotated[Literal["neuron", "layer"], typer.Option("--max-over", help="layer: the released code's")]
Zero = Annotated[Literal["patches", "all"], typer.Option("--zero", help="all: prefix tokens too")]

ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="HTML", help="write a page that shows what was found")
]
