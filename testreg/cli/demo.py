"""The command `testreg demo`, which calibrates and patches the small model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testreg.cli.invocation import Invocation
from testreg.cli.outputs import PICTURES, check_file, save_picture


def demo(
    invocation: Invocation,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="picture to write")] = Path(
        "testreg-demo.png"
    ),
) -> None:
    """The whole job on a small model, offline."""
    check_file(output, *PICTURES)  # before the slow imports, so that an error comes at once

    from testreg.demo.run import run_demo
    from testreg.report.map_figures import figures_of, table

    invocation.say(
        "A small ViT, trained on CIFAR-10 around a planted outlier mechanism: see testreg/demo/model/README.md."
    )
    results = run_demo(progress=not invocation.quiet)
    planted = sum(map(len, results.planted.values()))
    verdict = results.neurons.calibration.verdict
    invocation.say(f"diagnosed:  {verdict}")
    invocation.say(
        f"calibrated: {results.neurons.top_k} register neurons, {results.recovered} of the {planted} planted ones "
        "among them"
    )
    invocation.say(f"patched:    one register\n\n{table(results.before, results.after)}\n")
    save_picture(results.picture, output)
    invocation.answer(f"picture:    {output}")
    invocation.write(
        {
            "picture": str(output),
            "verdict": verdict,
            "neurons": results.neurons.by_block(),
            "planted": results.planted,
            "recovered": results.recovered,
            "before": figures_of(results.before),
            "after": figures_of(results.after),
        }
    )
