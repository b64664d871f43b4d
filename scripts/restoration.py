"""What registers restore in a real pretrained network into which register neurons are planted.

The network is one without outliers of its own. A mechanism is planted into it (`scripts/planting`), and `calibrate`,
told nothing, looks for the neurons. The untouched network is the truth: of each way of choosing neurons, the table says
how many outliers are left, and how near CLS and patches come to it, on images that neither planting nor calibration has
seen.

    python scripts/restoration.py MODEL --images PHOTOS --test OTHERS [--mechanisms spread ...] [--lost COCO]

Ways: `testreg` moves what calibration finds by itself. `paper` is the paper's score (mean |activation|), `contribution`
and `attribution` are those scores, all three told the true number of neurons. `zeroing` silences what `testreg` moves,
`random` moves as many random neurons of the same blocks, and `planted` moves all that was planted. What is left of the
outliers is to be compared with those of the untouched network.
With `--lost`, object discovery (CorLoc by LOST on values, images squashed to 448) is measured of these networks, and of
`testreg` and `planted`. All of this is of a planted network: it says nothing about how often real ones have such
neurons.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from planting import Mechanism, Planted, plant_into
from torch import Tensor, nn

import testreg
from testreg.families import find_tower
from testreg.files import replacing
from testreg.io.images import ImageStream
from testreg.io.loading import load_model
from testreg.io.preprocessing import OwnTransform
from testreg.measure.hooks import recorded_norms, recorded_tokens, replacing_inputs
from testreg.measure.outliers import OutlierRule

MECHANISMS = get_args(Mechanism)
NUM_PLANTING = 64  # images that set the thresholds of what is planted
BATCH = 16
RULE = OutlierRule()
Neurons = dict[int, list[int]]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    untouched = load_model(args.model).model.eval()
    photographs, unseen = prepared(untouched, args.images), prepared(untouched, args.test)[: args.num_test]
    rows: list[dict[str, Any]] = []
    for mechanism in args.mechanisms:
        rows += restoration(untouched, mechanism, args.seed, photographs, unseen, args.lost)
        print(table([row for row in rows if row["mechanism"] == mechanism]), flush=True)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a network without outliers, of 12 blocks or more, such as hf:FOLDER")
    parser.add_argument("--images", required=True, help="folder of photographs: plant and calibrate")
    parser.add_argument("--test", required=True, help="folder of others: compare with the untouched network")
    parser.add_argument("--num-test", type=int, default=48)
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, default=["spread"], metavar="MECHANISM")
    parser.add_argument("--seed", type=int, default=0, help="of what is planted")
    parser.add_argument("--lost", help="folder of COCO: images, annotations/instances_*.json")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def prepared(model: nn.Module, folder: str) -> Tensor:
    """The images of a folder, (n, 3, h, w), as the model's own library prepares them."""
    return torch.stack([image for _, image in ImageStream(folder, OwnTransform(model)).numbered()])


def restoration(
    untouched: nn.Module, mechanism: Mechanism, seed: int, photographs: Tensor, unseen: Tensor, lost: str | None
) -> list[dict[str, Any]]:
    """A row of figures for each way."""
    model = deepcopy(untouched)
    planted = plant_into(model, photographs[:NUM_PLANTING], mechanism=mechanism, seed=seed)
    found = testreg.calibrate(model, photographs, progress=False)
    chosen = found.truncate().by_block()
    number = sum(map(len, planted.neurons.values()))
    ranked: dict[str, Any] = {"held_out": 0, "stability": None, "top_k": number, "progress": False}
    by_score = {
        score: testreg.calibrate(model, photographs[: 2 * NUM_PLANTING], score=score, **ranked).truncate().by_block()
        for score in ("activation", "contribution", "attribution")
    }
    moved: dict[str, Neurons] = {
        "testreg": chosen,
        "paper": by_score["activation"],
        "contribution": by_score["contribution"],
        "attribution": by_score["attribution"],
        "random": random_neurons(model, chosen, planted, seed),
        "planted": planted.neurons,
    }
    ways: dict[str, Callable[[], Any]] = {
        way: lambda neurons=neurons: testreg.patched(model, neurons) for way, neurons in moved.items()
    }
    ways["zeroing"] = lambda: zeroed(model, chosen)
    truth, before = observe(untouched, unseen), observe(model, unseen)
    rows = [
        figures("nothing moved", planted.neurons, {}, before, before, truth),
        figures("untouched network", planted.neurons, {}, before, truth, truth),  # it has few of its own
    ]
    for way, patching in ways.items():
        with patching():
            after = observe(model, unseen)
        rows.append(figures(way, planted.neurons, moved.get(way, chosen), before, after, truth))
    if lost is not None:
        rows[0]["corloc"], rows[1]["corloc"] = corloc(model, lost, None), corloc(untouched, lost, None)
        for row in rows:
            if row["way"] in ("testreg", "planted"):
                row["corloc"] = corloc(model, lost, moved[row["way"]])
    return [{"mechanism": mechanism, "seed": seed, **row} for row in rows]


