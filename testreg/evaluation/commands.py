"""The tasks as commands: their options are the arguments of their `evaluate`, with what its docstring says of them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

from testreg.evaluation.evaluation import Settings

_IN_PYTHON = {
    "model",
    "data",
    "neurons",
    "against",
    "tokenizer",
    "settings",
    "progress",
}  # or with an option of its own
_HELP = {  # of what has no text of its own, or one that is for Python
    "neurons": "register neurons: JSON, a bundled name, or none",
    "against": "another model to hold against it, e.g. one with trained registers",
    "figures": "write the task's pictures there",
    "device": "cpu, cuda, cuda:1, mps (default: the best there is)",
}


def function_of(task: str) -> Callable[..., Any]:
    """The `evaluate` of a task, by the name of its command."""
    return importlib.import_module(f"testreg.evaluation.{task.replace('-', '_')}").evaluate


def signature_of(task: str) -> inspect.Signature:
    """The options of a task's command, for typer: data, neurons, against, figures, the task's own, and the settings."""
    import typer

    def option(name: str, kind: Any, default: Any, text: str) -> Parameter:
        said = re.sub(r"[;.] None for (.*)$", r" (default: \1)", _HELP.get(name, text))
        shown = Annotated[kind, typer.Option(help=said, show_default=default is not None)]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=shown)

    texts = argument_texts(inspect.getdoc(function_of(task)) or "")
    common = [
        option("data", str, Parameter.empty, texts["data"]),
        option("neurons", str | None, None, ""),
        option("against", str | None, None, ""),
        option("figures", Path | None, None, ""),
    ]
    own = [option(each.name, each.annotation, each.default, text) for each, text in _arguments(function_of(task))]
    settings = [option(each.name, _from_text(each), each.default, text) for each, text in _arguments(Settings)]
    return inspect.Signature([*common, *own, *settings])


def _from_text(parameter: Parameter) -> Any:
    """The type of an option: paths are text there."""
    return str | None if parameter.name == "cache" else parameter.annotation


def _arguments(function: Callable[..., Any]) -> Iterator[tuple[Parameter, str]]:
    """The keyword arguments that a command line can give, each with what the docstring says of it."""
    texts = argument_texts(inspect.getdoc(function) or "")
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is Parameter.KEYWORD_ONLY and parameter.name not in _IN_PYTHON:
            yield parameter, texts[parameter.name]


def argument_texts(docstring: str) -> Mapping[str, str]:
    """What the section "Args" of a docstring says of each argument."""
    section = re.split(r"\n(?=\w+:\n)", docstring.partition("Args:\n")[2])[0]
    entries = re.split(r"\n {4}(?=[a-z_, ]+: )", "\n" + section)[1:]
    texts: dict[str, str] = {}
    for entry in entries:
        names, _, text = entry.partition(":")
        texts |= {name.strip(): " ".join(text.split()).rstrip(".") for name in names.split(",")}
    return texts
