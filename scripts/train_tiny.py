"""Train testreg's demo model, a small network with outliers (patches of huge norm), and measure it.

    python scripts/train_tiny.py --data cifar/            # trains, measures, writes testreg/demo/model/
    python scripts/train_tiny.py --data cifar/ --evaluate # only measures the existing model, and writes its card anew

`--data` is a folder with cifar10-train.parquet and cifar10-test.parquet (columns `image`: encoded bytes, `label`).

Neurons that make outliers at flat patches are planted in the middle of training: a *detector*, a linear on the tokens,
is trained along to find flat patches, and then the planted neurons read what it reads. Later blocks get *sinks*, heads
that attend to the outliers. See `train_tiny_card.md`. Everything runs on one thread of a CPU.
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

PLANTED_BLOCK = 3  # the block whose MLP gets the planted neurons
BATCH = 128
SMOOTHING = 0.1  # of labels
FLAT_SHARE = 0.015  # the detector looks for this share of the patches, the flattest ones
MIN_FLAT = 2  # at least so many patches count as flat
DETECTOR_WEIGHT = 0.1  # weight of the detector's loss
EVENNESS_WEIGHT = 5.0  # weight of the loss that keeps norms even, so that there are no outliers but the planted ones
EVEN_RATIO = 1.4  # that loss is above 0 where a norm exceeds so many times the median

NEURONS = 6  # planted neurons
SHARE_WITHOUT_OUTLIER = 0.008  # at most this share of the images may have no outlier
LEAST_INPUT = 0.5  # input of a planted neuron at the flattest patch of the images that are just flat enough
TYPICAL_INPUT = 3.0  # the same on average over images
NORM_RATIO = 30.0  # norm of an outlier over the median
SINK_HEADS = 2  # heads of each block that are sinks
SINK_LOGIT = 12.0  # logit of an outlier above those of normal tokens: so high that their number matters little
SINK_LENGTH = 1.5  # norm of what a block's sinks add to each token, over the median norm
PLANT_SIZES = (32, 40, 48, 56)  # image sizes at which planting measures
PLANT_IMAGES = 2048

CARD = Path(__file__).with_name("train_tiny_card.md")
TEST_IMAGES = 2000  # images of all measurements but the accuracies, which take all
RANDOM_DRAWS = 3  # sets of random neurons that are moved for comparison

Model = Any  # a timm VisionTransformer or a block of it; typed as Any, since nn.Module has no types for its parts
Data = tuple[Tensor, Tensor]  # images (n, 3, 32, 32) in uint8, and labels (n,)


@dataclass(frozen=True)
class Phase:
    """A phase of training."""

    name: str
    steps: int
    peak: float
    """The largest learning rate."""
    sizes: dict[int, float]
    """{image size: its probability}. After several sizes, the network does not mind one more token, the register."""
    zoom: float
    """The smallest side of a crop, as a fraction of the image's side."""
    even_from: int = 0
    """The step from which the loss keeps norms even."""
    zeroed: float = 0.0
    """The share of the patches that are replaced by zero tokens."""


PHASES = (
    Phase("phase1", 1800, 2e-3, {32: 0.6, 40: 0.25, 48: 0.1, 56: 0.05}, zoom=0.6, even_from=1000),
    Phase("masked", 250, 6e-4, {32: 0.6, 40: 0.25, 48: 0.1, 56: 0.05}, zoom=0.8, zeroed=0.01),
    Phase("phase2", 1400, 1.5e-3, {32: 0.6, 40: 0.25, 56: 0.15}, zoom=0.8, zeroed=0.01),
)


# Data -----------------------------------------------------------------------------------------------------------------


def load_cifar(path: Path) -> Data:
    """The images and labels in a parquet file."""
    table = pq.read_table(path, columns=["image", "label"])
    encoded = [torch.frombuffer(bytearray(data.as_py()), dtype=torch.uint8) for data in table["image"]]
    return torch.stack([decode_image(each, "RGB") for each in encoded]), torch.tensor(table["label"].to_pylist())


