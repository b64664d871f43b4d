"""Arguments and options that several commands share, as annotations for typer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from testreg.calibration.options import MEANINGS
from testreg.io.names import CLIP_KINDS, KINDS, NAMES
from testreg.records import options

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
NumImages = Annotated[int, typer.Option(help=MEANINGS["num_images"])]
BatchSize = Annotated[int, typer.Option(help=MEANINGS["batch_size"])]
Workers = Annotated[int, typer.Option(help=MEANINGS["workers"])]
Seed = Annotated[int, typer.Option(help=MEANINGS["seed"])]
Threshold = Annotated[float | None, typer.Option(help=MEANINGS["threshold"])]
Rule = Annotated[Literal["robust", "mixture"], typer.Option(help=MEANINGS["rule"])]

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
MaxOver = Annotated[options.MaxOver, typer.Option("--max-over", help="layer: the released code's")]
Zero = Annotated[
    options.Zero | None,
    typer.Option(
        help="where moved neurons are zero: on patches, on all tokens, or on patches where they fire (default: as "
        "--start wants it)"
    ),
]
StartOption = Annotated[
    options.Start | None,
    typer.Option("--start", help="what registers hold at first: zeros or the mean patch (default: as listed)"),
]

ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="HTML", help="write a page that shows what was found")
]


@dataclass(frozen=True)
class Loading:
    """The options that say how a model is loaded."""

    image_size: ImageSize = None
    device: Device = None
    dtype: DType = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True)
class Patching:
    """The options that say how a model is patched: the arguments of `testreg.patch`."""

    neurons: Neurons = None
    top_k: TopK = None
    num_registers: NumRegisters = None
    split_neurons: SplitNeurons = False
    max_over: MaxOver = "neuron"
    zero: Zero = None
    start: StartOption = None
