"""The command `testreg apply`, which saves a patched checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testreg.cli.invocation import Invocation
from testreg.cli.models import load, patch
from testreg.cli.options import Loading, Model, Patching
from testreg.files import check_writable_folder


def apply(
    invocation: Invocation,
    model: Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="folder to write")],
    patching: Patching,
    loading: Loading,
) -> None:
    """Save a patched checkpoint."""
    from testreg.io.checkpoints import check_replaceable, save

    check_replaceable(output)
    check_writable_folder(output)
    check_writable_folder(output.resolve().parent)  # in which `save` creates the folder
    loaded = load(invocation, model, loading)
    neurons = patch(loaded, patching)
    with invocation.waiting(f"writing {output}"):
        save(loaded.model, output, processor=loaded.processor)
    invocation.answer(f"{output}: patched checkpoint of {loaded.name}")
    invocation.write(
        {"output": str(output), "model": loaded.name, "neurons": neurons.by_block(), "verified": neurons.verified}
    )
