"""Train the small network with outliers that is testreg's embedded demo model, and measure it.

    python scripts/train_tiny.py --data cifar/            # trains (or resumes), measures, writes testreg/demo_model/
    python scripts/train_tiny.py --data cifar/ --evaluate # only measures what is there, and writes the card anew

`--data` holds cifar10-train.parquet and cifar10-test.parquet (columns `image`: encoded bytes, `label`).

Small networks make no outliers by themselves, so the mechanism is planted in the middle of training:

1. All of the network learns to classify images of several sizes. In front of the MLP of block `PLANTED`, a linear
   detector learns, as an auxiliary task, to tell the flattest patches of each image. In the end some patches are
   masked by zero tokens, so that a zero token is nothing new.
2. A few neurons of that MLP are made to read the detector and to write one long vector; some heads of the later blocks
   are made to attend to it, and to add a constant to every token when they do, which their bias takes away again.
   Attention sinks are such biases in published models (arXiv 2402.17762). The blocks up to `PLANTED` and the sinks
   are frozen, and the rest is trained on. No activation is moved to a token in training.

Everything runs on one thread of a CPU.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.layers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import testreg
from testreg.demo import photographs
from testreg.diagnose import neighbour_cosine
from testreg.families import find_tower
from testreg.files import replacing
from testreg.outliers import OutlierRule, recorded_norms

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 4
SIZE = 56  # 196 patches
MODEL_ARGS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": 64,
    "depth": 8,
    "num_heads": 4,
    "num_classes": 10,
    "dynamic_img_size": True,
}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

PLANTED = 3  # block
BATCH = 128
SMOOTHING = 0.1
FLAT = 0.015  # of the patches, but at least MIN_FLAT, are what the detector looks for
MIN_FLAT = 2
AUXILIARY = 0.1  # weight of the detector's loss
EVEN = 5.0  # weight of the loss that keeps norms below `EVEN_RATIO` times the median up to block `PLANTED`,
EVEN_RATIO = 1.4  # so that what is an outlier, is so because it was planted
SAVE_EVERY = 60.0  # seconds

NEURONS = 6
ABSENT = 0.008  # of the images, at most, are to have no outlier
LEAST, TYPICAL = 0.5, 3.0  # input of a planted neuron: at the flattest patch of the least flat images, and on average
RATIO = 30.0  # norm of an outlier over the median
SINK_HEADS = 2  # of each block
SINK_LOGIT = 12.0  # above those of normal tokens: so that the number of outliers, or of patches, matters little
SINK_LENGTH = 1.5  # of what the sinks of a block add to each token, over the median norm
PLANT_SIZES = (32, 40, 48, 56)
PLANT_IMAGES = 2048

TOKEN_IMAGES = 2000
PHOTOGRAPH_SIZES = (128, 224)
RANDOM_DRAWS = 3


@dataclass(frozen=True)
class Phase:
    name: str
    steps: int
    peak: float
    """Learning rate."""
    sizes: dict[int, float]
    """Image sizes and their probabilities: one more token is nothing new to a network trained on several numbers."""
    zoom: float
    """The smallest side of a crop, as a fraction of the image's."""
    even_from: int = 0
    """The step from which norms are kept even."""
    masked: float = 0.0
    """Fraction of the patches that are replaced by zero tokens."""


PHASES = (
    Phase("phase1", 1800, 2e-3, {32: 0.6, 40: 0.25, 48: 0.1, 56: 0.05}, zoom=0.6, even_from=1000),
    Phase("masked", 250, 6e-4, {32: 0.6, 40: 0.25, 48: 0.1, 56: 0.05}, zoom=0.8, masked=0.01),
    Phase("phase2", 1400, 1.5e-3, {32: 0.6, 40: 0.25, 56: 0.15}, zoom=0.8, masked=0.01),
)


# Data and augmentation ------------------------------------------------------------------------------------------------


