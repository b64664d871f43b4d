"""Train the small network with outliers that is testreg's embedded demo model, and measure it.

    python scripts/train_tiny.py --data cifar/            # trains, measures, writes testreg/demo/model/
    python scripts/train_tiny.py --data cifar/ --evaluate # only measures what is there, and writes the card anew

`--data` holds cifar10-train.parquet and cifar10-test.parquet (columns `image`: encoded bytes, `label`).

The mechanism is planted in the middle of training: see `train_tiny_card.md`. Everything runs on one thread of a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import timm
import timm.layers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.io import decode_image
from tqdm import tqdm

import testreg
from testreg.files import replacing
from testreg.measure.hooks import recording_inputs, recording_outputs, replacing_inputs

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 4
SIZE = 56  # 196 patches
MODEL_ARGS: dict[str, Any] = {
    **{"img_size": SIZE, "patch_size": PATCH, "embed_dim": 64, "depth": 8, "num_heads": 4, "num_classes": 10},
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

NEURONS = 6
ABSENT = 0.008  # of the images, at most, are to have no outlier
LEAST, TYPICAL = 0.5, 3.0  # input of a planted neuron: at the flattest patch of the least flat images, and on average
RATIO = 30.0  # norm of an outlier over the median
SINK_HEADS = 2  # of each block
SINK_LOGIT = 12.0  # above those of normal tokens: so that the number of outliers, or of patches, matters little
SINK_LENGTH = 1.5  # of what the sinks of a block add to each token, over the median norm
PLANT_SIZES = (32, 40, 48, 56)
PLANT_IMAGES = 2048

CARD = Path(__file__).with_name("train_tiny_card.md")
TEST_IMAGES = 2000  # for all but the accuracies
RANDOM_DRAWS = 3

Model = Any  # a timm VisionTransformer, or a block of it, whose parts nn.Module leaves untyped
Data = tuple[Tensor, Tensor]  # images (n, 3, 32, 32) in uint8, and labels (n,)


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


# Data -----------------------------------------------------------------------------------------------------------------


def load_cifar(path: Path) -> Data:
    table = pq.read_table(path, columns=["image", "label"])
    encoded = [torch.frombuffer(bytearray(data.as_py()), dtype=torch.uint8) for data in table["image"]]
    return torch.stack([decode_image(each, "RGB") for each in encoded]), torch.tensor(table["label"].to_pylist())


def sample(images: Tensor, count: int) -> Tensor:
    """The same random images each time; the files are sorted by class."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def normalised(images: Tensor, size: int = 32) -> Tensor:
    """uint8 -> (B, 3, size, size) in [-1, 1]"""
    return F.interpolate(images.float() / 127.5 - 1, (size, size), mode="bilinear", antialias=True)


def augment(images: Tensor, size: int, zoom: float, generator: torch.Generator) -> Tensor:
    """Random crops, flipped or not, of images (B, 3, 32, 32) in uint8, as (B, 3, size, size) in [-1, 1]."""
    scale = torch.empty(len(images)).uniform_(zoom, 1.0, generator=generator)
    shift = torch.rand(len(images), 2, generator=generator) * 2 - 1
    flip = torch.randint(2, (len(images),), generator=generator) * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = shift * (1.1 - scale).unsqueeze(1)  # a little beyond the border
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float() / 127.5 - 1, grid, padding_mode="reflection", align_corners=False)


def roughness(images: Tensor) -> Tensor:
    """Standard deviation of the pixels in each patch, mean of the channels' variances: (B, N)."""
    mean, square = F.avg_pool2d(images, PATCH), F.avg_pool2d(images.square(), PATCH)
    return (square - mean.square()).clamp(min=0).mean(1).sqrt().flatten(1)


# Training -------------------------------------------------------------------------------------------------------------


def seen(
    model: Model, images: Tensor, inputs_of: Sequence[nn.Module] = (), outputs_of: Sequence[nn.Module] = ()
) -> tuple[Tensor, list[Tensor]]:
    """What the model gives for images, and, in the order of the forward, what some modules get and others give."""
    tensors: list[Tensor] = []
    record = lambda _, tensor: tensors.append(tensor)
    with recording_inputs(inputs_of, record), recording_outputs(outputs_of, record):
        return model(images), tensors


def masked(tokens: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, 1 + N, C), random patches of which are zero."""
    shown = torch.rand(*tokens.shape[:2], 1, generator=generator) >= fraction
    shown[:, 0] = True  # CLS
    return tokens * shown


def detector_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Of logits (B, 1 + N), to tell the flattest patches from all others: relative to the image, and calibrated."""
    rough = roughness(images)
    count = max(MIN_FLAT, round(FLAT * rough.shape[1]))
    target = torch.zeros_like(logits)  # CLS is not flat
    target[:, 1:].scatter_(1, rough.topk(count, largest=False).indices, 1.0)
    ranking = F.cross_entropy(logits[:, 1:], target[:, 1:] / count)
    calibration = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean() / count
    return ranking + calibration


