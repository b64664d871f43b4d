"""The program `testreg` and its commands, in the order in which the help shows them."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from testreg.cli.apply import apply
from testreg.cli.calibrate import calibrate
from testreg.cli.demo import demo
from testreg.cli.diagnose import diagnose
from testreg.cli.evaluate import tasks
from testreg.cli.exits import Exit, exit_codes
from testreg.cli.extract import extract
from testreg.cli.invocation import add_command
from testreg.cli.listing import listing
from testreg.cli.show import show

app = typer.Typer(
    name="testreg",
    help="Take the artefacts out of pretrained Vision Transformers, without training.",
    epilog=f"{exit_codes()} Others are listed by `testreg COMMAND --help`.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)
add_command(app, demo)
add_command(app, listing, name="list")
add_command(
    app, diagnose, Exit.NOTHING_TO_FIX, Exit.NOT_FIXABLE, done="outliers that registers move, or several models"
)
add_command(
    app,
    calibrate,
    Exit.NOTHING_TO_FIX,
    Exit.NOT_FIXABLE,
    Exit.NOT_VERIFIED,
    done="neurons were written, and are verified",
)
add_command(app, apply)
add_command(app, show)
add_command(app, extract)
app.add_typer(tasks, name="evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: that of the process), and return the command's exit code, one of `Exit`.

    Raises:
        SystemExit: help or the version was asked for, or the command line was wrong.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold bytes that are no valid text
    try:
        typer.main.get_command(app).main(arguments, prog_name="testreg", obj=arguments)
    except SystemExit as ended:
        if isinstance(ended.code, Exit):
            return ended.code
        raise
    return Exit.DONE


def _print_version(is_asked: bool) -> None:
    """Print the version and end, if --version was given."""
    if is_asked:
        from importlib.metadata import version

        print(f"testreg {version('testreg')}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version, and exit")
    ] = False,
) -> None:
    """Take the artefacts out of pretrained Vision Transformers, without training."""
