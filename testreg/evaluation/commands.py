"""Makes the command `testreg evaluate TASK` of each task from the task's Python function `evaluate`.

The keyword arguments of `evaluate` become the options of the command, and its docstring becomes their help.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

from testreg.evaluation.evaluation import Settings

_NOT_OPTIONS = {
    "model",
    "data",
    "neurons",
    "against",
    "tokenizer",
    "settings",
    "progress",
}
"""Arguments of `evaluate` that do not become options here: they exist only in Python, or are added by hand."""
_HELP = {
    "neurons": "register neurons: JSON, a bundled name, or none",
    "against": "another model to hold against it, e.g. one with trained registers",
    "figures": "write the task's pictures there",
    "device": "cpu, cuda, cuda:1, mps (default: the best there is)",
}
"""The help of options that no docstring describes, or whose docstring is worded for Python."""


def function_of(task: str) -> Callable[..., Any]:
    """The function `evaluate` of a task, by the task's name, e.g. "attention-seg"."""
    return importlib.import_module(f"testreg.evaluation.{task.replace('-', '_')}").evaluate


def signature_of(task: str) -> inspect.Signature:
    """The signature of a task's command, for typer: common options, the task's arguments, and the `Settings`."""
    import typer

    def option(name: str, kind: Any, default: Any, text: str) -> Parameter:
        help_text = re.sub(r"[;.] None for (.*)$", r" (default: \1)", _HELP.get(name, text))
        shown = Annotated[kind, typer.Option(help=help_text, show_default=default is not None)]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=shown)

    texts = argument_texts(inspect.getdoc(function_of(task)) or "")
    common = [
        option("data", str, Parameter.empty, texts["data"]),
        option("neurons", str | None, None, ""),
        option("against", str | None, None, ""),
        option("figures", Path | None, None, ""),
    ]
    task_options = [
        option(each.name, each.annotation, each.default, text) for each, text in _arguments(function_of(task))
    ]
    settings = [option(each.name, _from_text(each), each.default, text) for each, text in _arguments(Settings)]
    return inspect.Signature([*common, *task_options, *settings])


def _from_text(parameter: Parameter) -> Any:
    """The type of an option. The cache's path is given as text, since typer takes no union of types."""
    return str | None if parameter.name == "cache" else parameter.annotation


def _arguments(function: Callable[..., Any]) -> Iterator[tuple[Parameter, str]]:
    """The keyword arguments of a function that become options, each with its description in the docstring."""
    texts = argument_texts(inspect.getdoc(function) or "")
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.kind is Parameter.KEYWORD_ONLY and parameter.name not in _NOT_OPTIONS:
            yield parameter, texts[parameter.name]


def argument_texts(docstring: str) -> Mapping[str, str]:
    """{argument: its description}, read from the section "Args" of a docstring."""
    section = re.split(r"\n(?=\w+:\n)", docstring.partition("Args:\n")[2])[0]
    entries = re.split(r"\n {4}(?=[a-z_, ]+: )", "\n" + section)[1:]
    texts: dict[str, str] = {}
    for entry in entries:
        names, _, text = entry.partition(":")
        texts |= {name.strip(): " ".join(text.split()).rstrip(".") for name in names.split(",")}
    return texts
