"""testreg apply"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    SplitNeurons,
    TopK,
    TrustRemoteCode,
    Zero,
)
from testreg.cli.running import Run
from testreg.files import check_writable_folder


def apply(
    run: Run,
    model: Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="folder to write")],
    neurons: Neurons = None,
    top_k: TopK = None,
    num_registers: NumRegisters = None,
    split_neurons: SplitNeurons = False,
    max_over: MaxOver = "neuron",
    zero: Zero = "patches",
    image_size: ImageSize = None,
    device: Device = None,
    dtype: DType = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Save a patched checkpoint."""
    from testreg.io.checkpoints import check_replaceable, save

    check_replaceable(output)
    check_writable_folder(output)
    check_writable_folder(output.resolve().parent)  # where it is made
    loaded = load(
        run, model, chosen_device(device), image_size=image_size, dtype=dtype, trust_remote_code=trust_remote_code
    )
    used = patch_with(
        loaded,
        neurons,
        top_k=top_k,
        num_registers=num_registers,
        split_neurons=split_neurons,
        max_over=max_over,
        zero=zero,
    )
    with run.waiting(f"writing {output}"):
        save(loaded.model, output, processor=loaded.processor)
    run.answer(f"{output}: patched checkpoint of {loaded.name}")
    run.write({"output": str(output), "model": loaded.name, "neurons": used.by_block(), "verified": used.verified})
