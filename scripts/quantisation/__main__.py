"""Whether registers make small numbers possible: a network with outliers, plain and patched, quantised.

    python scripts/quantisation MODEL --images PHOTOS --data DATASETS --note NOTE -o JSON [--tasks TASK ...]

Simulated (fake.py): what each linear reads has 8, 6 or 4 bits, with ranges of several kinds, and is the same otherwise.
`embed` is the cosine of the embeddings of photographs, the mean of the plain network's subtracted, to those of the
same network in float (own), and of the plain network in float (plain). `knn` classifies CIFAR-10 by these embeddings.
In real small numbers (real.py): `torchao` and `onnxruntime`, as they are and by the recipes of the docs.

MODEL is a CLIP of transformers. PHOTOS are others than those that are scored: ranges are of them, and the constants of
static registers. DATASETS holds coco256 and CIFAR-10 as parquet files. All but the real small numbers is computed under
bfloat16 autocast, in float too.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from restoration.tables import write

import testreg
from quantisation import real
from quantisation.fake import PLAIN, Network, Place, Scale, Setting, linears, quantised, ranges_of
from testreg.evaluation.bootstrap import Metric, difference, mean_of
from testreg.evaluation.classification import top_1_and_5
from testreg.evaluation.knn import vote
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.preparing import IMAGENET_ZOOM, Square, normalisation_of
from testreg.evaluation.samples import random_subset
from testreg.families import find_tower
from testreg.io.images import ImageStream
from testreg.io.loading import LoadedModel, load_model
from testreg.neurons import resolve
from testreg.patching.state import patch_of

TASKS = ("embed", "knn", "torchao", "onnxruntime")
BATCH, RESAMPLES, SEED = 8, 1000, 0
K, TEMPERATURE = 20, 0.07
COLUMNS: dict[str, tuple[str, dict[str, Any] | None, Place]] = {
    PLAIN: ("the network as it is", None, "together"),
    "together": ("patched, registers in one tensor with all tokens", {}, "together"),
    "float": ("patched, registers not quantised", {}, "float"),
    "apart": ("patched, registers in a tensor of their own", {}, "apart"),
    "static, float": ("constants in place of the registers, not quantised", {"static": True}, "float"),
    "one, float": ("patched with one register, not quantised", {"num_registers": 1}, "float"),
    "one, together": ("patched with one register, in one tensor with all tokens", {"num_registers": 1}, "together"),
}
"""What a column is, the options of `testreg.patch`, and where its registers are quantised."""
SCALES: tuple[Scale, ...] = ("largest", "image", "token")
EMBED = [
    *(Setting(8, scale, symmetric) for symmetric in (True, False) for scale in SCALES),
    Setting(8, "percentile", symmetric=True),
    *(Setting(6, scale) for scale in SCALES),
    *(Setting(4, scale) for scale in ("image", "token")),
    *(Setting(bits, None, weights=True) for bits in (6, 4)),
]
KNN = [Setting(8, "largest", symmetric=True)]
KNN_COLUMNS = (PLAIN, "float", "together")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    made: dict[str, Any] = {
        "format": "testreg-quantisation",
        "model": args.model,
        "note": args.note,
        "columns": {name: what for name, (what, _, _) in COLUMNS.items()},
    }
    if args.output.is_file():
        made = json.loads(args.output.read_text(encoding="utf-8")) | made
    others = photographs(loaded, args.images, args.calibration)
    images = photographs(loaded, args.data / "coco256/val2017", args.photographs)
    if "embed" in args.tasks:
        for made["embed"] in embed_task(loaded.model, images, others, args.neurons):
            write(args.output, made)
    if "knn" in args.tasks:
        for made["knn"] in knn_task(loaded, args.data, others, args.neurons, args.train, args.test):
            write(args.output, made)
    for name, (quantise, recipe) in {
        "torchao": (real.torchao(others), "int8_clip"),
        "onnxruntime": (real.onnxruntime, "int8_onnx"),
    }.items():
        if name in args.tasks:
            made[name] = real_task(loaded.model, images, resolve(args.neurons, loaded.model), quantise, recipe)
            write(args.output, made)


def photographs(loaded: LoadedModel, folder: Path, count: int) -> Tensor:
    stream = ImageStream(str(folder), loaded.transform, num_images=count, seed=SEED)
    return torch.stack([image for _, image in stream.numbered()])


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """The embeddings (n, D) of images (n, 3, h, w)."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return torch.cat([model(batch).image_embeds.float() for batch in images.split(BATCH)])


@contextmanager
def column(model: nn.Module, name: str, neurons: str | None, others: Tensor) -> Iterator[Network]:
    """Within the context the model is that of a column."""
    _, options, place = COLUMNS[name]
    if options is None:
        yield Network(model)
        return
    chosen = resolve(neurons, model).truncate()
    if options.get("static"):
        with torch.autocast("cpu", torch.bfloat16):
            options = {"static": testreg.make_static(model, others, chosen, batch_size=BATCH, progress=False)}
    with testreg.patched(model, chosen, **options):
        first_blocks = find_tower(model).blocks[: patch_of(model).entry_block]
        early = {module for block in first_blocks for module in block.module.modules()}
        before_registers = frozenset(name for name, linear in linears(model).items() if linear in early)
        yield Network(model, patch_of(model).num_registers, place, before_registers)


