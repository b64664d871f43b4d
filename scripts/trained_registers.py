"""How calibration deals with models that have trained registers, measured where the answer is known.

    python scripts/trained_registers.py            # about ten minutes on one core

Models are small, random and *planted* (`planting`), as in `scripts/proof.py`. Each has four trained registers, i.e.
extra tokens that it was trained with, and one of two things is planted:

- A mechanism makes outliers (patches of huge norm), although there are trained registers. Does `testreg.calibrate`,
  which is told nothing, find the neurons, and are the outliers gone on crops that it did not see?
- Neurons give a trained register a huge norm, and heads attend to it: it plays the role of outliers. Does
  `testreg.diagnose` say that there is nothing to fix, and does `testreg.calibrate` leave the model alone?
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import timm
import torch
import transformers
from planting import Mechanism, plant, plant_on_register
from planting.networks import (
    CALIBRATION_CROPS,
    HF,
    HF_MLP,
    IMAGE,
    PATCH,
    SPLIT,
    TEST_CROPS,
    TIMM,
    as_set,
    crops,
    distance,
    moved,
    observe,
    with_random_blocks,
)
from torch import Tensor, nn
from tqdm import tqdm

import testreg
from testreg.calibration.errors import NoOutliersError

DEPTH = 8
SIZES = {"image_size": IMAGE, "patch_size": PATCH}
MECHANISMS: tuple[Mechanism, ...] = ("direct", "triggers", "spread")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm reg4": lambda: timm.create_model(
        "vit_base_patch14_reg4_dinov2", depth=DEPTH, img_size=IMAGE, patch_size=PATCH, **TIMM
    ),
    "DINOv2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(num_hidden_layers=DEPTH, num_register_tokens=4, **SIZES, **HF)
    ),
    "DINOv3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(num_hidden_layers=DEPTH, num_register_tokens=4, **SIZES, **HF_MLP)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=1, help="models of each kind")
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    images, unseen = crops(0, SPLIT, CALIBRATION_CROPS), crops(SPLIT, 384, TEST_CROPS)
    print("| model | mechanism | seed | planted | moved, of planted | outliers before | left | cosine of patches |")
    print("|---|---|---|---|---|---|---|---|")
    for name in tqdm(MODELS, desc="outliers on patches", disable=None):
        for mechanism in MECHANISMS:
            for seed in seeds:
                print(on_patches(name, mechanism, seed, images, unseen), flush=True)
    print("\n| model | seed | diagnosis | calibrate | register, CLS / median norm | attention to it |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        for seed in seeds:
            print(on_register(name, seed, images), flush=True)


def on_patches(name: str, mechanism: Mechanism, seed: int, images: Tensor, unseen: Tensor) -> str:
    """A row of the first table: outliers among the patches."""
    model = with_random_blocks(MODELS[name], seed)
    planted = plant(model, images, mechanism=mechanism, seed=seed)
    chosen = as_set(testreg.calibrate(model, images, progress=False).by_block())
    with planted.silenced(model):
        _, _, truth = observe(model, unseen)
    before, _, _ = observe(model, unseen)
    with moved(model, chosen):
        after, _, patches = observe(model, unseen)
    neurons, most = as_set(planted.neurons), before.sum((1, 2)).max()
    cosine = 1 - float(distance(patches, truth).mean())
    fraction, left = float(most / before[0].numel()), float(after.sum((1, 2)).max() / most)
    counts = f"{len(chosen)}, {len(chosen & neurons)}"
    return f"| {name} | {mechanism} | {seed} | {len(neurons)} | {counts} | {fraction:.1%} | {left:.1%} | {cosine:.3f} |"


def on_register(name: str, seed: int, images: Tensor) -> str:
    """A row of the second table: a trained register in the role of outliers."""
    model = with_random_blocks(MODELS[name], seed)
    plant_on_register(model, images, register=seed % 4, seed=seed)
    diagnosis = testreg.diagnose(model, images, progress=False)
    try:
        testreg.calibrate(model, images, progress=False)
        calibration = "finds neurons"
    except NoOutliersError:
        calibration = "leaves it alone"
    roles = [role for role in diagnosis.prefix_roles if role.is_register]
    (role,) = roles or [None]
    ratios = "-" if role is None else f"{role.ratio:.1f}, {diagnosis.blocks[role.block].after_mlp.prefix_ratio[0]:.1f}"
    attention = "-" if role is None or role.attention is None else f"{role.attention:.0%}"
    return f"| {name} | {seed} | {diagnosis.verdict} | {calibration} | {ratios} | {attention} |"


if __name__ == "__main__":
    main()
