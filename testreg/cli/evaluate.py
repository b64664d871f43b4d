"""The command `testreg evaluate TASK`. The options of a task are the arguments of its function in testreg/evaluation.

So the command of a task is made only when that task is asked for: `testreg --help` need not import it.
"""

from __future__ import annotations

import inspect
import re
from inspect import Parameter
from typing import Any

import typer
from typer.core import TyperGroup

from testreg.cli.invocation import Invocation, add_command
from testreg.cli.models import chosen_device
from testreg.cli.options import Model
from testreg.evaluation.names import TASKS
from testreg.files import check_writable_folder


class Tasks(TyperGroup):
    """The group of the tasks' commands, whose names are known without making the commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(TASKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _command(cmd_name) if cmd_name in TASKS else None


def _command(task: str) -> Any:
    """Make the command of a task, from the task's function `evaluate`."""
    from testreg.evaluation.commands import function_of, signature_of

    def evaluate(invocation: Invocation, model: str, **options: Any) -> None:
        from testreg.io.processes import process_group, rank

        figures, device = options.pop("figures"), options.pop("device")
        if figures is not None:
            check_writable_folder(figures)
        with process_group(chosen_device(device)) as own_device:
            result = function_of(task)(model, **options, device=str(own_device), progress=not invocation.quiet)
            is_first = rank() == 0
        if is_first:
            invocation.answer(str(result).rstrip())
            if figures is not None:
                invocation.answer("\n".join(map(str, result.save_figures(figures))))
            invocation.write(result.to_json())

    first_parameters = [
        Parameter("invocation", Parameter.KEYWORD_ONLY, annotation=Invocation),
        Parameter("model", Parameter.KEYWORD_ONLY, annotation=Model),
    ]
    evaluate.__signature__ = inspect.Signature([*first_parameters, *signature_of(task).parameters.values()])  # type: ignore[attr-defined]
    text = (inspect.getdoc(function_of(task)) or "").partition("\n\nArgs:")[0]
    # The lines of a paragraph are joined, so that typer can break them at the terminal's width.
    evaluate.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["--help", "-h"]})
    add_command(app, evaluate, name=task)
    return typer.main.get_command(app)


tasks = typer.Typer(cls=Tasks, no_args_is_help=True, help="Measure a model by the tables of the papers.")