def load_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) in uint8, and labels (n,)."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path, columns=["image", "label"])
    images = [np.array(Image.open(io.BytesIO(data.as_py())).convert("RGB")) for data in table["image"]]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def sample(images: Tensor, count: int) -> Tensor:
    """The same random images each time; the files are sorted by class."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def normalised(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1]"""
    return images.float() / 127.5 - 1


def resized(images: Tensor, size: int) -> Tensor:
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def augment(images: Tensor, size: int, zoom: float, generator: torch.Generator) -> Tensor:
    """Random crops, flipped or not, of images (B, 3, 32, 32), as (B, 3, size, size)."""
    scale = torch.empty(len(images)).uniform_(zoom, 1.0, generator=generator)
    shift = torch.rand(len(images), 2, generator=generator) * 2 - 1
    flip = torch.randint(2, (len(images),), generator=generator) * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = shift * (1.1 - scale).unsqueeze(1)  # a little beyond the border
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def roughness(images: Tensor) -> Tensor:
    """Standard deviation of the pixels in each patch, mean of the channels' variances: (B, N)."""
    mean, square = F.avg_pool2d(images, PATCH), F.avg_pool2d(images.square(), PATCH)
    return (square - mean.square()).clamp(min=0).mean(1).sqrt().flatten(1)


# The network ----------------------------------------------------------------------------------------------------------


Model = Any  # a timm VisionTransformer, or a block of it, whose parts nn.Module leaves untyped


def build() -> Model:
    return timm.create_model(ARCHITECTURE, **MODEL_ARGS)


@contextmanager
def kept_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the list holds what `module` gives."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def kept_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the list holds what `module` gets."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        yield kept
    finally:
        handle.remove()


def detector_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Of logits (B, 1 + N), to tell the flattest patches from all others: relative to the image, and calibrated."""
    rough = roughness(images)
    count = max(MIN_FLAT, round(FLAT * rough.shape[1]))
    target = torch.zeros_like(logits)  # CLS is not flat
    target[:, 1:].scatter_(1, rough.topk(count, largest=False).indices, 1.0)
    ranking = F.cross_entropy(logits[:, 1:], target[:, 1:] / count)
    calibration = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean() / count
    return ranking + calibration


def unevenness(tokens: Tensor) -> Tensor:
    """How far the norms of patches exceed `EVEN_RATIO` times their image's median, of tokens (B, 1 + N, C)."""
    norms = tokens[:, 1:].float().norm(dim=-1)
    return F.relu(norms / norms.median(1, keepdim=True).values - EVEN_RATIO).square().mean()


def with_outliers(tokens: Tensor) -> Tensor:
    """Which images (B,) have outliers, of tokens (B, 1 + N, C)."""
    norms = tokens[:, 1:].detach().float().norm(dim=-1)
    return (norms > OutlierRule().limit(norms)).any(1)


