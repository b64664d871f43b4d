"""The columns of the table: a network without registers, and variants of it with registers or without neurons."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark.models import twin
from planting.site import PARTS
from restoration.networks import random_like, zeroed_copy
from torch import nn

import testreg
from testreg.evaluation.preparing import hashed
from testreg.families import find_part, find_tower
from testreg.io.loading import LoadedModel
from testreg.neurons import RegisterNeurons
from testreg.records.options import default_zero
from testreg.static import StaticRegisters

PLAIN = "plain"
COLUMNS: Mapping[str, str] = {
    "testreg": "testreg's neurons, on registers that are as many as its list says, and start as it says; neurons "
    "at rest keep their value",
    "from zeros": "the same, on registers that start as zeros, as many as change outputs least then",
    "one register": "the same neurons, on one register",
    "paper": "what the paper's score ranks first, on one register: mean |activation|, the blocks and the number of "
    "neurons that it names for a ViT-B/16",
    "jroth": "the list that jroth1414 published for these weights, on one register",
    "joint": "testreg's neurons on one register, each of which gets the largest value of all of its block, as in the "
    "released code",
    "static": "testreg's neurons silent, and the registers' mean states on other images as constants",
    "zeroed": "testreg's neurons write nothing, and there is no register",
    "random": "as many random neurons of the same blocks, on as many registers as start as zeros",
    "bare": "as many registers as start as zeros, to which nothing is moved",
}
"""{column: what it is}, for all columns but the plain network."""

NUM_IMAGES = 100  # images on which the paper's score ranks, and over which static registers are averaged
PAPER: dict[str, Any] = {"score": "activation", "max_block": 5, "top_k": 10}  # as arXiv 2506.08010 says for a ViT-B/16


@dataclass(frozen=True)
class Columns:
    """Makes the columns of a network. What takes long is kept in a folder.

    Args:
        network: the network, not patched, under the name `PLAIN`.
        chosen: testreg's neurons.
        published: the list of neurons that others published.
        images: the folder of photographs for the paper's score and for static registers.
        kept: a folder for results that belong to this network only.
    """

    network: LoadedModel
    chosen: RegisterNeurons
    published: RegisterNeurons
    images: str
    kept: Path

    def moved(self, name: str) -> RegisterNeurons | None:
        """The neurons and number of registers of a column that is a plain patch with these; None for others."""
        match name:
            case "testreg":
                return self.chosen
            case "from zeros":
                return self.from_zeros
            case "one register":
                return self.one_register
            case "paper":
                return self.paper
            case "jroth":
                return self.published
            case "random":
                width = find_tower(self.network.model).mlp_width
                random_neurons = random_like(self.chosen.by_block(), width, 0, but=self.chosen.by_block())
                return replace(RegisterNeurons.from_blocks(random_neurons), num_registers=self.from_zeros.num_registers)
        return None

    @property
    def from_zeros(self) -> RegisterNeurons:
        """testreg's neurons, for registers that start as zeros, as those of all other columns do.

        The number of registers is the one with which outputs changed least when the neurons were calibrated.
        """
        measured = [each for each in self.chosen.calibration.registers if each.start == "zeros"]
        best = min(measured, key=lambda effect: effect.change, default=self.chosen)
        return replace(self.chosen, start="zeros", num_registers=best.num_registers)

    @property
    def one_register(self) -> RegisterNeurons:
        """testreg's neurons, for one register that starts as zeros."""
        return replace(self.from_zeros, num_registers=1)

    @cached_property
    def paper(self) -> RegisterNeurons:
        """The neurons that the paper's recipe finds, with the paper's blocks and number of neurons."""
        file = self.kept / f"paper-{hashed([self.images, NUM_IMAGES, PAPER])[:12]}.json"
        if not file.is_file():
            testreg.calibrate(
                self.network.model,
                self.images,
                transform=self.network.transform,
                num_images=NUM_IMAGES,
                held_out=0,
                stability=None,
                **PAPER,
            ).save(file)
        return RegisterNeurons.load(file).truncate()

    def facts(self, name: str) -> dict[str, Any]:
        """What a column is, for JSON. Columns that differ have different facts, so that old results are recognised."""
        used = self.moved(name) or {"joint": self.one_register}.get(name, self.from_zeros)
        neurons = {block: sorted(units) for block, units in used.by_block().items()}
        facts = {"what": COLUMNS[name], "neurons": neurons, "num_registers": used.num_registers}
        if used.start != "zeros":
            facts |= {"start": used.start, "zero": default_zero(used.start)}
        if name == "bare":
            del facts["neurons"]
        if name == "zeroed":
            del facts["num_registers"]
        return json.loads(json.dumps(facts))

    def network_of(self, name: str) -> LoadedModel:
        """A copy of the network, patched or changed as the column says."""
        plain = self.network.model
        if (neurons := self.moved(name)) is not None:
            network = testreg.patch(twin(plain), neurons)
        elif name == "joint":
            network = testreg.patch(twin(plain), self.one_register, max_over="layer")
        elif name == "static":
            network = testreg.patch(twin(plain), self.from_zeros, static=self._static())
        elif name == "zeroed":
            network = zeroed_copy(plain, self.chosen.by_block())
        else:
            network = with_bare_registers(plain, self.from_zeros.num_registers)
        return LoadedModel(network, self.network.transform, name)

    def _static(self) -> StaticRegisters:
        """Static registers for testreg's neurons."""
        facts = self.facts("static")
        file = self.kept / f"{hashed([self.images, NUM_IMAGES, facts])[:12]}.static.safetensors"
        if not file.is_file():
            transform = self.network.transform
            registers = testreg.make_static(
                twin(self.network.model), self.images, self.from_zeros, transform=transform, num_images=NUM_IMAGES
            )
            registers.save(file)
        return StaticRegisters.load(file)


