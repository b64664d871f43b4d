"""testreg show"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from testreg.cli.models import chosen_device, load, patch_with
from testreg.cli.options import (
    Device,
    DType,
    ImageSize,
    MaxOver,
    Model,
    Neurons,
    NumRegisters,
    TopK,
    TrustRemoteCode,
    Zero,
)
from testreg.cli.outputs import PICTURES, check_file, save_picture
from testreg.cli.running import Run

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SHOWN = 64  # images in one picture, each of which is a row of it


def show(
    run: Run,
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="images, folders or lists of them", show_default=False)
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="picture to write")],
    neurons: Neurons = None,
    top_k: TopK = None,
    num_registers: NumRegisters = 1,
    max_over: MaxOver = "neuron",
    zero: Zero = "patches",
    block: Annotated[
        int | None, typer.Option(help="block whose norms are drawn (default: where calibration saw outliers)")
    ] = None,
    image_size: ImageSize = None,
    device: Device = None,
    dtype: DType = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Picture of a model before and after."""
    check_file(output, *PICTURES)

    import torch

    from testreg.report import maps

    photos = _photos(images)
    loaded = load(
        run, model, chosen_device(device), image_size=image_size, dtype=dtype, trust_remote_code=trust_remote_code
    )
    used = patch_with(loaded, neurons, top_k=top_k, num_registers=num_registers, max_over=max_over, zero=zero)
    drawn = used.calibration.get("detection_block", -1) if block is None else block
    batch = torch.stack([loaded.transform(photo) for photo in photos])
    with run.phase(f"measuring {len(photos)} images"):
        before, after = maps.compare(loaded.model, batch, drawn)
    run.say(maps.table(before, after))
    save_picture(maps.figure(batch, before, after, f"{loaded.name}, norms after block {drawn}"), output)
    run.answer(f"picture:    {output}")
    run.write(
        {
            "picture": str(output),
            "model": loaded.name,
            "neurons": used.by_block(),
            "block": drawn,
            "before": maps.figures_of(before),
            "after": maps.figures_of(after),
        }
    )


def _photos(paths: Sequence[Path]) -> list[Image]:
    """The images in files, in folders and in lists."""
    from testreg.io.decoding import open_image
    from testreg.io.sources import image_paths

    files = [
        file
        for path in paths
        for file in (image_paths(path) if path.is_dir() or path.suffix.lower() == ".txt" else [path])
    ]
    if len(files) > MAX_SHOWN:
        raise ValueError(f"{len(files)} images are too many for one picture, at most {MAX_SHOWN}: name fewer")
    return [open_image(file) for file in files]