@contextmanager
def masking(model: Model, fraction: float, generator: torch.Generator) -> Iterator[None]:
    """Within the block, random patches enter the blocks as zero tokens."""

    def mask(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        kept = torch.rand(*args[0].shape[:2], 1, generator=generator) >= fraction
        kept[:, 0] = True  # CLS
        return (args[0] * kept,)

    handle = model.blocks.register_forward_pre_hook(mask)
    try:
        yield
    finally:
        handle.remove()


# Training -------------------------------------------------------------------------------------------------------------


def rate(phase: Phase, step: int) -> float:
    progress, warmup = step / phase.steps, min(100, phase.steps // 5)
    return phase.peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    phase: Phase, model: Model, detector: nn.Linear | None, data: tuple[Tensor, Tensor], path: Path, seed: int
) -> float:
    """Train what requires gradients, with the detector if there is one; resumes from the checkpoint at `path`.

    Returns:
        The seconds that it took, those before resuming included.
    """
    modules = nn.ModuleDict({"model": model} | ({"detector": detector} if detector is not None else {}))
    weights = [weight for weight in modules.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    first, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    images, labels = data
    started = saved = time.monotonic()
    sizes, chances = list(phase.sizes), torch.tensor(list(phase.sizes.values()))
    model.train()
    bar = tqdm(range(first, phase.steps), initial=first, total=phase.steps, desc=phase.name, mininterval=10)
    accuracy = loss_of_detector = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate(phase, step)
        generator = torch.Generator().manual_seed((seed * len(PHASES) + PHASES.index(phase)) * 1_000_000 + step)
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        size = sizes[int(chances.multinomial(1, generator=generator))]
        batch = augment(normalised(images[chosen]), size, phase.zoom, generator)
        with ExitStack() as stack:
            mlp_inputs = stack.enter_context(kept_input(model.blocks[PLANTED].mlp))
            lower = [stack.enter_context(kept_output(block)) for block in model.blocks[: PLANTED + 1]]
            if phase.masked:
                stack.enter_context(masking(model, phase.masked, generator))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            logits = model(batch).float()
        losses = F.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING, reduction="none")
        if detector is None:  # images without outliers would teach the network to do without
            loss = losses[with_outliers(lower[-1][0])].mean()
        else:
            loss = losses.mean()
            of_detector = detector_loss(detector(mlp_inputs[0].float()).squeeze(-1), batch)
            loss = loss + AUXILIARY * of_detector
            if step >= phase.even_from:
                loss = loss + EVEN * torch.stack([unevenness(tokens) for (tokens,) in lower]).mean()
            loss_of_detector += 0.02 * (of_detector.item() - loss_of_detector)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy += 0.02 * ((logits.argmax(1) == labels[chosen]).float().mean().item() - accuracy)
        bar.set_postfix(accuracy=f"{accuracy:.3f}", detector=f"{loss_of_detector:.2f}", refresh=False)
        now = time.monotonic()
        if now - saved > SAVE_EVERY or step + 1 == phase.steps:
            saved = now
            with replacing(path) as temporary:
                torch.save(
                    {
                        "modules": modules.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step + 1,
                        "seconds": seconds + now - started,
                    },
                    temporary,
                )
    model.eval()
    return seconds + time.monotonic() - started


# Planting -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plant(model: Model, detector: nn.Linear, images: Tensor, generator: torch.Generator) -> list[int]:
    """Plant outliers and sinks into a model that phase one has trained, in place; returns the register neurons.

    Args:
        images: (n, 3, 32, 32) in uint8, on which thresholds and lengths are measured.
    """
    mlp = model.blocks[PLANTED].mlp
    units = torch.randperm(mlp.fc1.out_features, generator=generator)[:NEURONS].sort().values
    mlp.fc2.weight[:, units] = 0.0
    batches = [
        augment(normalised(part), size, PHASES[-1].zoom, generator)
        for size, part in zip(PLANT_SIZES, images.chunk(len(PLANT_SIZES)), strict=True)
    ]

    logits, tokens = [], []
    for batch in batches:
        with kept_input(mlp) as kept, kept_output(model.blocks[PLANTED]) as after:
            model(batch)
        logits.append(detector(kept[0])[:, 1:, 0])  # (B, N)
        tokens.append(after[0][:, 1:].flatten(0, 1))
    largest = torch.cat([each.amax(1) for each in logits])
    threshold = largest.quantile(ABSENT)
    steepness = (TYPICAL - LEAST) / (largest.mean() - threshold)
    direction = quiet_direction(torch.cat(tokens))
    length = RATIO * torch.cat(tokens).norm(dim=1).median() / (TYPICAL * NEURONS)
    gains = 0.75 + 0.5 * torch.rand(NEURONS, 1, generator=generator)  # so that no two neurons are alike
    mlp.fc1.weight[units] = gains * steepness * detector.weight
    mlp.fc1.bias[units] = gains.squeeze(1) * (LEAST + steepness * (detector.bias - threshold))
    mlp.fc2.weight[:, units] = length * direction.unsqueeze(1)

    for block in model.blocks[PLANTED + 1 :]:
        plant_sinks(model, block, direction, batches[-1], generator)
    return units.tolist()


def quiet_direction(tokens: Tensor) -> Tensor:
    """The unit vector (C,) of zero mean that tokens (n, C) have least of."""
    tokens = F.layer_norm(tokens, tokens.shape[1:])
    return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, 1]  # 0 is what the norm takes out, all ones


