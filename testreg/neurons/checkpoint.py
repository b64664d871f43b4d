"""The description of a checkpoint, which a list of register neurons belongs to."""

from __future__ import annotations

from typing import Any

from torch import nn

from testreg.families import Tower, activation, checkpoint_names, fingerprint


def describe_model(model: nn.Module, tower: Tower) -> dict[str, Any]:
    """The `model` entry of a list found on `model`."""
    names = checkpoint_names(model)
    computed = activation(tower)
    return {
        "name": names[0] if names else type(model).__name__,
        "names": names,
        "depth": tower.depth,
        "mlp_width": tower.mlp_width,
        **({} if computed is None else {"activation": computed}),
        "fingerprint": fingerprint(tower),
    }
