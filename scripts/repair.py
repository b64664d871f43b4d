"""Outliers that no neuron moves: what it helps to replace position embeddings, and patches between two blocks.

    python scripts/repair.py positions MODEL --images PHOTOS
    python scripts/repair.py patches MODEL --images PHOTOS --data COCO256

`positions`: into a network without outliers three position embeddings are planted that stand out, by adding a random
direction, or one channel, of some norm. The untouched network is the truth that `testreg.repair` should restore:
`scripts/restoration` says what the figures mean.

`patches`: in a network with outliers of its own these are replaced in front of a block, with and without registers (the
bundled list of the checkpoint): the whole of them by the mean of their neighbours (`neighbours`; before the last block,
as SC-CLIP does, arXiv 2411.15869), or their massive channels alone (`channels`). `testreg.repair` does not do so: this
measures why. `scripts/evidence/shows.py` says what the figures mean; mIoU is that of CLS' attention with the masks of
things.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from evidence import shows
from restoration.closeness import figures, observe
from restoration.tables import markdown, number
from torch import Tensor

import testreg
from testreg.evaluation import attention_seg
from testreg.evaluation.evaluation import Variant
from testreg.families import Tower, find_tower, position_embedding
from testreg.io.images import ImageStream
from testreg.io.loading import LoadedModel, load_model
from testreg.measure.conclusion import MASSIVE
from testreg.measure.outliers import OutlierRule
from testreg.measure.repair import filled

PLACES = (0.15, 0.25), (0.5, 0.8), (0.99, 0.0)  # of the rows and columns; the last is a corner
NORMS = (30.0, 313.0)  # the second is what a SigLIP was reported to have at one patch
BATCH = 8
Replace = Callable[[Tensor, Tensor], Tensor]
"""Patches (B, h, w, C), and which are outliers (B, h, w) -> patches."""


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    print(markdown(of_positions(args) if args.what == "positions" else of_patches(args)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["positions", "patches"])
    parser.add_argument("model", help="as testreg.load_model takes it")
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--num-images", type=int, default=24)
    parser.add_argument("--data", help="of `patches`: folder of images with masks, for mIoU (default: none)")
    parser.add_argument("--num-masks", type=int, default=40)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 518], help="of `positions`: sides in pixels")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def prepared(loaded: LoadedModel, args: argparse.Namespace) -> Tensor:
    stream = ImageStream(args.images, loaded.transform, num_images=args.num_images)
    return torch.stack([image for _, image in stream.numbered()])


# Position embeddings --------------------------------------------------------------------------------------------------


def of_positions(args: argparse.Namespace) -> list[list[str]]:
    rows, generator = list[list[str]](), torch.Generator().manual_seed(0)
    for size in args.sizes:
        loaded = load_model(args.model, image_size=size, any_size=True)
        images = prepared(loaded, args)
        untouched = observe(loaded.model, images)
        for norm in NORMS:
            for kind in ("direction", "channel"):
                planted = copy.deepcopy(loaded.model)
                plant(find_tower(planted), norm, kind, generator)
                before = observe(planted, images)
                after = observe(testreg.repair(planted), images)
                for name, seen in (("planted", before), ("repaired", after)):
                    found = figures(before, seen, untouched)
                    rows.append([f"{size}", f"{norm:.0f}, {kind}", name, *(number(each, 3) for each in found.values())])
    return [["size", "planted", "", *found], *rows]


def plant(tower: Tower, norm: float, kind: str, generator: torch.Generator) -> None:
    """Add to the position embeddings at `PLACES` a random direction, or a channel, of some norm."""
    embedding = position_embedding(tower)
    assert embedding is not None, f"{tower.family.name} has no position embeddings that testreg can read"
    rows, columns = embedding.grid
    numbers = torch.tensor([int(down * rows) * columns + int(across * columns) for down, across in PLACES])
    if kind == "direction":
        added = F.normalize(torch.randn(len(numbers), tower.width, generator=generator), dim=-1)
    else:
        added = F.one_hot(torch.full((len(numbers),), tower.width // 5), tower.width).float()
    embedding.replace(numbers, embedding.patches[numbers] + norm * added)


# Patches between two blocks -------------------------------------------------------------------------------------------


def of_patches(args: argparse.Namespace) -> list[list[str]]:
    loaded = load_model(args.model)
    images, tower = prepared(loaded, args), find_tower(loaded.model)
    diagnosis = testreg.diagnose(loaded.model, list(images), progress=False)
    assert diagnosis.outliers is not None, f"{args.model} has no outliers"
    last, behind = tower.depth - 1, diagnosis.outliers.onset_block + 1
    ways: dict[str, tuple[range, Replace] | None] = {
        "nothing": None,
        f"neighbours before block {last}": (range(last, last + 1), neighbours),
        f"neighbours before block {behind}": (range(behind, behind + 1), neighbours),
        f"channels before block {last}": (range(last, last + 1), channels),
        f"channels before block {behind}": (range(behind, behind + 1), channels),
    }
    rows, plain = list[list[str]](), None
    for registers in (False, True):
        for name, way in ways.items() if not registers else list(ways.items())[:2]:
            with (
                testreg.patched(loaded.model) if registers else nullcontext(),
                nullcontext() if way is None else replacing(tower, *way),
            ):
                seen = seen_of(loaded, images)
                plain = plain or seen
                found = {key: metric.value for key, metric in shows.score(plain, seen).items()}
                if args.data is not None:
                    found["mIoU"] = overlap(loaded, args.data, args.num_masks)
            rows.append([name, "yes" if registers else "no", *(number(each, 3) for each in found.values())])
            print(*rows[-1], flush=True)
    return [["replaced", "registers", *(f"`{key}`" for key in found)], *rows]


@contextmanager
def replacing(tower: Tower, blocks: range, replace: Replace) -> Iterator[None]:
    """Within the context, patches that are outliers in front of these blocks are replaced."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, *_ = kwargs or ("",)
        tokens: Tensor = args[0] if args else kwargs[name]
        side = int((tokens.shape[1] - tower.num_prefix) ** 0.5)  # of the square of patches
        patches = tokens[:, tower.num_prefix : tower.num_prefix + side**2].unflatten(1, (side, side))
        norms = patches.norm(dim=-1)
        outlier = (norms.flatten(1) > OutlierRule().limit(norms.flatten(1))).view_as(norms)
        changed = tokens.clone()
        changed[:, tower.num_prefix : tower.num_prefix + side**2] = replace(patches, outlier).flatten(1, 2)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, name: changed})

    handles = [tower.blocks[i].module.register_forward_pre_hook(hook, with_kwargs=True) for i in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def neighbours(patches: Tensor, outlier: Tensor) -> Tensor:
    return torch.stack([filled(*each) for each in zip(patches, outlier, strict=True)])


def channels(patches: Tensor, outlier: Tensor) -> Tensor:
    if not outlier.any():
        return patches
    mean = patches[outlier].mean(0).abs()
    replaced = outlier[..., None] & (mean > MASSIVE * mean.median())
    return torch.where(replaced, neighbours(patches, outlier), patches)


def seen_of(loaded: LoadedModel, images: Tensor) -> shows.Recorded:
    """What the model, as it is now, shows of images."""
    variant = Variant("plain", loaded.model, loaded.transform, nullcontext, None)
    found = defaultdict[str, list[Tensor]](list)
    with torch.no_grad():
        for batch in images.split(BATCH):
            for name, value in shows.compute(variant, batch).items():
                found[name].append(value)
    return shows.Recorded(Stacked({name: torch.cat(values) for name, values in found.items()}))


class Stacked(dict[str, Tensor]):
    """What `shows.Recorded` reads, in memory: hooks are not among what features on disk are known by."""

    def stacked(self, name: str) -> Tensor:
        return self[name]


def overlap(loaded: LoadedModel, data: str, num_images: int) -> float:
    """mIoU of CLS' attention with the masks of things."""
    with tempfile.TemporaryDirectory() as cache:
        options: dict[str, Any] = {"num_images": num_images, "foreground": "1-90", "ignore": 0, "resamples": 10}
        result = attention_seg.evaluate(loaded, data, cache=cache, progress=False, **options)
    return dict(result.metrics).get("patched", result.metrics["plain"])["miou"]


if __name__ == "__main__":
    main()
