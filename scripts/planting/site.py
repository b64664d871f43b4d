"""`Site`: a model into which neurons are planted; it sets their weights, and records what the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from testreg.families import Mlp, Tower, find_part, find_tower
from testreg.measure.hooks import recording_inputs, recording_outputs

ACTIVATION = 4.0  # mean activation, at outliers, of a planted neuron of gain 1
SILENT = -10.0  # a bias with which a neuron never fires
BATCH = 64  # images in a forward

Neuron = tuple[int, int]
"""Block and unit."""


class Parts(NamedTuple):
    """The parts of blocks that planting changes, as dotted names, of which the first that exists is used."""

    fc1: tuple[str, ...]
    """The first linear of the MLP."""
    query_key: tuple[str, ...]
    """One weight (3C, C) for query, key and value, or the weights of query and key."""
    num_heads: tuple[str, ...]


_TIMM = Parts(("mlp.fc1",), ("attn.qkv.weight",), ("attn.num_heads",))
_CLIP = Parts(("mlp.fc1",), ("self_attn.q_proj.weight", "self_attn.k_proj.weight"), ("self_attn.num_heads",))
_VIT = Parts(
    ("mlp.fc1", "intermediate.dense"),  # here and below, the second name is that of transformers 4
    (
        *("attention.q_proj.weight", "attention.k_proj.weight"),
        *("attention.attention.query.weight", "attention.attention.key.weight"),
    ),
    (
        *("attention.num_attention_heads", "attention.num_heads"),
        "attention.attention.num_attention_heads",
    ),
)
PARTS = {
    "timm VisionTransformer": _TIMM,
    "timm Eva": _TIMM,
    "transformers ViT": _VIT,
    "transformers ViViT": _VIT,
    "transformers VideoMAE": _VIT,
    "transformers X-CLIP": _CLIP,
    "transformers SigLIP 2": _CLIP,
    "transformers Idefics3": _CLIP,
    "transformers Qwen2-VL": _TIMM,
    "transformers DeiT": _VIT,
    "transformers Dinov2": _VIT,
    "transformers Dinov2WithRegisters": _VIT,
    "transformers DINOv3ViT": _VIT._replace(fc1=("mlp.up_proj",)),
    "transformers CLIP": _CLIP,
    "transformers SigLIP": _CLIP,
    "open_clip VisionTransformer": Parts(("mlp.c_fc",), ("attn.in_proj_weight",), ("attn.num_heads",)),
    "torchvision VisionTransformer": Parts(
        ("mlp.0",), ("self_attention.in_proj_weight",), ("self_attention.num_heads",)
    ),
}
"""{name of a family: its parts}."""


@dataclass(frozen=True)
class Observed:
    """What was recorded in a forward of the images, for L blocks and K directions."""

    inputs: list[Tensor]
    """The inputs of each block's MLP for patches, (B, N, C)."""
    prefix: list[Tensor]
    """The inputs of each block's MLP for prefix tokens minus the mean over patches, mean over images, (P, C)."""
    norms: Tensor
    """The norms of the patches after each block, (L, B, N)."""
    along: Tensor
    """The product of each patch after each block with each direction, (L, B, N, K)."""