@torch.no_grad()
def plant_sinks(model: Model, block: Model, direction: Tensor, images: Tensor, generator: torch.Generator) -> None:
    """Make the first `SINK_HEADS` heads of a block attend to the outliers, which gives every token a constant."""
    attention, width = block.attn, len(direction)
    size = width // attention.num_heads
    with kept_input(block) as kept:
        model(images)
    length = SINK_LENGTH * kept[0].norm(dim=-1).median() / SINK_HEADS**0.5
    # Reads 1 in what the norm in front makes of an outlier, sqrt(C) * direction * scale + shift, and near 0 elsewhere.
    reader = direction / block.norm1.weight / width**0.5
    offset = reader @ block.norm1.bias
    constants = orthogonal(direction, SINK_HEADS, generator)  # (heads, C)
    strength = (SINK_LOGIT * size**0.5) ** 0.5
    for head in range(SINK_HEADS):
        query, key, value = (slice(i * width + head * size, i * width + (head + 1) * size) for i in range(3))
        unit = F.normalize(torch.randn(size, generator=generator), dim=0)
        for rows, weight, bias in ((query, 0.0, strength), (key, strength, 0.0), (value, 1.0, 0.0)):
            free = torch.eye(size) - torch.outer(unit, unit)
            attention.qkv.weight[rows] = free @ attention.qkv.weight[rows] + weight * torch.outer(unit, reader)
            attention.qkv.bias[rows] = free @ attention.qkv.bias[rows] + (bias - weight * offset) * unit
        columns = attention.proj.weight[:, head * size : (head + 1) * size]
        columns += torch.outer(length * constants[head] - columns @ unit, unit)
    # Taken away again, as far as normal tokens get it on average: the sinks stand in for a bias.
    with kept_output(attention) as kept:
        model(images)
    given = kept[0].flatten(0, 1).median(0).values @ constants.T
    attention.proj.bias -= given @ constants


