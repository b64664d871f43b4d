"""Checks one architecture: is it supported, refused, absent, or does it fail?

The model is built with random weights, and patched with three neurons in two blocks; then with one in block 1, and a
register that enters there as the mean patch. It is *supported* if

- every public output has the same shape with the patch as without, and the state_dict has the same keys;
- every public output for a batch equals that of the reference (explicit_register.py), and those for single images;
- the patch changes something, and after `unpatch` every output is the same as before, bit for bit.

It is *refused* if testreg says why the method does not fit, and *absent* if the installed release of the library does
not have it. Anything else is a failure.
"""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, testing

import testreg
from coverage.explicit_register import explicit_register
from coverage.registry import Absent, Architecture, randomise, registry
from testreg.families import Tower, find_tower
from testreg.measure.hooks import recording_inputs

TOLERANCE = 1e-4  # allowed difference in float32, as a fraction of an output's largest value
LOUDNESS = 20.0  # the columns of the neurons that are moved are scaled by this, so that errors show


@dataclass(frozen=True)
class Verdict:
    """The result of the check of one architecture."""

    library: str
    name: str
    word: str
    """supported, refused, absent or FAILED."""
    reason: str = ""


def check(architecture: Architecture) -> Verdict:
    """Check one architecture."""
    verdict = lambda word, reason="": Verdict(architecture.library, architecture.name, word, reason)
    try:
        refusal = _check(architecture)
    except Absent as reason:
        return verdict("absent", str(reason))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return verdict("FAILED", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    return verdict("refused", refusal) if refusal else verdict("supported")


def start_worker() -> None:
    """Prepare a process that checks: one thread, and no warnings. (It is here since spawned processes import it.)"""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable()


def check_named(key: tuple[str, str]) -> Verdict:
    """Check the architecture of a library and name. (An `Architecture` cannot be sent to other processes.)"""
    return check(registry()[key])


@torch.no_grad()
def _check(architecture: Architecture) -> str:
    """The reason why the architecture is refused, or "" if it is supported. Raises an error if it fails."""
    torch.manual_seed(0)
    model = randomise(architecture.build()).eval()
    try:
        tower = find_tower(model)
    except ValueError as error:
        refusal = re.search(r"(?<=cannot be patched: in ).*|holds several vision towers.*", str(error))
        if refusal is None:
            raise
        return refusal[0]
    run = lambda *numbers: _tensors(architecture.run(model, numbers))
    keys = list(model.state_dict())
    neurons = _loud_neurons(tower, lambda: run(0, 1))
    plain = run(0, 1)
    shapes = lambda outputs: {(name, tensor.shape) for name, tensor in outputs.items()}
    for start, moved in (("zeros", neurons), ("mean", {1: neurons[1]})):
        with explicit_register(tower, moved, start):
            references = [run(0), run(1)]
        _assert_same("the reference left something", run(0, 1), plain, exactly=True)

        testreg.patch(model, moved, start=start)
        patched = run(0, 1)
        if list(model.state_dict()) != keys:
            raise AssertionError("the keys of the state_dict changed")
        if changed := shapes(patched) ^ shapes(plain):
            raise AssertionError(f"shapes changed: {sorted(changed)}")
        if all(torch.equal(patched[name], plain[name]) for name in plain):
            raise AssertionError("the patch changes nothing")
        singles = [run(0), run(1)]
        _assert_same(f"start={start}: a batch differs from its images one by one", patched, _concatenated(singles))
        _assert_same(f"start={start}: differs from the explicit register", patched, _concatenated(references))

        testreg.unpatch(model)
        _assert_same("unpatch is not exact", run(0, 1), plain, exactly=True)
    return ""


def _loud_neurons(tower: Tower, run: Callable[[], Any]) -> dict[int, list[int]]:
    """Three neurons in two blocks, whose columns are scaled up, so that it shows in the outputs how they are moved.

    Neurons are chosen whose activation is largest on the last token: if padding were not left out, that would show. If
    a block has several MLPs, the two neurons of the first block are in different ones.
    """
    mlps = [tower.blocks[block].mlps[index] for block, index in ((0, 0), (0, -1), (1, 0))]
    scores: list[Any] = [0, 0, 0]

    def record(key: int, hidden: Tensor) -> None:
        tokens = hidden.transpose(0, 1) if tower.sequence_first else hidden.view(-1, *hidden.shape[-2:])
        magnitude = tokens[..., mlps[key].first :].abs()  # (B, T, H)
        ratio = magnitude[:, -1] / magnitude.amax(1).clamp(min=1e-6)
        scores[key] = scores[key] + ((ratio == 1) + 1e-3 * ratio).sum(0)

    with recording_inputs([mlp.fc2 for mlp in mlps], record):
        run()
    if len(tower.blocks[0].mlps) == 1:
        first, second = scores[0].topk(2).indices.tolist()
    else:
        first, second = int(scores[0].argmax()), mlps[0].width + int(scores[1].argmax())
    neurons = {0: [first, second], 1: [int(scores[2].argmax())]}
    for block, units in neurons.items():
        for mlp, units_of_mlp in tower.blocks[block].units_by_mlp(units):
            mlp.columns[:, list(units_of_mlp.values())] *= LOUDNESS
    return neurons


def _tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in a nested output, {path: tensor}."""
    if isinstance(output, Tensor):
        return {name: output.detach().clone()}
    if isinstance(output, Mapping):
        parts: Any = output.items()
    elif isinstance(output, list | tuple):
        parts = enumerate(output)
    else:
        return {}
    return {path: tensor for key, part in parts for path, tensor in _tensors(part, f"{name}.{key}").items()}


def _concatenated(singles: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs for single images, concatenated."""
    first = singles[0]
    return {name: torch.cat([each[name] for each in singles]) if first[name].ndim else first[name] for name in first}


def _assert_same(
    what: str, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, exactly: bool = False
) -> None:
    """Raise AssertionError, with `what` went wrong, unless the tensors are equal, exactly or within `TOLERANCE`."""
    for name, tensor in ours.items():
        other = expected[name]
        largest = float(other.double().abs().max().clamp(min=1e-3)) if other.numel() else 0.0
        testing.assert_close(
            tensor,
            other,
            rtol=0.0,
            atol=0.0 if exactly else TOLERANCE * largest,
            equal_nan=exactly,
            msg=lambda difference, name=name: f"{what}: {name}: {difference}",
        )
