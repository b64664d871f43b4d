"""The options of a calibration are the same in Python, on the command line and in the docs."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

import testreg
from testreg.calibration.options import MEANINGS, Options
from testreg.cli.calibrate import NUM_IMAGES, calibrate

DEFAULTS = {each.name: each.default for each in dataclasses.fields(Options) if each.init}
ELSEWHERE = {"rule": "robust", "num_images": NUM_IMAGES}  # defaults that the command line has of its own
PYTHON_ALONE = {"transform", "head", "stability", "progress"}
DOCS = Path(__file__).parents[2] / "docs" / "calibration.md"


def command_line() -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(calibrate, eval_str=True).parameters)


def test_python_has_these_options_and_defaults() -> None:
    parameters = list(inspect.signature(testreg.calibrate).parameters.values())[2:]
    assert {each.name: each.default for each in parameters} == DEFAULTS
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in parameters)
    types = {each.name: each.type for each in dataclasses.fields(Options) if each.init}
    assert {each.name: each.annotation for each in parameters} == types


def test_the_command_line_has_these_defaults_and_meanings() -> None:
    parameters = command_line()
    assert DEFAULTS.keys() - parameters.keys() == PYTHON_ALONE
    for name in DEFAULTS.keys() - PYTHON_ALONE:
        assert parameters[name].default == ELSEWHERE.get(name, DEFAULTS[name]), name
        (option,) = (
            each for each in get_args(parameters[name].annotation) if isinstance(each, typer.models.OptionInfo)
        )
        assert option.help == MEANINGS[name], name


def row(name: str) -> str:
    on_command_line: Any = "" if name in PYTHON_ALONE else f"`--{name.replace('_', '-')}`"
    default = DEFAULTS[name]
    shown = "" if default is None else f"`{default}`"
    if name in ELSEWHERE:
        shown = f"{shown} (`--{name.replace('_', '-')}`: `{ELSEWHERE[name]}`)".strip()
    return f"| `{name}` | {on_command_line} | {shown} | {MEANINGS[name]} |"


def test_the_table_of_the_docs_is_this_one() -> None:
    rows = re.findall(r"^\| `\w+` \| (?:`--[\w-]+`)? \|.*\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    expected = [row(name) for name in DEFAULTS]
    assert rows == expected, "\n".join(expected)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_command_and_the_reference_explain_each(name: str) -> None:
    assert MEANINGS[name]
    documented = re.findall(r"^        (\w+(?:, \w+)*):", testreg.calibrate.__doc__ or "", re.MULTILINE)
    assert name in ", ".join(documented).split(", ")
