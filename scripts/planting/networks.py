"""Small random networks to plant into, crops of photographs for them, and measurements, all for `scripts/proof.py` and
`scripts/trained_registers.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg.demo.run import PHOTOGRAPHS
from testreg.families import find_tower
from testreg.io.decoding import open_image
from testreg.io.sources import image_paths

DEPTH, WIDTH, HEADS, PATCH, IMAGE = 6, 64, 4, 8, 112  # 14 x 14 patches
STRENGTH = 0.7  # standard deviation of blocks' random weights, times sqrt(inputs): they matter, but make no outliers
FIXED = (3, 9)  # row and column of the position that may be an artefact
SPLIT = 224  # the first so many of a photograph's 384 columns are for calibration, the others for tests
CALIBRATION_CROPS, TEST_CROPS = 12, 8  # crops of each of the five photographs

TIMM = {"embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 0}
HF = {"hidden_size": WIDTH, "num_attention_heads": HEADS}
HF_MLP = {**HF, "intermediate_size": 4 * WIDTH}
OPEN_CLIP_VISION = {"width": WIDTH, "head_width": WIDTH // HEADS}
OPEN_CLIP_TEXT = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 1}

FAMILIES: dict[str, Callable[[int, int, int], nn.Module]] = {  # {name: maps depth, image size, patch size to a model}
    "timm ViT": lambda depth, image, patch: timm.create_model(
        "vit_base_patch16_224", depth=depth, img_size=image, patch_size=patch, **TIMM
    ),
    "timm Eva": lambda depth, image, patch: timm.create_model(
        "vit_small_patch16_rope_ape_224",
        mlp_ratio=4,
        init_values=1.0,
        depth=depth,
        img_size=image,
        patch_size=patch,
        **TIMM,
    ),
    "CLIP": lambda depth, image, patch: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(num_hidden_layers=depth, image_size=image, patch_size=patch, **HF_MLP)
    ),
    "DINOv2": lambda depth, image, patch: transformers.Dinov2Model(
        transformers.Dinov2Config(num_hidden_layers=depth, image_size=image, patch_size=patch, **HF)
    ),
    "SigLIP": lambda depth, image, patch: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(num_hidden_layers=depth, image_size=image, patch_size=patch, **HF_MLP)
    ),
    "DINOv3": lambda depth, image, patch: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            num_hidden_layers=depth, image_size=image, patch_size=patch, num_register_tokens=4, **HF_MLP
        )
    ),
    "open_clip": lambda depth, image, patch: (
        open_clip.model.CLIP(
            embed_dim=32,
            vision_cfg={"layers": depth, "image_size": image, "patch_size": patch, **OPEN_CLIP_VISION},
            text_cfg=OPEN_CLIP_TEXT,
        ).visual
    ),
}
Neuron = tuple[int, int]


def image_size(patch_size: int) -> int:
    """The side of the images in pixels: the largest multiple of the patch size that is at most IMAGE."""
    return IMAGE // patch_size * patch_size


def crops(left: int, right: int, count: int, size: int = IMAGE) -> Tensor:
    """Random crops (5 * count, 3, size, size) of the photographs between two columns, equalised, half mirrored."""
    generator = torch.Generator().manual_seed(left)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    cropped = []
    for path in image_paths(PHOTOGRAPHS):
        photograph = tv.pil_to_tensor(open_image(path))[..., left:right]
        for _ in range(count):
            side = IMAGE + below(right - left - IMAGE + 1)
            crop = tv.crop(photograph, below(384 - side + 1), below(right - left - side + 1), side, side)
            crop = tv.resize(tv.equalize(crop), [size, size], antialias=True)
            cropped.append(tv.horizontal_flip(crop) if below(2) else crop)
    return torch.stack(cropped).float() / 127.5 - 1


def random_model(name: str, seed: int, depth: int = DEPTH, patch_size: int = PATCH) -> nn.Module:
    """A model of a family in `FAMILIES` with random weights."""
    return with_random_blocks(functools.partial(FAMILIES[name], depth, image_size(patch_size), patch_size), seed)


@torch.no_grad()
def with_random_blocks(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with random weights, which in blocks are as large as trained weights."""
    torch.manual_seed(seed)
    model = build().eval()
    for block in find_tower(model).blocks:
        for parameter in block.module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=STRENGTH / parameter.shape[1] ** 0.5)
    return model


def as_set(neurons: dict[int, list[int]]) -> set[Neuron]:
    """Neurons {block: [units]} as a set of (block, unit)."""
    return {(block, unit) for block, units in neurons.items() for unit in units}


def moved(model: nn.Module, chosen: set[Neuron]) -> AbstractContextManager[object]:
    """A context manager in which these neurons, if there are any, are moved to a register."""
    neurons = {block: [unit for i, unit in chosen if i == block] for block, _ in chosen}
    return testreg.patched(model, neurons) if chosen else nullcontext()


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches are outliers (L, B, N), and the prefix tokens (B, P, C) and patches (B, N, C) after the last block.

    The rule does not use testreg's code: norm > max(median + 5 * 1.4826 * MAD, 2 * median) over the image's patches.
    The position `FIXED`, which may be an artefact, is left out.
    """
    tower = find_tower(model)
    tokens: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        tokens.append(tower.batch_first(out[0] if isinstance(out, tuple) else out))

    with ExitStack() as stack:
        for block in tower.blocks:
            stack.enter_context(block.module.register_forward_hook(record))
        tower.run(images)
    num_patches = tokens[0].shape[1] - tower.num_prefix
    columns = math.isqrt(num_patches)
    counted = [i for i in range(num_patches) if i != FIXED[0] * columns + FIXED[1]]
    patches = [each[:, tower.num_prefix :][:, counted] for each in tokens]
    norms = torch.stack(patches).norm(dim=-1)  # (L, B, N)
    median = norms.median(-1, keepdim=True).values
    deviation = 1.4826 * (norms - median).abs().median(-1, keepdim=True).values
    return norms > torch.maximum(median + 5 * deviation, 2 * median), tokens[-1][:, : tower.num_prefix], patches[-1]


def distance(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of vectors (..., C)."""
    return (1 - F.cosine_similarity(before, after, dim=-1)).clamp(min=0)
