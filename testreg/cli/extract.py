"""The command `testreg extract`, which writes a model's features of images to a file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from testreg.cli.invocation import Invocation
from testreg.cli.models import chosen_device, load, patch
from testreg.cli.options import BatchSize, Images, Loading, Model, Patching, Workers
from testreg.cli.outputs import check_file


class What(StrEnum):
    """What can be written for each block."""

    PATCHES = "patches"
    CLS = "cls"
    ATTENTION = "attention"
    REGISTERS = "registers"


def extract(
    invocation: Invocation,
    model: Model,
    *,
    images: Images,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="what to write: .safetensors, .npz or .parquet")
    ],
    what: Annotated[
        list[What] | None,
        typer.Option(help="what to write; may be repeated (default: patches, and cls where there is one)"),
    ] = None,
    block: Annotated[
        list[int] | None, typer.Option(help="block after which it is taken; may be repeated (default: the last)")
    ] = None,
    norm: Annotated[bool, typer.Option("--norm", help="behind the model's final norm")] = False,
    half: Annotated[bool, typer.Option("--half", help="write float16: half the size")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="of the model as it is, without registers")] = False,
    patching: Patching,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    loading: Loading,
) -> None:
    """Write the features of a folder of images to one file.

    After an interruption, the same command continues where it stopped.
    """
    from testreg.io.processes import process_group, rank
    from testreg.io.sources import check_images
    from testreg.measure.extraction import check_output
    from testreg.measure.extraction import extract as extract_to_file
    from testreg.register import is_patched, unpatch

    kinds: Any = [each.value for each in what or ()]
    if plain and patching.neurons is not None:
        raise ValueError("--plain takes the model as it is: leave --neurons out")
    check_file(output)
    check_output(output)
    check_images(images)  # so that an error comes before a model is loaded
    with process_group(chosen_device(loading.device)) as own_device:
        loaded = load(invocation, model, loading, own_device)
        if not plain:
            patch(loaded, patching)
        elif is_patched(loaded.model):
            unpatch(loaded.model)
        result = extract_to_file(
            loaded.model,
            images,
            output,
            blocks=block or [-1],
            what=kinds,
            norm=norm,
            half=half,
            transform=loaded.transform,
            batch_size=batch_size,
            workers=workers,
            progress=not invocation.quiet,
        )
        is_first = rank() == 0
    if is_first:
        count = next(iter(result.arrays.values()))[0]
        if result.unreadable:
            invocation.answer(
                f"{len(result.unreadable)} of {count} images could not be read: {', '.join(result.unreadable[:3])}"
            )
        invocation.say("\n".join(f"{name:<14} {' x '.join(map(str, shape))}" for name, shape in result.arrays.items()))
        invocation.answer(f"{output}: {count} images")
        invocation.write({"output": str(output), "arrays": result.arrays, "unreadable": result.unreadable})