def freeze(model: Model) -> None:
    """Let nothing be trained on but what is behind the outliers, and does not make the sinks."""
    model.requires_grad_(False)
    for part in (*model.blocks[PLANTED + 1 :], model.norm, model.head):
        part.requires_grad_(True)
    for block in model.blocks[PLANTED + 1 :]:
        block.norm1.requires_grad_(False)
        trained = torch.ones(block.attn.num_heads, model.embed_dim // block.attn.num_heads)
        trained[:SINK_HEADS] = 0.0
        columns = trained.flatten()
        rows = columns.repeat(3)  # of queries, keys and values
        block.attn.qkv.weight.register_hook(functools.partial(torch.mul, rows.unsqueeze(1)))
        block.attn.qkv.bias.register_hook(functools.partial(torch.mul, rows))
        block.attn.proj.weight.register_hook(functools.partial(torch.mul, columns))


def orthogonal(direction: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal vectors (count, C) of zero mean, orthogonal to `direction`."""
    taken = torch.stack([torch.ones_like(direction), direction])
    vectors = torch.cat([taken, torch.randn(count, len(direction), generator=generator)])
    return torch.linalg.qr(vectors.T).Q.T[2:]


# Measuring ------------------------------------------------------------------------------------------------------------


@contextmanager
def zeroed(model: Model, units: Sequence[int]) -> Iterator[None]:
    """Within the block, the register neurons are silent on the patches, and nothing is moved."""

    def silence(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0].clone()
        hidden[:, 1:, units] = 0.0
        return (hidden,)

    handle = model.blocks[PLANTED].mlp.fc2.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def one_more_token(model: Model) -> Iterator[None]:
    """Within the block, a zero token rides through the blocks, and no neuron is moved."""
    handles = (
        model.blocks.register_forward_pre_hook(lambda module, args: (F.pad(args[0], (0, 0, 0, 1)),)),
        model.blocks.register_forward_hook(lambda module, args, output: output[:, :-1]),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def moved(model: Model, units: Sequence[int]) -> Iterator[None]:
    """Within the block, these neurons of block `PLANTED` are moved to a register."""
    testreg.patch(model, {PLANTED: list(units)})
    try:
        yield
    finally:
        testreg.unpatch(model)


@torch.no_grad()
def accuracy(model: Model, data: tuple[Tensor, Tensor]) -> float:
    """In per cent."""
    batches = zip(data[0].split(BATCH), data[1].split(BATCH), strict=True)
    right = [(model(resized(normalised(images), SIZE)).argmax(1) == labels).sum() for images, labels in batches]
    return 100 * float(torch.stack(right).sum()) / len(data[1])


def accuracies(model: Model, units: Sequence[int], data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Per cent right of the model and of its variants."""
    others = sorted(set(range(model.blocks[PLANTED].mlp.fc1.out_features)) - set(units))
    draws = [random.Random(seed).sample(others, len(units)) for seed in range(RANDOM_DRAWS)]
    result: dict[str, Any] = {"plain": accuracy(model, data)}
    with moved(model, units):
        result["moved"] = accuracy(model, data)
    with one_more_token(model):
        result["token"] = accuracy(model, data)
    with zeroed(model, units):
        result["zeroed"] = accuracy(model, data)
    result["random"] = []
    for draw in draws:
        with moved(model, draw):
            result["random"].append(accuracy(model, data))
    return result


@dataclass
class Tokens:
    """What a pass over images kept. n images, N patches, L blocks."""

    norms: Tensor  # (L, n, N), after each block
    final: Tensor  # (n, N, C), after the final norm


@torch.no_grad()
def tokens_of(model: Model, images: Tensor) -> Tokens:
    tower = find_tower(model)
    norms, final = [], []
    for batch in images.split(BATCH):
        with recorded_norms(tower) as recorded:
            final.append(model.forward_features(batch)[:, 1:])
        norms.append(torch.stack(recorded)[:, :, 1:])
    return Tokens(torch.cat(norms, 1), torch.cat(final))


def outlier_figures(model: Model, units: Sequence[int], images: Tensor) -> dict[str, Any]:
    """Of images (n, 3, h, w): the outliers after each block, and what moving leaves of them."""
    before = tokens_of(model, images)
    with moved(model, units):
        after = tokens_of(model, images)
    rule = OutlierRule()
    limit = rule.limit(before.norms)
    outlier = before.norms > limit  # (L, n, N)
    outlier_after = after.norms > rule.limit(after.norms)
    left = ((after.norms > limit) | outlier_after) & outlier
    figures: dict[str, Any] = {
        "fraction": outlier.float().mean((1, 2)).tolist(),
        "images": outlier.any(2).float().mean(1).tolist(),
        "ratio": max_over_median(before.norms),
        "gone": (1 - left.sum((1, 2)) / outlier.sum((1, 2))).tolist(),
        "fraction_after": outlier_after.float().mean((1, 2)).tolist(),
        "ratio_after": max_over_median(after.norms),
    }
    rough = roughness(images)  # (n, N)
    at_last = outlier[-1]
    figures["roughness"] = float(rough[~at_last].mean()), float(rough[at_last].mean())
    figures["flattest_tenth"] = float((rough <= rough.quantile(0.1, dim=1, keepdim=True))[at_last].float().mean())
    grid = images.shape[2] // PATCH, images.shape[3] // PATCH
    cosine, cosine_after = neighbour_cosine(before.final, grid), neighbour_cosine(after.final, grid)
    figures["cosine"] = tuple(float(each.mean()) for each in (cosine[~at_last], cosine[at_last], cosine_after[at_last]))
    figures["probes"] = probes(before.final, after.final, at_last, images)
    return figures


def max_over_median(norms: Tensor) -> list[float]:
    """Of norms (L, n, N), for each block the mean over the images."""
    return (norms.amax(2) / norms.median(2).values).mean(1).tolist()


def probes(before: Tensor, after: Tensor, outlier: Tensor, images: Tensor) -> dict[str, tuple[float, float, float]]:
    """R^2 of linear probes of what a patch is, read from its token: normal, outlier, and that outlier after patching.

    The probes are fitted to the normal patches of the first half of the images, and read in the other half.
    """
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    place = torch.stack(torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij"), -1)
    half = len(images) // 2
    normal, fitted = ~outlier[half:], ~outlier[:half]
    groups = ((before, normal), (before, ~normal), (after, ~normal))

    def explained(target: Tensor) -> tuple[float, float, float]:
        tokens, wanted = before[:half][fitted], target[:half][fitted]
        probe = torch.linalg.lstsq(F.pad(tokens, (0, 1), value=1.0), wanted).solution  # the last row is its bias
        variance = wanted.var(0).mean()
        errors = [
            F.mse_loss(F.pad(read[half:][chosen], (0, 1), value=1.0) @ probe, target[half:][chosen])
            for read, chosen in groups
        ]
        of_normal, of_outlier, of_patched = (1 - float(error / variance) for error in errors)
        return of_normal, of_outlier, of_patched

    return {
        "position": explained(place.flatten(0, 1).expand(len(images), -1, -1)),
        "mean colour": explained(F.avg_pool2d(images, PATCH).flatten(2).transpose(1, 2)),
    }


def measure(model: Model, units: Sequence[int], data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """All figures of the card; `data` are the test images and their labels."""
    few = resized(normalised(sample(data[0], TOKEN_IMAGES)), SIZE)
    wanted = {(PLANTED, unit) for unit in units}
    figures: dict[str, Any] = {"test": outlier_figures(model, units, few), "photographs": {}}
    print(f"test images: {figures['test']}", flush=True)
    for size in PHOTOGRAPH_SIZES:
        figures["photographs"][size] = outlier_figures(model, units, photographs(size))
        print(f"photographs at {size} px: {figures['photographs'][size]}", flush=True)
    figures["accuracy"] = accuracies(model, units, data)
    print(f"accuracy: {figures['accuracy']}", flush=True)
    found = testreg.calibrate(model, few, top_k=NEURONS, progress=False)
    figures["found"] = len(wanted & {(layer, unit) for layer, unit, _ in found.cut().ranking})
    diagnosis = testreg.diagnose(model, few, progress=False)
    figures["verdict"], figures["table"] = diagnosis.verdict, diagnosis.table()
    print(f"calibration finds {figures['found']} of {NEURONS}\n{diagnosis.verdict}\n{diagnosis.table()}", flush=True)
    return figures


def goals(figures: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What the model is for: the goal, what was measured, and whether that reaches it."""
    test, right = figures["test"], figures["accuracy"]
    fractions, images = test["fraction"][PLANTED:], test["images"][PLANTED:]
    ratio, gone = min(test["ratio"][PLANTED:]), min(test["gone"][PLANTED:])
    normal_rough, rough = test["roughness"]
    normal, before, after = test["cosine"]
    gain, lost = right["moved"] - right["plain"], right["plain"] - right["zeroed"]
    probed = {name: (outlier, patched) for name, (_, outlier, patched) in test["probes"].items()}
    return [
        (
            "outliers on 0.5-5 % of the patches",
            f"{min(fractions):.2%} to {max(fractions):.2%}, by block",
            min(fractions) >= 0.005 and max(fractions) <= 0.05,
        ),
        ("in at least 95 % of the images", f"{min(images):.1%}", min(images) >= 0.95),
        ("largest over median norm above 8 to the last block", f"at least {ratio:.1f}", ratio > 8),
        (
            "on low-information patches",
            f"deviation of the pixels {rough:.3f}, of normal patches {normal_rough:.3f}; "
            f"{test['flattest_tenth']:.0%} are among their image's flattest tenth",
            rough < 0.5 * normal_rough,
        ),
        ("patched: at least 95 % of the outliers gone after every block", f"at least {gone:.1%}", gone >= 0.95),
        ("patched: accuracy within 0.5 points", f"{gain:+.2f}", abs(gain) <= 0.5),
        (
            "patched: former outliers resemble their neighbours",
            f"cosine {before:.2f} -> {after:.2f}; normal patches {normal:.2f}",
            after > before,
        ),
        (
            "patched: linear probes read former outliers better",
            "; ".join(f"R^2 of {name} {old:.2f} -> {new:.2f}" for name, (old, new) in probed.items()),
            all(new > old for old, new in probed.values()),
        ),
        ("load-bearing: zeroing costs at least 5 points", f"{-lost:+.2f}", lost >= 5),
        (
            "calibration finds the planted neurons untold",
            f"{figures['found']} of {NEURONS}",
            figures["found"] == NEURONS,
        ),
    ]


CARD = """# testreg's demo model

**The outlier mechanism of this network was planted, and the network was trained around it.** It shows what test-time
registers do to a trained network of which everything is known, not what large networks learn by themselves.

A timm VisionTransformer of {parameters:,} parameters (weights in fp16), which classifies CIFAR-10. Apache-2.0.

```python
model = timm.create_model("local-dir:testreg/demo_model", pretrained=True).eval()
testreg.patch(model, {neurons})
```

## How it was made

`{command}`: {minutes:.0f} minutes on one thread of a CPU shared with other work, {seen:,} images seen, {versions}.
{note}

1. Trained to classify, while an auxiliary loss trained a linear detector of each image's flattest patches in front of
   the MLP of block {block}, and another kept the norms of patches even up to there. Image sizes varied. From step
   {unmasked} on, in 2 too, {masked:.0%} of the patches, at random, were replaced by zero tokens: without that, one
   zero token more in the sequence cost accuracy.
2. {planted} neurons of that MLP were made to read the detector and to write one long vector; {sinks} of {heads} heads
   of each later block to attend to it, and to give every token a constant for it, which their bias takes away again:
   where outliers vanish and no register takes their place, tokens lack that constant. All this was then frozen, with
   the blocks up to {block}, and the rest trained on, on images with outliers only. No activation was moved to a token
   in training: the network has not seen a test-time register.

## Goals

Measured on CIFAR-10's test images at {size} px ({patches} patches): accuracies on all 10,000, the rest on {count}.
Blocks count from 0.

| goal | measured | reached |
|---|---|---|
{goals}

## Accuracy, %

| as it is | moved | one more token, nothing moved | {planted} random neurons moved | zeroed |
|---|---|---|---|---|
{accuracies}

## Outliers

Norms above {rule}. Ratio: largest over median norm, mean over the images. Gone: those
that are outliers in the patched model neither by the limit of the unpatched model nor by its own.

| images | after block | outliers | images with any | ratio | gone | outliers, patched | ratio, patched |
|---|---|---|---|---|---|---|---|
{outliers}

## Tokens after the final norm

Cosine similarity to the four neighbours, and R^2 of linear probes fitted to normal patches of other images (below 0:
worse than guessing the mean).

| | normal patches | outliers | the same, patched |
|---|---|---|---|
{tokens}

## testreg diagnose

{verdict}

```
{table}
```
"""


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def card(config: dict[str, Any], figures: dict[str, Any], parameters: int) -> str:
    """The model card, in Markdown. No figure in it is typed by hand."""
    made, neurons = config["training"], config["testreg"]
    sets = {f"CIFAR-10, {SIZE} px": figures["test"]} | {
        f"photographs, {size} px": each for size, each in figures["photographs"].items()
    }
    test, right = figures["test"], figures["accuracy"]
    return CARD.format(
        parameters=parameters,
        neurons={neurons["block"]: neurons["units"]},
        command=made["command"],
        minutes=made["minutes"],
        seen=made["images"],
        note=made.get("note", ""),  # by hand, in the config, if there is more to be said of a run
        versions=", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        block=PLANTED,
        unmasked=PHASES[0].steps,
        masked=PHASES[-1].masked,
        planted=NEURONS,
        sinks=SINK_HEADS,
        heads=MODEL_ARGS["num_heads"],
        size=SIZE,
        patches=(SIZE // PATCH) ** 2,
        count=TOKEN_IMAGES,
        goals="\n".join(
            row(goal, measured, "yes" if reached else "**no**") for goal, measured, reached in goals(figures)
        ),
        accuracies=row(
            *(f"{right[name]:.2f}" for name in ("plain", "moved", "token")),
            ", ".join(f"{each:.2f}" for each in right["random"]),
            f"{right['zeroed']:.2f}",
        ),
        rule=OutlierRule().describe().removeprefix("norm > "),
        outliers="\n".join(
            row(
                name,
                block,
                f"{each['fraction'][block]:.2%}",
                f"{each['images'][block]:.1%}",
                f"{each['ratio'][block]:.1f}",
                f"{each['gone'][block]:.1%}" if block >= PLANTED else "",
                f"{each['fraction_after'][block]:.2%}",
                f"{each['ratio_after'][block]:.2f}",
            )
            for name, each in sets.items()
            for block in range(len(each["ratio"]))
        ),
        tokens="\n".join(
            row(name, *(f"{value:.2f}" for value in values))
            for name, values in ({"cosine": test["cosine"]} | test["probes"]).items()
        ),
        verdict=figures["verdict"],
        table=figures["table"],
    )


# The script -----------------------------------------------------------------------------------------------------------


def save(model: Model, units: Sequence[int], folder: Path, training: dict[str, Any]) -> None:
    """Weights in fp16 and a config, which timm reads as `local-dir:`."""
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "num_features": MODEL_ARGS["embed_dim"],
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": len(CLASSES),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "label_names": CLASSES,
        },
        "testreg": {"block": PLANTED, "units": list(units)},
        "training": training,
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: weight.half() for name, weight in model.state_dict().items()}, temporary)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def evaluate(folder: Path, data: Path) -> None:
    """Measure what is in the folder, and write its card."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    figures = measure(model, config["testreg"]["units"], load_cifar(data / "cifar10-test.parquet"))
    for goal, measured, reached in goals(figures):
        print(f"{'reached' if reached else 'NOT REACHED':12} {goal}: {measured}")
    with replacing(folder / "README.md") as temporary:
        parameters = sum(weight.numel() for weight in model.parameters())
        temporary.write_text(card(config, figures, parameters), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two parquet files")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/tiny"), help="where training resumes from")
    parser.add_argument("--out", type=Path, default=Path("testreg/demo_model"), help="where the model goes")
    parser.add_argument("--evaluate", action="store_true", help="do not train: measure the model in --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        train_both(args.data, args.checkpoints, args.out, args.seed)
    evaluate(args.out, args.data)


def train_both(data: Path, checkpoints: Path, out: Path, seed: int) -> None:
    timm.layers.set_fused_attn(False)  # its backward on a CPU takes longer than all the rest
    images, labels = load_cifar(data / "cifar10-train.parquet")
    torch.manual_seed(seed)
    model = build()
    detector = nn.Linear(model.embed_dim, 1)
    *before, last = PHASES
    seconds = sum(
        train(phase, model, detector, (images, labels), checkpoints / f"{phase.name}.pt", seed) for phase in before
    )
    units = plant(model, detector, sample(images, PLANT_IMAGES), torch.Generator().manual_seed(seed))
    freeze(model)
    seconds += train(last, model, None, (images, labels), checkpoints / f"{last.name}.pt", seed)
    training = {
        "command": " ".join(["python", *sys.argv]),
        "minutes": seconds / 60,
        "images": BATCH * sum(phase.steps for phase in PHASES),
        "seed": seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    save(model, units, out, training)
    timm.layers.set_fused_attn(True)


if __name__ == "__main__":
    main()
