"""Runs commands: their common options, their output as text or JSON, their errors and exit codes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeGuard

import typer

from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.cli.exits import Exit, exit_codes
from testreg.cli.libraries import muted
from testreg.files import UNFINISHED, check_writable, replacing

OUTPUTS = ("output", "report", "figures", "resume", "json")  # parameters that name files or folders to be written
STDOUT = "-"  # stands for stdout where a file is named

_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="show the result alone")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show the libraries' bars, warnings and logs too")]
_Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="write the result as JSON; - for the output, in place of the text"),
]
_Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@dataclass(frozen=True)
class Invocation:
    """One run of a command: the options that all commands have, and how the command prints."""

    argv: Sequence[str]
    """The arguments of the program, as they were given."""
    quiet: bool
    verbose: bool
    json: str | None
    """The file for the result as JSON; `STDOUT` for stdout; None for no JSON."""
    debug: bool

    def say(self, text: str) -> None:
        """Print explanations of the result, unless --quiet was given."""
        if not self.quiet:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Print the result as text, unless JSON is printed in its place."""
        if self.json != STDOUT:
            print(text)

    def write(self, result: object) -> None:
        """Write the result as JSON, if --json was given."""
        if self.json is None:
            return
        text = json.dumps(result, indent=1, allow_nan=False)
        if self.json == STDOUT:
            print(text)
            return
        with replacing(self.json) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within the `with` block, a terminal shows that `what` is being done."""
        if self.quiet or not is_first_process() or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status(Text(what)):
            yield

    def phase(self, what: str) -> AbstractContextManager[None]:
        """The same as `waiting`, but without a terminal it prints one line, that `what` has begun."""
        if not self.quiet and is_first_process() and not sys.stderr.isatty():
            print(f"testreg: {what}", file=sys.stderr, flush=True)
        return self.waiting(what)

    @property
    def command(self) -> str:
        """The command line as it was typed."""
        return shlex.join(["testreg", *self.argv])


def add_command(
    app: typer.Typer,
    function: Callable[..., Exit | None],
    *others: Exit,
    name: str | None = None,
    done: str = Exit.DONE.meaning,
) -> None:
    """Add a command to the program.

    Args:
        function: runs the command. Its first parameter is the `Invocation`, the others become arguments and options. If
            a parameter is a dataclass (e.g. `options.Loading`), each of its fields becomes an option.
        others: exit codes that the command has beside those of all commands, for the help.
        name: the command's name; None for the name of the function.
        done: what the exit code 0 means for this command.
    """
    own_parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    dataclass_fields = {
        each.name: _fields_of(each.annotation) for each in own_parameters if dataclasses.is_dataclass(each.annotation)
    }
    common = {"quiet": _Quiet, "verbose": _Verbose, "json": _Json, "debug": _Debug}
    parameters = [
        Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(
            part.replace(kind=Parameter.KEYWORD_ONLY)
            for each in own_parameters
            for part in dataclass_fields.get(each.name, [each])
        ),
        *(
            Parameter(key, Parameter.KEYWORD_ONLY, annotation=kind, default=None if kind is _Json else False)
            for key, kind in common.items()
        ),
    ]

    @functools.wraps(function)
    def command(*, context: typer.Context, **values: Any) -> None:
        invocation = Invocation(context.obj, **{key: values.pop(key) for key in common})
        for each in own_parameters:
            if each.name in dataclass_fields:
                values[each.name] = each.annotation(
                    **{part.name: values.pop(part.name) for part in dataclass_fields[each.name]}
                )
        raise SystemExit(_run_to_exit(function, invocation, values))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name or function.__name__, epilog=exit_codes(*others, done=done))(command)


def _fields_of(group: Any) -> list[Parameter]:
    """The fields of a dataclass as parameters."""
    return list(inspect.signature(group, eval_str=True).parameters.values())


def _run_to_exit(function: Callable[..., Exit | None], invocation: Invocation, values: Mapping[str, Any]) -> Exit:
    """Run a command, print its errors, and return its exit code."""
    outputs = [
        Path(path) for key, path in {**values, "json": invocation.json}.items() if key in OUTPUTS and _is_file(path)
    ]
    # `testreg extract` writes into this file until it has all rows.
    unfinished_files = [Path(f"{values['output']}{UNFINISHED}")] if _is_file(values.get("output")) else []
    outputs += unfinished_files
    states_before = _file_states(outputs)
    try:
        with muted(verbose=invocation.verbose):
            if _is_file(invocation.json):
                check_writable(invocation.json)
            return function(invocation, **values) or Exit.DONE
    except (NoOutliersError, ImmovableOutliersError) as not_fixable:  # all processes raise it
        if is_first_process():
            print(not_fixable, file=sys.stderr)
        return Exit.NOTHING_TO_FIX if isinstance(not_fixable, NoOutliersError) else Exit.NOT_FIXABLE
    except BrokenPipeError:  # the reader of stdout (head, less) has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except KeyboardInterrupt:
        if is_first_process():
            resume = [path for path in (values.get("resume"), *unfinished_files) if path is not None and path.is_file()]
            print(_interrupted(outputs, states_before, resume), file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:
        if invocation.debug:
            raise
        print(f"testreg: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return Exit.ERROR


def is_first_process() -> bool:
    """Whether this process is the first of those that torchrun started. It also works before they form a group."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


def _is_file(path: str | Path | None) -> TypeGuard[str | Path]:
    """Whether an option names a file, not stdout or nothing."""
    return path not in (None, STDOUT)


def _file_states(outputs: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """{existing file that the command writes: its inode and time}, which change when the file is written."""
    # os.path.isdir, since Path.is_dir raises an error for a name that is too long.
    files = [file for path in outputs for file in (sorted(path.glob("*")) if os.path.isdir(path) else [path])]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if os.path.isfile(file)}


def _interrupted(outputs: Sequence[Path], states_before: Mapping[Path, tuple[int, int]], resume: Sequence[Path]) -> str:
    """The message of an interrupted command: which files it has written, and whether it can be continued."""
    written = [str(file) for file, state in _file_states(outputs).items() if state != states_before.get(file)]
    message = "interrupted; " + (f"written before: {', '.join(written)}" if written else "nothing was written")
    return message + "".join(f"; the same command goes on from {file}" for file in resume)
