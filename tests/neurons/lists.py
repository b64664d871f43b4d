"""Lists for the tests of `testreg.neurons`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from testreg.families import find_tower, fingerprint
from testreg.neurons import Calibration, RegisterNeurons

RANKING = ((5, 599, 7.0), (5, 1869, 4.5), (4, 2028, 2.25), (3, 1074, 1.2))


def neurons(**changes: object) -> RegisterNeurons:
    fields = {
        "ranking": RANKING,
        "top_k": 3,
        "model": {"name": "timm:a", "depth": 12, "mlp_width": 3072},
        "calibration": Calibration(images=100),
        "provenance": {"note": "a line\nbreak, \u00e9"},
    }
    return RegisterNeurons(**{**fields, **changes})


def write(path: Path, **changes: object) -> Path:
    """A JSON as a person would write it, with `changes`; a change to ... leaves the key out."""
    data = {"format": "testreg-neurons", "version": 2, "neurons": [[5, 599, 7.0], [4, 2028, 2.25]], **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


def fingerprint_of(model: torch.nn.Module) -> str:
    return fingerprint(find_tower(model))


def rounded(weight: torch.Tensor, bits: int) -> None:
    """Round a weight in place, to so many bits for each output channel."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    weight.copy_((weight / step).round() * step)
