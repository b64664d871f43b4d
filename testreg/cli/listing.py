"""testreg list"""

from __future__ import annotations

from testreg.cli.running import Run


def listing(run: Run) -> None:
    """The bundled register neurons, and their models."""
    from testreg.neurons import bundled

    lists = bundled()
    if run.quiet:
        run.answer("\n".join(lists))
    else:
        run.answer(str(lists))
    run.write(
        [
            {
                "name": name,
                "neurons": len(neurons),
                "verified": neurons.verified,
                "models": list(neurons.model.get("names", ())),
                "default_for": list(neurons.model.get("default_for", ())),
            }
            for name, neurons in lists.items()
        ]
    )