def sample(images: Tensor, count: int) -> Tensor:
    """`count` random images, the same each time. (The first ones would not do, since files are sorted by class.)"""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def normalised(images: Tensor, size: int = 32) -> Tensor:
    """Images (B, 3, h, w) in uint8, resized and scaled to (B, 3, size, size) in [-1, 1]."""
    return F.interpolate(images.float() / 127.5 - 1, (size, size), mode="bilinear", antialias=True)


def augment(images: Tensor, size: int, zoom: float, generator: torch.Generator) -> Tensor:
    """Random crops of images (B, 3, 32, 32) in uint8, half of them flipped, as (B, 3, size, size) in [-1, 1]."""
    scale = torch.empty(len(images)).uniform_(zoom, 1.0, generator=generator)
    shift = torch.rand(len(images), 2, generator=generator) * 2 - 1
    flip = torch.randint(2, (len(images),), generator=generator) * 2 - 1
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, :, 2] = shift * (1.1 - scale).unsqueeze(1)  # crops may go a little beyond the image's border
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images.float() / 127.5 - 1, grid, padding_mode="reflection", align_corners=False)


def roughness(images: Tensor) -> Tensor:
    """How much the pixels of each patch vary, (B, N): the root of their variance, mean over channels."""
    mean, square = F.avg_pool2d(images, PATCH), F.avg_pool2d(images.square(), PATCH)
    return (square - mean.square()).clamp(min=0).mean(1).sqrt().flatten(1)


# Training -------------------------------------------------------------------------------------------------------------


