"""What all commands have in common: how they run and end, what they say, and where to."""

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

OUTPUTS = ("output", "report", "figures", "resume", "json")  # parameters that name what a command writes
TO_OUTPUT = "-"  # in place of a file

_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="show the result alone")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show the libraries' bars, warnings and logs too")]
_Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="write the result as JSON; - for the output, in place of the text"),
]
_Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@dataclass(frozen=True)
class Invocation:
    """One run of a command: what its user wants to see, and in which form."""

    argv: Sequence[str]
    """The arguments, of the program, as they were given."""
    quiet: bool
    verbose: bool
    json: str | None
    debug: bool

    def say(self, text: str) -> None:
        """Something to know about the result, for people who want to read."""
        if not self.quiet:
            self.answer(text)

    def answer(self, text: str) -> None:
        """The result in words, unless it is wanted as JSON in their place."""
        if self.json != TO_OUTPUT:
            print(text)

    def write(self, result: object) -> None:
        """The result as JSON, if it is wanted."""
        if self.json is None:
            return
        text = json.dumps(result, indent=1, allow_nan=False)
        if self.json == TO_OUTPUT:
            print(text)
            return
        with replacing(self.json) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within the context, a terminal shows that this is under way."""
        if self.quiet or not is_first_process() or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status(Text(what)):
            yield

    def phase(self, what: str) -> AbstractContextManager[None]:
        """As `waiting`; without a terminal, one line says that this has begun."""
        if not self.quiet and is_first_process() and not sys.stderr.isatty():
            print(f"testreg: {what}", file=sys.stderr, flush=True)
        return self.waiting(what)

    @property
    def command(self) -> str:
        """The command line, to be run again."""
        return shlex.join(["testreg", *self.argv])


def add_command(
    app: typer.Typer,
    function: Callable[..., Exit | None],
    *others: Exit,
    name: str | None = None,
    done: str = Exit.DONE.meaning,
) -> None:
    """Make `function` a command: its first parameter is the `Invocation`, the others are its own.

    The fields of a parameter that is a dataclass (`options.Loading`) are options each.

    Args:
        others: its exit codes beside those that every command has.
        done: what it means there that the command is done.
    """
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    grouped = {each.name: _fields(each.annotation) for each in own if dataclasses.is_dataclass(each.annotation)}
    common = {"quiet": _Quiet, "verbose": _Verbose, "json": _Json, "debug": _Debug}
    parameters = [
        Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(part.replace(kind=Parameter.KEYWORD_ONLY) for each in own for part in grouped.get(each.name, [each])),
        *(
            Parameter(key, Parameter.KEYWORD_ONLY, annotation=kind, default=None if kind is _Json else False)
            for key, kind in common.items()
        ),
    ]

    @functools.wraps(function)
    def command(*, context: typer.Context, **values: Any) -> None:
        invocation = Invocation(context.obj, **{key: values.pop(key) for key in common})
        for each in own:
            if each.name in grouped:
                values[each.name] = each.annotation(**{part.name: values.pop(part.name) for part in grouped[each.name]})
        raise SystemExit(_ended(function, invocation, values))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    app.command(name or function.__name__, epilog=exit_codes(*others, done=done))(command)


def _fields(group: Any) -> list[Parameter]:
    """The fields of a dataclass, as parameters."""
    return list(inspect.signature(group, eval_str=True).parameters.values())


def _ended(function: Callable[..., Exit | None], invocation: Invocation, values: Mapping[str, Any]) -> Exit:
    """Run a command; returns how it ended."""
    outputs = [
        Path(path) for key, path in {**values, "json": invocation.json}.items() if key in OUTPUTS and _is_file(path)
    ]
    begun = [Path(f"{values['output']}{UNFINISHED}")] if _is_file(values.get("output")) else []  # of `extract`
    outputs += begun
    before = _written(outputs)
    try:
        with muted(verbose=invocation.verbose):
            if _is_file(invocation.json):
                check_writable(invocation.json)
            return function(invocation, **values) or Exit.DONE
    except (NoOutliersError, ImmovableOutliersError) as not_fixable:  # raised in every process
        if is_first_process():
            print(not_fixable, file=sys.stderr)
        return Exit.NOTHING_TO_FIX if isinstance(not_fixable, NoOutliersError) else Exit.NOT_FIXABLE
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.DONE
    except KeyboardInterrupt:
        if is_first_process():
            resume = [path for path in (values.get("resume"), *begun) if path is not None and path.is_file()]
            print(_interrupted(outputs, before, resume), file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:
        if invocation.debug:
            raise
        print(f"testreg: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return Exit.ERROR


def is_first_process() -> bool:
    """Whether this is the first process, also outside of the process group, where `rank()` says it of all."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


def _is_file(path: str | Path | None) -> TypeGuard[str | Path]:
    return path not in (None, TO_OUTPUT)


def _written(outputs: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """The files that the command writes, as far as they exist, each with what tells it from one written anew."""
    # Not the methods of Path, which raise errors for a name that is too long.
    files = [file for path in outputs for file in (sorted(path.glob("*")) if os.path.isdir(path) else [path])]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if os.path.isfile(file)}


def _interrupted(outputs: Sequence[Path], before: Mapping[Path, tuple[int, int]], resume: Sequence[Path]) -> str:
    """What an interrupted command has written, and whether it can go on from there."""
    written = [str(file) for file, state in _written(outputs).items() if state != before.get(file)]
    message = "interrupted; " + (f"written before: {', '.join(written)}" if written else "nothing was written")
    return message + "".join(f"; the same command goes on from {file}" for file in resume)