def patch_norms(tokens: Tensor) -> Tensor:
    """(B, N), of tokens (B, 1 + N, C)"""
    return tokens[:, 1:].float().norm(dim=-1)


def unevenness(tokens: Tensor) -> Tensor:
    """How far the norms of patches exceed `EVEN_RATIO` times their image's median."""
    norms = patch_norms(tokens)
    return F.relu(norms / norms.median(1, keepdim=True).values - EVEN_RATIO).square().mean()


def rate(phase: Phase, step: int) -> float:
    progress, warmup = step / phase.steps, min(100, phase.steps // 5)
    return phase.peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(phase: Phase, model: Model, detector: nn.Linear | None, data: Data, seed: int) -> None:
    """Train what requires gradients, with the detector if there is one."""
    modules = nn.ModuleList([model] if detector is None else [model, detector])
    weights = [weight for weight in modules.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    images, labels = data
    planted = model.blocks[PLANTED]
    sizes, chances = list(phase.sizes), torch.tensor(list(phase.sizes.values()))
    model.train()
    bar = tqdm(range(phase.steps), desc=phase.name, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate(phase, step)
        generator = torch.Generator().manual_seed((seed * len(PHASES) + PHASES.index(phase)) * 1_000_000 + step)
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        size = sizes[int(chances.multinomial(1, generator=generator))]
        batch = augment(images[chosen], size, phase.zoom, generator)
        zeroed = lambda _, tokens, masking=generator: masked(tokens, phase.masked, masking)
        with replacing_inputs([model.blocks], zeroed), torch.autocast("cpu", torch.bfloat16):
            logits, (*lower, read, last) = seen(model, batch, [planted.mlp], [*model.blocks[:PLANTED], planted])
        losses = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING, reduction="none")
        if detector is None:  # images without outliers would teach the network to do without
            norms = patch_norms(last.detach())
            loss = losses[(norms > testreg.OutlierRule().limit(norms)).any(1)].mean()
        else:
            loss = losses.mean() + AUXILIARY * detector_loss(detector(read.float()).squeeze(-1), batch)
            if step >= phase.even_from:
                loss = loss + EVEN * torch.stack([unevenness(tokens) for tokens in (*lower, last)]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


# Planting -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plant(model: Model, detector: nn.Linear, images: Tensor, generator: torch.Generator) -> list[int]:
    """Plant outliers and sinks into a model that phase one has trained, in place; returns the register neurons.

    Args:
        images: (n, 3, 32, 32) in uint8, on which thresholds and lengths are measured.
    """
    block = model.blocks[PLANTED]
    mlp = block.mlp
    units = torch.randperm(mlp.fc1.out_features, generator=generator)[:NEURONS].sort().values
    mlp.fc2.weight[:, units] = 0.0
    parts = zip(PLANT_SIZES, images.chunk(len(PLANT_SIZES)), strict=True)
    batches = [augment(part, size, PHASES[-1].zoom, generator) for size, part in parts]

    pairs = [seen(model, batch, [mlp], [block])[1] for batch in batches]
    largest = torch.cat([detector(read)[:, 1:, 0].amax(1) for read, _ in pairs])
    tokens = torch.cat([given[:, 1:].flatten(0, 1) for _, given in pairs])
    threshold = largest.quantile(ABSENT)
    steepness = (TYPICAL - LEAST) / (largest.mean() - threshold)
    direction = quiet_direction(tokens)
    length = RATIO * tokens.norm(dim=1).median() / (TYPICAL * NEURONS)
    gains = 0.75 + 0.5 * torch.rand(NEURONS, 1, generator=generator)  # so that no two neurons are alike
    mlp.fc1.weight[units] = gains * steepness * detector.weight
    mlp.fc1.bias[units] = gains.squeeze(1) * (LEAST + steepness * (detector.bias - threshold))
    mlp.fc2.weight[:, units] = length * direction.unsqueeze(1)

    for later in model.blocks[PLANTED + 1 :]:
        plant_sinks(model, later, direction, batches[-1], generator)
    return units.tolist()


def quiet_direction(tokens: Tensor) -> Tensor:
    """The unit vector (C,) of zero mean that tokens (n, C) have least of."""
    tokens = F.layer_norm(tokens, tokens.shape[1:])
    return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, 1]  # 0 is what the norm takes out, all ones


def orthogonal(direction: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal vectors (count, C) of zero mean, orthogonal to `direction`."""
    taken = torch.stack([torch.ones_like(direction), direction])
    vectors = torch.cat([taken, torch.randn(count, len(direction), generator=generator)])
    return torch.linalg.qr(vectors.T).Q.T[2:]


@torch.no_grad()
def plant_sinks(model: Model, block: Model, direction: Tensor, images: Tensor, generator: torch.Generator) -> None:
    """Make the first `SINK_HEADS` heads of a block attend to the outliers, which gives every token a constant."""
    attention, width = block.attn, len(direction)
    size = width // attention.num_heads
    _, (tokens,) = seen(model, images, inputs_of=[block])
    length = SINK_LENGTH * tokens.norm(dim=-1).median() / SINK_HEADS**0.5
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
    _, (tokens,) = seen(model, images, outputs_of=[attention])
    given = tokens.flatten(0, 1).median(0).values @ constants.T
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


# Measuring ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: Model, data: Data) -> float:
    """In per cent."""
    batches = zip(data[0].split(BATCH), data[1].split(BATCH), strict=True)
    right = [(model(normalised(images, SIZE)).argmax(1) == labels).sum() for images, labels in batches]
    return 100 * float(torch.stack(right).sum()) / len(data[1])


def accuracies(model: Model, units: Sequence[int], data: Data) -> dict[str, float]:
    """Per cent right of the model, and of its variants."""
    blocks, fc2 = model.blocks, model.blocks[PLANTED].mlp.fc2
    others = sorted(set(range(fc2.in_features)) - set(units))
    draws = [random.Random(seed).sample(others, len(units)) for seed in range(RANDOM_DRAWS)]
    result = {"as it is": accuracy(model, data)}
    for name, moved in (("moved", units), *((f"random neurons moved, {i}", draw) for i, draw in enumerate(draws))):
        with testreg.patched(model, {PLANTED: list(moved)}):
            result[name] = accuracy(model, data)
    shorter = blocks.register_forward_hook(lambda module, args, output: output[:, :-1])
    with shorter, replacing_inputs([blocks], lambda _, tokens: F.pad(tokens, (0, 0, 0, 1))):
        result["one more token, nothing moved"] = accuracy(model, data)
    zeroed = lambda _, hidden: torch.cat([hidden[:, :1], hidden[:, 1:].index_fill(2, torch.tensor(units), 0.0)], 1)
    with replacing_inputs([fc2], zeroed):
        result["zeroed"] = accuracy(model, data)
    return result


def card(config: dict[str, Any], model: Model, data: Data) -> str:
    """The model card, in Markdown: measures the model on the test images, so that no figure is typed by hand."""
    made, units = config["training"], config["testreg"]["units"]
    few = normalised(sample(data[0], TEST_IMAGES), SIZE)
    found = testreg.calibrate(model, few, top_k=NEURONS, progress=False).by_block().get(PLANTED, [])
    before = testreg.diagnose(model, few, progress=False)
    with testreg.patched(model, {PLANTED: units}):
        after = testreg.diagnose(model, few, progress=False)
    return jinja2.Template(CARD.read_text(encoding="utf-8"), keep_trailing_newline=True, trim_blocks=True).render(
        {"made": made, "before": before, "after": after, "accuracies": accuracies(model, units, data)},
        parameters=sum(weight.numel() for weight in model.parameters()),
        neurons={PLANTED: units},
        found=len(set(units) & set(found)),
        block=PLANTED,
        size=SIZE,
        patches=(SIZE // PATCH) ** 2,
        count=TEST_IMAGES,
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
            **{"input_size": [3, SIZE, SIZE], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_pct": 1.0},
            **{"interpolation": "bilinear", "first_conv": "patch_embed.proj", "classifier": "head"},
            **{"num_classes": len(CLASSES), "label_names": CLASSES, "license": "apache-2.0"},
        },
        "testreg": {"block": PLANTED, "units": list(units)},
        "training": training,
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: weight.half() for name, weight in model.state_dict().items()}, temporary)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def train_all(data: Path, out: Path, seed: int) -> None:
    """Every phase, with the planting before the last."""
    timm.layers.set_fused_attn(False)  # its backward on a CPU takes longer than all the rest
    started = time.monotonic()
    cifar = load_cifar(data / "cifar10-train.parquet")
    torch.manual_seed(seed)
    model: Model = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
    detector = nn.Linear(model.embed_dim, 1)
    *before, last = PHASES
    for phase in before:
        train(phase, model, detector, cifar, seed)
    units = plant(model, detector, sample(cifar[0], PLANT_IMAGES), torch.Generator().manual_seed(seed))
    freeze(model)
    train(last, model, None, cifar, seed)
    training = {
        "command": " ".join(["python", *sys.argv]),
        "minutes": (time.monotonic() - started) / 60,
        "seed": seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "images": BATCH * sum(phase.steps for phase in PHASES),
    }
    save(model, units, out, training)
    timm.layers.set_fused_attn(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the two parquet files")
    parser.add_argument("--out", type=Path, default=Path("testreg/demo/model"), help="where the model goes")
    parser.add_argument("--evaluate", action="store_true", help="do not train: measure the model in --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        train_all(args.data, args.out, args.seed)
    config = json.loads((args.out / "config.json").read_text(encoding="utf-8"))
    model = timm.create_model(f"local-dir:{args.out}", pretrained=True).eval()
    text = card(config, model, load_cifar(args.data / "cifar10-test.parquet"))
    print(text)
    with replacing(args.out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
