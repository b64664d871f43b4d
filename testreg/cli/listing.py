"""The command `testreg list`, which lists the bundled register neurons."""

from __future__ import annotations

from testreg.cli.invocation import Invocation


def listing(invocation: Invocation) -> None:
    """The bundled register neurons, and their models."""
    from testreg.neurons import bundled

    lists = bundled()
    if invocation.quiet:
        invocation.answer("\n".join(lists))
    else:
        invocation.answer(str(lists))
    invocation.write(
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
