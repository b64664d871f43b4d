"""The networks that are compared: the untouched one, the planted one, and the ways to take the outliers out of it."""

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

NUM_PLANTING = 64  # images that set the thresholds of what is planted
NUM_RANKING = 128  # images that a score ranks on, told the true number

Neurons = dict[int, list[int]]


def random_like(neurons: Neurons, width: int, seed: int, *, but: Neurons) -> Neurons:
    """As many random neurons of the same blocks, of `width` neurons each, and none of those that `but` names."""
    generator = torch.Generator().manual_seed(seed)
    drawn: Neurons = {}
    for block, units in neurons.items():
        order = torch.randperm(width, generator=generator).tolist()
        drawn[block] = [unit for unit in order if unit not in but.get(block, ())][: len(units)]
    return drawn


def zeroed_copy(model: nn.Module, neurons: Neurons) -> nn.Module:
    """A copy of a network in which neurons write nothing, at no token."""
    with silenced(find_tower(model), neurons):
        return deepcopy(model)


@dataclass(frozen=True)
class Networks:
    """A planted network, and what is moved in it. What took long to make is kept in a folder.

    Args:
        name: of the untouched network, as `testreg.load_model` takes it.
        photographs: (n, 3, h, w), for planting and calibration.
        kept: a folder of this network, mechanism and seed alone.
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
        if neurons.is_file():  # which is written last
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
        """All that were planted, triggers and amplifiers."""
        assert self.planted is not None  # which has written them
        read = json.loads((self.kept / "planted.json").read_text(encoding="utf-8"))
        return {int(block): units for block, units in read.items()}

    @cached_property
    def chosen(self) -> Neurons:
        """What calibration with default settings chooses, told nothing."""
        return self._listed("testreg", lambda: testreg.calibrate(self.planted, self.photographs))

    def ranked(self, score: Score) -> Neurons:
        """The best of one ranking by a score, told how many were planted."""
        number = sum(map(len, self.planted_neurons.values()))
        return self._listed(
            score,
            lambda: testreg.calibrate(
                self.planted, self.photographs[:NUM_RANKING], score=score, top_k=number, held_out=0, stability=None
            ),
        )

    @cached_property
    def random(self) -> Neurons:
        """As many random neurons as are chosen, of the same blocks, none of which was planted."""
        return random_like(self.chosen, find_tower(self.untouched).mlp_width, self.seed, but=self.planted_neurons)

    @contextmanager
    def zeroed(self) -> Iterator[nn.Module]:
        """Within the context the chosen neurons write nothing, at no token: the planted network without them."""
        with silenced(find_tower(self.planted), self.chosen):
            yield self.planted

    def moved(self, scores: Sequence[Score]) -> Mapping[str, Neurons]:
        """The neurons of each way that moves some."""
        named = {"activation": "paper"}
        by_score = {named.get(score, score): self.ranked(score) for score in scores}
        return {"testreg": self.chosen, **by_score, "random": self.random}

    def _listed(self, name: str, make: Callable[[], testreg.RegisterNeurons]) -> Neurons:
        file = self.kept / f"{name}.json"
        if not file.is_file():
            make().save(file)
        return testreg.RegisterNeurons.load(file).truncate().by_block()