def random_neurons(model: nn.Module, chosen: Neurons, planted: Planted, seed: int) -> Neurons:
    """As many random neurons of the same blocks, none of which was planted."""
    generator = torch.Generator().manual_seed(seed)
    width = find_tower(model).mlp_width
    drawn: Neurons = {}
    for block, units in chosen.items():
        order = torch.randperm(width, generator=generator).tolist()
        drawn[block] = [unit for unit in order if unit not in planted.neurons.get(block, ())][: len(units)]
    return drawn


@contextmanager
def zeroed(model: nn.Module, neurons: Neurons) -> Iterator[nn.Module]:
    """Within the context the neurons are silent at all tokens."""
    blocks = find_tower(model).blocks
    silent = [(blocks[block].mlps[0].fc2, torch.tensor(units)) for block, units in neurons.items()]

    def silence(index: int, hidden: Tensor) -> Tensor:
        return hidden.index_fill(-1, silent[index][1], 0.0)

    with replacing_inputs([fc2 for fc2, _ in silent], silence):
        yield model


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (L, B, N) of the patches, and the tokens (B, P + N, C) after the last block."""
    tower = find_tower(model)
    norms, tokens = [], []
    for batch in images.split(BATCH):
        with recorded_norms(tower) as of_blocks, recorded_tokens(tower, -1) as last:
            tower.run(batch)
        patches = tower.patches(batch)
        norms.append(torch.stack(of_blocks)[..., patches])
        tokens.append(last[0][:, : patches.stop])
    return torch.cat(norms, 1), torch.cat(tokens)


def figures(
    way: str,
    planted: Neurons,
    moved: Neurons,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    truth: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """How many outliers are left, at the worst block, as a share of those of the fullest block before; mean cosine of
    CLS, of patches, and of those that were outliers, with the untouched network."""
    (norms, _), (norms_after, tokens), (_, true_tokens) = before, after, truth
    outlier = norms > RULE.limit(norms)
    left = norms_after > torch.maximum(RULE.limit(norms), RULE.limit(norms_after))
    cosine = F.cosine_similarity(tokens, true_tokens, dim=-1)  # (B, P + N)
    of_patches = cosine[:, -norms.shape[-1] :]
    of_planted = [unit for block, units in moved.items() for unit in units if unit in planted.get(block, ())]
    return {
        "way": way,
        "neurons": sum(map(len, moved.values())),
        "of_planted": len(of_planted),
        "outliers": float(outlier.float().mean((1, 2)).max()),
        "max_over_median": float((norms_after.amax(-1) / norms_after.median(-1).values).mean(1).max()),
        "outliers_left": float(left.sum((1, 2)).max() / outlier.sum((1, 2)).max().clamp(min=1)),
        "cosine_cls": float(cosine[:, 0].mean()),
        "cosine_patches": float(of_patches.mean()),
        "cosine_outliers": float(of_patches[outlier.any(0)].mean()),
    }


def corloc(model: nn.Module, data: str, neurons: Neurons | None) -> float:
    """Object discovery by LOST on values, images squashed to 448."""
    from testreg.evaluation import lost  # scipy is needed for nothing else

    with tempfile.TemporaryDirectory() as cache:
        found = lost.evaluate(model, data, neurons=neurons, feature="v", size=448, cache=cache, progress=False)
    return found.metrics["plain" if neurons is None else "patched"]["corloc"]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one mechanism in Markdown."""
    names = [name for name in rows[0] if name not in ("mechanism", "seed", "outliers")]
    lines = [
        f"\n## {rows[0]['mechanism']}, seed {rows[0]['seed']}: planted, {rows[0]['outliers']:.1%} of the patches\n",
        f"| {' | '.join(names)} |\n|{'---|' * len(names)}",
    ]
    for row in rows:
        cells = (row.get(name, "") for name in names)
        shown = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
