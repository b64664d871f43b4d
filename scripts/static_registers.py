"""Compare static registers (constants) with registers that the model computes: what they restore, and their time.

    python scripts/static_registers.py MODEL --images PHOTOS --test OTHERS [--mechanisms spread triggers ...]

As in `scripts/restoration`, a mechanism that makes outliers is planted into a network without outliers, and the
untouched network is the truth. All ways move the planted neurons: `register` to a computed register; `static` to a
constant, the computed register's mean over PHOTOS. `silent` sets the neurons to zero and adds no register. The neurons
are zero on patches, or in rows with `all` on all tokens. (The two forms of static registers, token and bias, give the
same here.)

Times are of a torchvision ViT-B/16 with random weights, which can have both forms: the median of the ratios of CPU time
to the plain model, measured in turns in one process. `noise` is the plain model a second time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, get_args

import torch
import torchvision
from planting import Mechanism, plant_into
from restoration.closeness import figures, observe
from restoration.networks import NUM_PLANTING
from restoration.tables import markdown
from torch import Tensor, nn

import testreg
from testreg.families import find_tower
from testreg.io.images import ImageStream
from testreg.io.loading import load_model
from testreg.io.preprocessing import OwnTransform

TIMED_NEURONS = {
    block: list(range(8)) for block in range(3, 9)
}  # the 48 neurons that are moved when times are measured


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    untouched = load_model(args.model).model.eval()
    photographs, unseen = (
        preprocessed_images(untouched, args.images),
        preprocessed_images(untouched, args.test)[: args.num_test],
    )
    for mechanism in args.mechanisms:
        rows = restoration(untouched, mechanism, args.seed, photographs, unseen)
        print(f"\n## {mechanism}, seed {args.seed}: planted\n\n{markdown(rows)}", flush=True)
    print(f"\n## Time of a forward of {args.batch} images, against the plain model\n")
    for way, ratio in times(args.batch, args.turns).items():
        print(f"{way:10}{ratio:.3f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a network without outliers, of 12 blocks or more, such as hf:FOLDER")
    parser.add_argument("--images", required=True, help="folder of photographs: plant, and average the registers")
    parser.add_argument("--test", required=True, help="folder of others: compare with the untouched network")
    parser.add_argument("--num-test", type=int, default=48)
    parser.add_argument("--mechanisms", nargs="+", choices=get_args(Mechanism), default=["spread"], metavar="MECHANISM")
    parser.add_argument("--seed", type=int, default=0, help="of what is planted")
    parser.add_argument("--batch", type=int, default=4, help="images of a forward that is timed")
    parser.add_argument("--turns", type=int, default=9)
    return parser.parse_args()


def restoration(
    untouched: nn.Module, mechanism: Any, seed: int, photographs: Tensor, unseen: Tensor
) -> list[list[str]]:
    """The header of a table, and a row for each way."""
    model = deepcopy(untouched)
    neurons = plant_into(model, photographs[:NUM_PLANTING], mechanism=mechanism, seed=seed).neurons
    static = testreg.make_static(model, photographs, neurons, progress=False)
    all_silent = testreg.make_static(model, photographs, neurons, progress=False, zero="all")
    empty = torch.zeros(1, *find_tower(model).grid(unseen), dtype=torch.bool)
    ways: dict[str, dict[str, Any]] = {
        "register": {},
        "static": {"static": static},
        "register, all": {"zero": "all"},
        "static, all": {"static": all_silent, "zero": "all"},
        "silent": {"target": empty},
        "silent, all": {"target": empty, "zero": "all"},
    }
    truth, before = observe(untouched, unseen), observe(model, unseen)
    results = {"untouched network": figures(before, truth, truth), "nothing moved": figures(before, before, truth)}
    for way, options in ways.items():
        with testreg.patched(model, neurons, **options):
            results[way] = figures(before, observe(model, unseen), truth)
    rows = [[way, *(f"{value:.3f}" for value in each.values())] for way, each in results.items()]
    return [["way", *results["nothing moved"]], *rows]


def preprocessed_images(model: nn.Module, folder: str) -> Tensor:
    """The images of a folder, preprocessed as the model's library does, (n, 3, h, w)."""
    return torch.stack([image for _, image in ImageStream(folder, OwnTransform(model)).numbered()])


@torch.no_grad()
def times(batch: int, turns: int) -> dict[str, float]:
    """{way: the median ratio of its CPU time to that of the plain model}."""
    torch.manual_seed(0)
    model, images = torchvision.models.vit_b_16(weights=None).eval(), torch.randn(batch, 3, 224, 224)
    static = testreg.make_static(model, images, TIMED_NEURONS, progress=False)
    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "plain": nullcontext,
        "noise": nullcontext,
        "register": lambda: testreg.patched(model, TIMED_NEURONS),
        "token": lambda: testreg.patched(model, TIMED_NEURONS, static=static),
        "bias": lambda: testreg.patched(model, TIMED_NEURONS, static=replace(static, form="bias")),
    }
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        spent = {}
        for way, state in ways.items():
            with state():
                start = time.process_time()
                model(images)
                spent[way] = time.process_time() - start
        for way, seconds in spent.items():
            ratios[way].append(seconds / spent["plain"])
    return {way: statistics.median(values) for way, values in ratios.items() if way != "plain"}


if __name__ == "__main__":
    main()