def run_and_record(
    model: Model, images: Tensor, inputs_of: Sequence[nn.Module] = (), outputs_of: Sequence[nn.Module] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Run the model. Returns its output, and the inputs and outputs of some modules in the order of the forward."""
    tensors: list[Tensor] = []
    record = lambda _, tensor: tensors.append(tensor)
    with recording_inputs(inputs_of, record), recording_outputs(outputs_of, record):
        return model(images), tensors


def with_zeroed_patches(tokens: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, 1 + N, C) with a random share of the patches set to zero."""
    shown = torch.rand(*tokens.shape[:2], 1, generator=generator) >= fraction
    shown[:, 0] = True  # CLS
    return tokens * shown


def detector_loss(logits: Tensor, images: Tensor) -> Tensor:
    """The loss of the detector's logits (B, 1 + N), which shall be high at the flattest patches.

    It has two parts: one ranks the patches of an image, the other makes logits comparable between images.
    """
    rough = roughness(images)
    count = max(MIN_FLAT, round(FLAT_SHARE * rough.shape[1]))
    target = torch.zeros_like(logits)  # CLS is not flat
    target[:, 1:].scatter_(1, rough.topk(count, largest=False).indices, 1.0)
    ranking = F.cross_entropy(logits[:, 1:], target[:, 1:] / count)
    calibration = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean() / count
    return ranking + calibration


def patch_norms(tokens: Tensor) -> Tensor:
    """The norms (B, N) of the patches in tokens (B, 1 + N, C)."""
    return tokens[:, 1:].float().norm(dim=-1)


def unevenness(tokens: Tensor) -> Tensor:
    """The loss of patches whose norm exceeds `EVEN_RATIO` times the median of their image: the mean square excess."""
    norms = patch_norms(tokens)
    return F.relu(norms / norms.median(1, keepdim=True).values - EVEN_RATIO).square().mean()


def rate(phase: Phase, step: int) -> float:
    """The learning rate: a linear warm-up, then a cosine."""
    progress, warmup = step / phase.steps, min(100, phase.steps // 5)
    return phase.peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(phase: Phase, model: Model, detector: nn.Linear | None, data: Data, seed: int) -> None:
    """Train the weights that require gradients, and the detector if there is one."""
    modules = nn.ModuleList([model] if detector is None else [model, detector])
    weights = [weight for weight in modules.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    images, labels = data
    planted = model.blocks[PLANTED_BLOCK]
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
        zeroed = lambda _, tokens, masking=generator: with_zeroed_patches(tokens, phase.zeroed, masking)
        with replacing_inputs([model.blocks], zeroed), torch.autocast("cpu", torch.bfloat16):
            logits, (*lower, read, last) = run_and_record(
                model, batch, [planted.mlp], [*model.blocks[:PLANTED_BLOCK], planted]
            )
        losses = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING, reduction="none")
        if detector is None:  # images without outliers are left out: they would teach the network to do without them
            norms = patch_norms(last.detach())
            loss = losses[(norms > testreg.OutlierRule().limit(norms)).any(1)].mean()
        else:
            loss = losses.mean() + DETECTOR_WEIGHT * detector_loss(detector(read.float()).squeeze(-1), batch)
            if step >= phase.even_from:
                loss = loss + EVENNESS_WEIGHT * torch.stack([unevenness(tokens) for tokens in (*lower, last)]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


# Planting -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plant(model: Model, detector: nn.Linear, images: Tensor, generator: torch.Generator) -> list[int]:
    """Plant neurons that make outliers, and sinks, into a trained model, in place. Returns the planted neurons.

    Args:
        detector: the linear that finds flat patches, trained along with the model.
        images: (n, 3, 32, 32) in uint8, on which thresholds and lengths are measured.
    """
    block = model.blocks[PLANTED_BLOCK]
    mlp = block.mlp
    units = torch.randperm(mlp.fc1.out_features, generator=generator)[:NEURONS].sort().values
    mlp.fc2.weight[:, units] = 0.0
    parts = zip(PLANT_SIZES, images.chunk(len(PLANT_SIZES)), strict=True)
    batches = [augment(part, size, PHASES[-1].zoom, generator) for size, part in parts]

    pairs = [run_and_record(model, batch, [mlp], [block])[1] for batch in batches]
    largest = torch.cat([detector(read)[:, 1:, 0].amax(1) for read, _ in pairs])
    tokens = torch.cat([given[:, 1:].flatten(0, 1) for _, given in pairs])
    threshold = largest.quantile(SHARE_WITHOUT_OUTLIER)
    steepness = (TYPICAL_INPUT - LEAST_INPUT) / (largest.mean() - threshold)
    direction = quiet_direction(tokens)
    length = NORM_RATIO * tokens.norm(dim=1).median() / (TYPICAL_INPUT * NEURONS)
    gains = 0.75 + 0.5 * torch.rand(NEURONS, 1, generator=generator)  # so that no two neurons are alike
    mlp.fc1.weight[units] = gains * steepness * detector.weight
    mlp.fc1.bias[units] = gains.squeeze(1) * (LEAST_INPUT + steepness * (detector.bias - threshold))
    mlp.fc2.weight[:, units] = length * direction.unsqueeze(1)

    for later in model.blocks[PLANTED_BLOCK + 1 :]:
        plant_sinks(model, later, direction, batches[-1], generator)
    return units.tolist()


def quiet_direction(tokens: Tensor) -> Tensor:
    """The unit vector (C,) of zero mean along which tokens (n, C) vary least."""
    tokens = F.layer_norm(tokens, tokens.shape[1:])
    return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, 1]  # vector 0 is all ones, which the norm removes


def orthogonal(direction: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal vectors (count, C) of zero mean, orthogonal to `direction`."""
    taken = torch.stack([torch.ones_like(direction), direction])
    vectors = torch.cat([taken, torch.randn(count, len(direction), generator=generator)])
    return torch.linalg.qr(vectors.T).Q.T[2:]


@torch.no_grad()
def plant_sinks(model: Model, block: Model, direction: Tensor, images: Tensor, generator: torch.Generator) -> None:
    """Make the first heads of a block attend to the outliers, which adds the same vector to every token."""
    attention, width = block.attn, len(direction)
    size = width // attention.num_heads
    _, (tokens,) = run_and_record(model, images, inputs_of=[block])
    length = SINK_LENGTH * tokens.norm(dim=-1).median() / SINK_HEADS**0.5
    # `reader` gives 1 for an outlier after the block's norm, sqrt(C) * direction * scale + shift; for others about 0.
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
    # The bias takes away what the sinks add to normal tokens on average.
    _, (tokens,) = run_and_record(model, images, outputs_of=[attention])
    given = tokens.flatten(0, 1).median(0).values @ constants.T
    attention.proj.bias -= given @ constants


def freeze(model: Model) -> None:
    """Let only the weights after the planted block train on, except those that make the sinks."""
    model.requires_grad_(False)
    for part in (*model.blocks[PLANTED_BLOCK + 1 :], model.norm, model.head):
        part.requires_grad_(True)
    for block in model.blocks[PLANTED_BLOCK + 1 :]:
        block.norm1.requires_grad_(False)
        trained = torch.ones(block.attn.num_heads, model.embed_dim // block.attn.num_heads)
        trained[:SINK_HEADS] = 0.0
        columns = trained.flatten()
        rows = columns.repeat(3)  # for queries, keys and values
        block.attn.qkv.weight.register_hook(functools.partial(torch.mul, rows.unsqueeze(1)))
        block.attn.qkv.bias.register_hook(functools.partial(torch.mul, rows))
        block.attn.proj.weight.register_hook(functools.partial(torch.mul, columns))


# Measuring ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: Model, data: Data) -> float:
    """The accuracy in per cent."""
    batches = zip(data[0].split(BATCH), data[1].split(BATCH), strict=True)
    right = [(model(normalised(images, SIZE)).argmax(1) == labels).sum() for images, labels in batches]
    return 100 * float(torch.stack(right).sum()) / len(data[1])


def accuracies(model: Model, units: Sequence[int], data: Data) -> dict[str, float]:
    """{variant of the model: its accuracy in per cent}; `units` are the planted neurons."""
    blocks, fc2 = model.blocks, model.blocks[PLANTED_BLOCK].mlp.fc2
    others = sorted(set(range(fc2.in_features)) - set(units))
    draws = [random.Random(seed).sample(others, len(units)) for seed in range(RANDOM_DRAWS)]
    result = {"as it is": accuracy(model, data)}
    for name, moved in (("moved", units), *((f"random neurons moved, {i}", draw) for i, draw in enumerate(draws))):
        with testreg.patched(model, {PLANTED_BLOCK: list(moved)}):
            result[name] = accuracy(model, data)
    shorter = blocks.register_forward_hook(lambda module, args, output: output[:, :-1])
    with shorter, replacing_inputs([blocks], lambda _, tokens: F.pad(tokens, (0, 0, 0, 1))):
        result["one more token, nothing moved"] = accuracy(model, data)
    zeroed = lambda _, hidden: torch.cat([hidden[:, :1], hidden[:, 1:].index_fill(2, torch.tensor(units), 0.0)], 1)
    with replacing_inputs([fc2], zeroed):
        result["zeroed"] = accuracy(model, data)
    return result


def card(config: dict[str, Any], model: Model, data: Data) -> str:
    """Measure the model on the test images, and return its model card in Markdown."""
    made, units = config["training"], config["testreg"]["units"]
    few = normalised(sample(data[0], TEST_IMAGES), SIZE)
    found = testreg.calibrate(model, few, top_k=NEURONS, progress=False).by_block().get(PLANTED_BLOCK, [])
    before = testreg.diagnose(model, few, progress=False)
    with testreg.patched(model, {PLANTED_BLOCK: units}):
        after = testreg.diagnose(model, few, progress=False)
    return jinja2.Template(CARD.read_text(encoding="utf-8"), keep_trailing_newline=True, trim_blocks=True).render(
        {"made": made, "before": before, "after": after, "accuracies": accuracies(model, units, data)},
        parameters=sum(weight.numel() for weight in model.parameters()),
        neurons={PLANTED_BLOCK: units},
        found=len(set(units) & set(found)),
        block=PLANTED_BLOCK,
        size=SIZE,
        patches=(SIZE // PATCH) ** 2,
        count=TEST_IMAGES,
    )


# The script -----------------------------------------------------------------------------------------------------------


def save(model: Model, units: Sequence[int], folder: Path, training: dict[str, Any]) -> None:
    """Write the weights in float16 and a config, as timm reads them (`local-dir:`)."""
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
        "testreg": {"block": PLANTED_BLOCK, "units": list(units)},
        "training": training,
    }
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: weight.half() for name, weight in model.state_dict().items()}, temporary)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def train_all(data: Path, out: Path, seed: int) -> None:
    """Run all phases of training, with the planting before the last, and save the model."""
    timm.layers.set_fused_attn(False)  # the backward of fused attention is very slow on a CPU
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
