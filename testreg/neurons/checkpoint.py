"""Describe a checkpoint, so that it can be recognised as the one that a list of register neurons is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from testreg.families import Tower, activation, checkpoint_names, fingerprint


def describe_model(model: nn.Module, tower: Tower) -> dict[str, Any]:
    """Describe the checkpoint of a model: the entry "model" in the JSON of a list that is found on it.

    It has the names of the checkpoint, its depth and MLP width, the name of its MLPs' activation function, and a
    fingerprint of its weights.
    """
    names = checkpoint_names(model)
    activation_name = activation(tower)
    return {
        "name": names[0] if names else type(model).__name__,
        "names": names,
        "depth": tower.depth,
        "mlp_width": tower.mlp_width,
        **({} if activation_name is None else {"activation": activation_name}),
        "fingerprint": fingerprint(tower),
    }