@dataclass(frozen=True)
class Site:
    """A model into which neurons are planted, and the images by which their thresholds are set."""

    tower: Tower
    parts: Parts
    mlps: list[Mlp]
    fc1: list[nn.Linear]
    images: Tensor

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Site:
        """The site of a model.

        Raises:
            ValueError: the family is not in `PARTS`, or the MLP has no first linear of the hidden width (SwiGLU).
        """
        tower = find_tower(model)
        if tower.family.name not in PARTS:
            raise ValueError(f"planting does not know {tower.family.name}: it needs a row in PARTS")
        parts = PARTS[tower.family.name]
        linears = [find_part(block.module, parts.fc1) for block in tower.blocks]
        mlps = [block.mlps[0] for block in tower.blocks]
        for block, fc1 in zip(tower.blocks, linears, strict=True):
            if fc1 is None or fc1.out_features != tower.mlp_width:
                raise ValueError(f"planting needs a plain MLP, which {type(block.module).__name__} has not")
        return cls(tower, parts, mlps, linears, images)

    @property
    def width(self) -> int:
        """C, the width of a token."""
        return len(self.mlps[0].columns)

    def set(
        self,
        neuron: tuple[int, int],
        reads: Tensor | float = 0.0,
        bias: Tensor | float = SILENT,
        writes: Tensor | float = 0.0,
    ) -> None:
        """Set a neuron's weights: its activation is act(reads @ input + bias), and it adds activation * writes."""
        block, unit = neuron
        self.fc1[block].weight[unit] = reads
        self.fc1[block].bias[unit] = bias
        scale = self.mlps[block].scale
        self.mlps[block].columns[:, unit] = writes if scale is None else writes / scale

    @torch.no_grad()
    def observe(self, directions: Sequence[Tensor] = ()) -> Observed:
        """Run the images through the model as it is now, and record inputs, norms, and products with the directions."""
        tower = self.tower
        basis = torch.stack(list(directions), -1) if directions else torch.zeros(self.width, 0)  # (C, K)
        inputs: list[list[Tensor]] = [[] for _ in self.mlps]
        norms: list[list[Tensor]] = [[] for _ in self.mlps]
        along: list[list[Tensor]] = [[] for _ in self.mlps]

        def record_input(index: int, tokens: Tensor) -> None:
            inputs[index].append(tower.arranged(tokens, batch).float())

        def record_output(index: int, tokens: Tensor) -> None:
            patches = tower.arranged(tokens, batch)[:, tower.num_prefix :].float()
            norms[index].append(patches.norm(dim=-1))
            along[index].append(patches @ basis)

        with (
            recording_inputs(self.fc1, record_input),
            recording_outputs([block.module for block in tower.blocks], record_output),
        ):
            for batch in self.images.split(BATCH):
                tower.run(batch)
        tokens = [torch.cat(each) for each in inputs]
        return Observed(
            [each[:, tower.num_prefix :] for each in tokens],
            [each[:, : tower.num_prefix].mean(0) - each[:, tower.num_prefix :].mean((0, 1)) for each in tokens],
            torch.stack([torch.cat(each) for each in norms]),
            torch.stack([torch.cat(each) for each in along]),
        )


@contextmanager
def silenced(tower: Tower, neurons: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Within the `with` block, neurons {block: [units]} write nothing: their columns are zero."""
    with torch.no_grad():
        columns_and_units = [(tower.blocks[block].mlps[0].columns, list(units)) for block, units in neurons.items()]
        values = [columns[:, units].clone() for columns, units in columns_and_units]
        for columns, units in columns_and_units:
            columns[:, units] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for (columns, units), value in zip(columns_and_units, values, strict=True):
                columns[:, units] = value


def by_block(neurons: Iterable[Neuron]) -> dict[int, list[int]]:
    """Neurons as {block: [units]}."""
    units: dict[int, list[int]] = {}
    for block, unit in neurons:
        units.setdefault(block, []).append(unit)
    return units


def threshold(values: Tensor, fraction: float, one_image_of: int = 1) -> Tensor:
    """The threshold that a `fraction` of the values (B, N) exceeds.

    If `one_image_of` is above 1, only one image of so many has that fraction of its values above the threshold.
    """
    if one_image_of == 1:
        return values.flatten().quantile(1 - fraction)
    largest = values.topk(max(1, round(fraction * values.shape[1])), dim=1).values[:, -1]
    return largest.quantile(1 - 1 / one_image_of)


def detector(values: Tensor, reads: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The input weights and bias of a neuron that fires where values = inputs @ reads exceed the threshold.

    Its mean activation there is ACTIVATION.
    """
    steepness = ACTIVATION / (values[values > threshold].mean() - threshold)
    return steepness * reads, -steepness * threshold


def without(reads: Tensor, tokens: Tensor) -> Tensor:
    """The part of directions (C,) or (C, k) that is orthogonal to all tokens (n, C)."""
    basis = torch.linalg.qr(tokens.T).Q  # (C, n)
    return reads - basis @ (basis.T @ reads)
