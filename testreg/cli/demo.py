"""testreg demo"""

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
    check_file(output, *PICTURES)  # before all that the demo needs is imported

    from testreg.demo.run import run_demo
    from testreg.report.map_figures import figures_of, table

    invocation.say(
        "A small ViT, trained on CIFAR-10 around a planted outlier mechanism: see testreg/demo/model/README.md."
    )
    done = run_demo(progress=not invocation.quiet)
    planted = sum(map(len, done.planted.values()))
    verdict = done.neurons.calibration.verdict
    invocation.say(f"diagnosed:  {verdict}")
    invocation.say(
        f"calibrated: {done.neurons.top_k} register neurons, {done.recovered} of the {planted} planted ones among them"
    )
    invocation.say(f"patched:    one register\n\n{table(done.before, done.after)}\n")
    save_picture(done.picture, output)
    invocation.answer(f"picture:    {output}")
    invocation.write(
        {
            "picture": str(output),
            "verdict": verdict,
            "neurons": done.neurons.by_block(),
            "planted": done.planted,
            "recovered": done.recovered,
            "before": figures_of(done.before),
            "after": figures_of(done.after),
        }
    )
