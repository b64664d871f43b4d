"""The models that are measured, which have random weights, and their images."""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from planting import plant
from torch import Tensor, nn
from torch.utils.data import Dataset

from testreg.families import find_tower

NUM_NEURONS, BLOCKS = 50, (3, 4, 5, 6, 7, 8)  # how many neurons are moved, and in which blocks
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 0}


def build(args: argparse.Namespace, dtype: torch.dtype, *, with_outliers: bool = False) -> nn.Module:
    """The model that the arguments name, with planted outliers if calibration needs them."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=False)
    if with_outliers:
        plant(model, random_images(8, model))
    return model.to(args.device, dtype).eval()


def small_planted() -> nn.Module:
    """A ViT of 6 blocks and 65 tokens with planted outliers, for measurements on many images."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    made = MadeImages(32)
    plant(model, torch.stack([made[i] for i in range(len(made))]))
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its weights. (Weights elsewhere in memory could change the times.)"""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def one_more_token(model: nn.Module) -> nn.Module:
    """Append a zero token to the input of the first block of `model`, in place: the least that a register can cost."""

    def append(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, *others = inputs
        return torch.cat((tokens, tokens.new_zeros(len(tokens), 1, tokens.shape[-1])), dim=1), *others

    blocks = find_tower(model).blocks
    blocks[0].module.register_forward_pre_hook(append)
    blocks[-1].module.register_forward_hook(lambda block, inputs, output: output[:, :-1])
    return model


def neurons(model: nn.Module) -> dict[int, list[int]]:
    """Random neurons {block: [units]}, as many as a list for a large network has."""
    generator, width = torch.Generator().manual_seed(0), find_tower(model).mlp_width
    units: dict[int, list[int]] = {block: [] for block in BLOCKS}
    for i, unit in enumerate(torch.randperm(width, generator=generator)[:NUM_NEURONS].tolist()):
        units[BLOCKS[i % len(BLOCKS)]].append(unit)
    return units


def random_images(count: int, model: nn.Module) -> Tensor:
    """Random images of the model's input size, on its device and in its dtype."""
    weight = next(model.parameters())
    return torch.rand(count, *model.default_cfg["input_size"]).to(weight.device, weight.dtype)


class MadeImages(Dataset[Tensor]):
    """A data set of images (3, 64, 64) that are made when they are read, always the same, so that they take no memory.

    Attributes:
        read: the indices of the images that were read.
    """

    def __init__(self, count: int) -> None:
        self.count, self.read = count, set[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.read.add(index)
        generator = torch.Generator().manual_seed(index)
        brightness = torch.rand(1, 8, 8, generator=generator)  # of each patch
        noise = torch.rand(3, 64, 64, generator=generator)
        return brightness.repeat_interleave(8, 1).repeat_interleave(8, 2) + 0.5 * noise - 0.75