@contextmanager
def in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Within the `with` block, the network and copies that are made of it there compute under bfloat16 autocast.

    Weights, the residual stream and the tower's outputs stay float32.
    """
    tower, entered = find_tower(model).module, list[torch.autocast]()

    def enter(*_: object) -> None:
        entered.append(torch.autocast(next(tower.parameters()).device.type, torch.bfloat16))
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    with tower.register_forward_pre_hook(enter), tower.register_forward_hook(leave, always_call=True):
        yield


def pairs(columns: Columns, names: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """The columns in pairs, each of which one evaluation computes: as its patched variant, and as its other model.

    Either may be None. Pairs save time, since each evaluation also computes the plain network.
    """
    moved = [name for name in names if columns.moved(name) is not None]
    others = [name for name in names if name not in moved]
    while len(moved) > len(others) + 1:
        others.append(moved.pop())
    return list(zip_longest(moved, others))


def with_bare_registers(model: nn.Module, count: int) -> nn.Module:
    """A copy of a network with registers to which nothing is moved, as a control.

    A patch needs neurons to move. So each block gets one more neuron, which never fires, and that of block 0 is moved.

    Raises:
        ValueError: the first linear of this family's MLP is not known.
    """
    longer = deepcopy(model)
    tower = find_tower(longer)
    if tower.family.name not in PARTS:
        raise ValueError(f"the first linear of {tower.family.name} is not known: it needs a row in planting's PARTS")
    silent = tower.mlp_width
    for block in tower.blocks:  # all of them, since the blocks of a tower must have the same width
        fc1, fc2 = find_part(block.module, PARTS[tower.family.name].fc1), block.mlps[0].fc2_linear
        assert isinstance(fc1, nn.Linear)
        fc1.weight, fc1.out_features = nn.Parameter(F.pad(fc1.weight, (0, 0, 0, 1))), silent + 1
        fc1.bias = nn.Parameter(F.pad(fc1.bias, (0, 1)))
        fc2.weight, fc2.in_features = nn.Parameter(F.pad(fc2.weight, (0, 1))), silent + 1
    return testreg.patch(longer, {0: [silent]}, num_registers=count)
