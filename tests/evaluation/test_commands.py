"""The commands of the tasks: every argument is an option that says what it is."""

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from scenes import masks
from typer.testing import CliRunner

from testreg.evaluation.commands import argument_texts, function_of, signature_of
from testreg.evaluation.names import TASKS


def test_every_task_has_a_command() -> None:
    folder = Path(inspect.getfile(function_of("lost"))).parent
    tasks = {path.stem.replace("_", "-") for path in folder.glob("*.py") if "\ndef evaluate(" in path.read_text()}
    assert tasks == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_argument_is_an_option_with_a_help(task: str) -> None:
    options = signature_of(task).parameters
    assert {"data", "neurons", "against", "figures", "num_images", "seed", "cache"} <= set(options)
    own = [
        each.name
        for each in inspect.signature(function_of(task)).parameters.values()
        if each.kind is each.KEYWORD_ONLY and each.name != "tokenizer"
    ]
    assert set(own) <= set(options)
    for name, option in options.items():
        kind, shown = get_args(option.annotation)[:2]
        assert len(shown.help) > 5, name
        assert "None" not in shown.help, name  # which a command line does not have
        assert get_origin(kind) is Literal or kind in (bool, int, float, str) or type(None) in get_args(kind)


def test_what_a_docstring_says_of_arguments() -> None:
    texts = argument_texts(
        "Sum.\n\nArgs:\n    first, second: one,\n        and more.\n    third: x.\n\nReturns:\n    no: y."
    )
    assert texts == {"first": "one, and more", "second": "one, and more", "third": "x"}


def test_options_are_read_by_typer(tmp_path: Path) -> None:
    masks(tmp_path)
    got: dict[str, Any] = {}

    def command(**values: Any) -> None:
        got.update(values)

    command.__signature__ = signature_of("attention-seg")  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in signature_of("attention-seg").parameters.values()}
    app = typer.Typer()
    app.command()(command)
    run = CliRunner().invoke(app, ["--data", str(tmp_path), "--no-align", "--foreground", "1-90", "--neurons", "none"])
    assert run.exit_code == 0, run.output
    assert got["align"] is False
    assert (got["foreground"], got["neurons"], got["size"], got["seed"]) == ("1-90", "none", 224, 0)
    helped = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert "squash images and masks in the same way" in " ".join(helped.output.replace("│", " ").split())
