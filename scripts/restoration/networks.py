"""The networks that are compared: the untouched one, the planted one, and the neurons that each way moves in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from planting import Mechanism, plant_into
from planting.site import silenced
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import testreg
from testreg.families import find_tower
from testreg.files import replacing
from testreg.measure.score import Score

NUM_PLANTING = 64  # images by which the thresholds of the planted neurons are set
NUM_RANKING = 128  # images on which a score ranks neurons

Neurons = dict[int, list[int]]
"""{block: its neurons}."""


def random_like(neurons: Neurons, width: int, seed: int, *, but: Neurons) -> Neurons:
    """As many random neurons as `neurons` has in each of its blocks, which have `width` each, and none in `but`."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Neurons = {}
    for block, units in neurons.items():
        order = torch.randperm(width, generator=generator).tolist()
        drawn[block] = [unit for unit in order if unit not in but.get(block, ())][: len(units)]
    return drawn


def zeroed_copy(model: nn.Module, neurons: Neurons) -> nn.Module:
    """A copy of a network in which these neurons are zero at all tokens."""
    with silenced(find_tower(model), neurons):
        return deepcopy(model)


@dataclass(frozen=True)
class Networks:
    """A planted network, and the neurons that each way moves in it. What takes long to make is kept in a folder.

    Args:
        name: the name of the untouched network, as `testreg.load_model` takes it.
        photographs: images for planting and calibration, (n, 3, h, w).
        kept: a folder for results that belong to this network, mechanism and seed only.
    """

    name: str
    untouched: nn.Module
    photographs: Tensor
    mechanism: Mechanism
    seed: int
    kept: Path

    @cached_property
    def planted(self) -> nn.Module:
        """A copy of the untouched network, with the mechanism planted into it."""
        model = deepcopy(self.untouched)
        weights, neurons = self.kept / "planted.safetensors", self.kept / "planted.json"
        if neurons.is_file():  # this file is written last, so both are complete
            model.load_state_dict(load_file(weights))
            return model
        planted = plant_into(model, self.photographs[:NUM_PLANTING], mechanism=self.mechanism, seed=self.seed)
        with replacing(weights) as temporary:
            save_file(model.state_dict(), temporary)
        with replacing(neurons) as temporary:
            temporary.write_text(json.dumps(planted.neurons), encoding="utf-8")
        return model

    @cached_property
    def planted_neurons(self) -> Neurons:
        """All neurons that were planted: triggers and amplifiers (see `planting`)."""
        assert self.planted is not None  # planting writes the file that is read here
        planted = json.loads((self.kept / "planted.json").read_text(encoding="utf-8"))
        return {int(block): units for block, units in planted.items()}

    @cached_property
    def chosen(self) -> Neurons:
        """The neurons that calibration chooses with default settings."""
        return self._saved_or_made("testreg", lambda: testreg.calibrate(self.planted, self.photographs))

    def ranked(self, score: Score) -> Neurons:
        """The neurons that a score ranks first, as many as were planted."""
        number = sum(map(len, self.planted_neurons.values()))
        return self._saved_or_made(
            score,
            lambda: testreg.calibrate(
                self.planted, self.photographs[:NUM_RANKING], score=score, top_k=number, held_out=0, stability=None
            ),
        )

    @cached_property
    def random(self) -> Neurons:
        """Random neurons of the same blocks, as many as `chosen`, none of which was planted."""
        return random_like(self.chosen, find_tower(self.untouched).mlp_width, self.seed, but=self.planted_neurons)

    @contextmanager
    def zeroed(self) -> Iterator[nn.Module]:
        """Within the `with` block, the chosen neurons of the planted network are zero at all tokens."""
        with silenced(find_tower(self.planted), self.chosen):
            yield self.planted

    def moved(self, scores: Sequence[Score]) -> Mapping[str, Neurons]:
        """{way: the neurons that it moves to a register}."""
        named = {"activation": "paper"}
        by_score = {named.get(score, score): self.ranked(score) for score in scores}
        return {"testreg": self.chosen, **by_score, "random": self.random}

    def _saved_or_made(self, name: str, make: Callable[[], testreg.RegisterNeurons]) -> Neurons:
        """The neurons in a file of the folder; they are made and saved if it does not exist."""
        file = self.kept / f"{name}.json"
        if not file.is_file():
            make().save(file)
        return testreg.RegisterNeurons.load(file).truncate().by_block()