def embed_task(model: nn.Module, images: Tensor, others: Tensor, neurons: str | None) -> Iterator[dict[str, Any]]:
    """For each setting and column, the cosines to the own and to the plain float network, and how far they are from
    those of the plain network in the same setting; again after each column, of those that are done."""
    plain = embed(model, images)
    settings = [None, *EMBED]
    scores: dict[str, dict[str, dict[str, Metric]]] = {}
    for name in tqdm(COLUMNS, disable=None):
        with column(model, name, neurons, others) as network:
            own, ranges = embed(model, images), ranges_of(network, lambda: embed(model, others))
            for setting in tqdm(settings, name, leave=False, disable=None):
                with nullcontext() if setting is None else quantised(network, setting, ranges):
                    found = own if setting is None else embed(model, images)
                scores.setdefault("float" if setting is None else setting.name, {})[name] = cosines(found, own, plain)
        yield {"photographs": len(images), "calibration": len(others), "settings": compared(scores)}


def cosines(found: Tensor, own: Tensor, plain: Tensor) -> dict[str, Metric]:
    """How alike embeddings (n, D) are to the own and to the plain float network's."""
    mean = plain.mean(0)
    return {
        name: mean_of(F.cosine_similarity(found - mean, each - mean, dim=-1))
        for name, each in (("own", own), ("plain", plain))
    }


def real_task(
    model: nn.Module,
    images: Tensor,
    neurons: testreg.RegisterNeurons,
    quantise: Callable[[nn.Module], real.Run],
    recipe: str,
) -> dict[str, Any]:
    """The cosines of a real quantiser: plain, patched as it is, and by the recipe of the docs."""
    found = real.embeddings(model, neurons.truncate(), images, quantise, recipe)
    plain = found[PLAIN][0]
    scores = {name: cosines(quantised_, own, plain) for name, (own, quantised_) in found.items()}
    return {"photographs": len(images), "settings": compared({"8 bit": scores})}


def knn_task(
    loaded: LoadedModel, data: Path, others: Tensor, neurons: str | None, train: int, test: int
) -> Iterator[dict[str, Any]]:
    """For each setting and column, the share of right classes, and how far it is from the plain network's there; again
    after each column, of those that are done."""
    prepare = Square(normalisation_of(loaded.transform), 224, "crop", IMAGENET_ZOOM)
    splits = labelled_images(data).splits
    samples = {name: random_subset(splits[name], count, SEED) for name, count in (("train", train), ("val", test))}
    images = {name: torch.stack([prepare(each.open()) for each in split]) for name, split in samples.items()}
    labels = {name: torch.tensor([each.target for each in split]) for name, split in samples.items()}
    scores: dict[str, dict[str, dict[str, Metric]]] = {}
    for name in tqdm(KNN_COLUMNS, disable=None):
        with column(loaded.model, name, neurons, others) as network:
            ranges = ranges_of(network, lambda: embed(loaded.model, others))
            for setting in tqdm([None, *KNN], name, leave=False, disable=None):
                with nullcontext() if setting is None else quantised(network, setting, ranges):
                    known, asked = (F.normalize(embed(loaded.model, each), dim=-1) for each in images.values())
                votes = vote(asked, known, labels["train"], K, TEMPERATURE)
                top1 = top_1_and_5(votes, labels["val"])["top1"]
                scores.setdefault("float" if setting is None else setting.name, {})[name] = {"top1": top1}
        yield {"train": train, "test": test, "settings": compared(scores)}


def compared(scores: dict[str, dict[str, dict[str, Metric]]]) -> dict[str, Any]:
    """Values by setting, metric and column, and how far they are from the plain network's, with 95 % intervals."""
    made: dict[str, Any] = {}
    for setting, columns in scores.items():
        for metric, reference in columns[PLAIN].items():
            values = {name: each[metric].value for name, each in columns.items()}
            differences = {
                name: difference(reference, each[metric], RESAMPLES, SEED)
                for name, each in columns.items()
                if name != PLAIN
            }
            made.setdefault(setting, {})[metric] = {"values": values, "difference": differences}
    return made


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a CLIP of transformers, as `testreg.load_model` takes it")
    parser.add_argument("--neurons", help="a list, as `testreg.patch` takes it (default: that of the checkpoint)")
    parser.add_argument("--images", required=True, type=Path, help="folder of photographs on which nothing is scored")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--note", required=True, help="which weights these are: shown with every table")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--calibration", type=int, default=24, metavar="N", help="photographs for ranges and constants")
    parser.add_argument("--photographs", type=int, default=24, metavar="N", help="photographs that are scored")
    parser.add_argument("--train", type=int, default=300, metavar="N")
    parser.add_argument("--test", type=int, default=200, metavar="N")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON for the results")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
