"""Does calibration find the neurons that make outliers, and nothing else? Measured where the answer is known.

    python scripts/proof.py --mechanisms direct              # under half an hour on one core
    python scripts/proof.py                                  # everything: hours
    python scripts/proof.py --seeds 2 --families "timm ViT" --mechanisms spread fading
    python scripts/proof.py --seeds 1 --patch-size 3 --ways testreg --mechanisms spread       # 1,369 patches

Models are small, random and *planted* (`planting`): their register neurons were set by hand, among decoys. With the
mechanism `direct` the seeds differ in the block and the number of the planted neurons, in whether these lie in two
blocks, and in whether one position is an artefact besides, which no neuron makes (where the family has position
embeddings that can do it). Clean models have nothing planted but decoys, in every other seed; those with an artefact at
a fixed position, likewise. The other mechanisms are those of `planting/mechanisms.py`, in models of 8 to 10 blocks.

The report has seeds of its own, on which nothing is to be tuned: `--development` is for that. Lower ones than those of
the report were looked at while the choice was made.

The rows of the tables:

- `testreg`: `testreg.calibrate(model, images)` with its defaults. It is told nothing.
- `paper`: the recipe of arXiv 2506.08010 with the released code's sparsity filter: mean |activation| at the patches
  whose norm behind the last block exceeds mean + 3 sigma. Two numbers it leaves to whoever uses it, how many neurons
  and up to which block: it is told the true ones.
- `contribution` and further scores: as many of the best neurons by that score of `testreg.calibrate` as were planted.
- `planted`: the planted neurons themselves, as a bound.
- `untouched`: none are moved.

The truth is the same model in which the planted neurons are silent.

Outliers and changes are measured on crops of parts of the photographs that calibration does not see, by the few lines
in `measure`.
"""

from __future__ import annotations

import argparse
import functools
import math
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from planting import Mechanism, Planted, plant
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

import testreg
from testreg.demo.run import PHOTOGRAPHS
from testreg.families import find_tower
from testreg.io.decoding import open_image
from testreg.io.sources import image_paths
from testreg.measure.outliers import token_norms
from testreg.measure.score import Score

DEPTH, WIDTH, HEADS, PATCH, IMAGE = 6, 64, 4, 8, 112  # 14 x 14 patches
DEPTHS = 8, 9, 10  # of models with the other mechanisms than `direct`
DEVELOPMENT = 1000  # the first seed; of the report:
FIRST_SEED = {"direct": 15}
OTHER_FIRST_SEED = 3
SEEDS = {"direct": 10}  # models of each family, unless told otherwise; of the other mechanisms:
OTHER_SEEDS = 2
STRENGTH = 0.7  # of the random weights of blocks, in units of 1 / sqrt(inputs): blocks matter, and make no outliers
FIXED = (3, 9)  # row and column of the position that may be an artefact
SPLIT = 224  # of 384 columns of a photograph, those in front are for calibration
CALIBRATION_CROPS, TEST_CROPS = 12, 8  # of each of the five photographs
NEAR = 0.95  # of the cosine that moving the planted neurons gives
PAPER_CHOICE = 10, DEPTH // 2  # neurons and last block where there are no true ones: as published for ViT-B/16

TIMM = {"embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 0}
HF = {"hidden_size": WIDTH, "num_attention_heads": HEADS}
HF_MLP = {**HF, "intermediate_size": 4 * WIDTH}
OPEN_CLIP_VISION = {"width": WIDTH, "head_width": WIDTH // HEADS}
OPEN_CLIP_TEXT = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 4, "layers": 1}

FAMILIES: dict[str, Callable[[int, int, int], nn.Module]] = {  # of depth, image size and patch size
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
WITH_POSITIONS = ("timm ViT", "timm Eva", "DINOv2", "SigLIP")  # learned, and no norm behind them

ALL_IMAGES: dict[str, Any] = {"held_out": 0, "stability": None}  # rank by them: nothing has to be chosen
SCORES: tuple[Score, ...] = typing.get_args(Score)
WAYS = ("testreg", "paper", "planted")
MECHANISM_WAYS = ("testreg", "paper", *(score for score in SCORES if score != "activation"), "planted", "untouched")
Neuron = tuple[int, int]


@dataclass(frozen=True)
class Outcome:
    """What one way of choosing neurons gave on one planted model."""

    family: str
    seed: int
    way: str
    chosen: set[Neuron]
    planted: set[Neuron]
    decoys: dict[Neuron, str]
    outliers_left: float
    """At the worst block, as a fraction of those before."""
    change_of_patches: float
    """Mean 1 - cosine of normal patches behind the last block."""
    change_of_pooled: float
    """The same of CLS, or of the mean of the normal patches where there is none."""

    @property
    def precision(self) -> float:
        return len(self.chosen & self.planted) / max(1, len(self.chosen))

    @property
    def recall(self) -> float:
        return len(self.chosen & self.planted) / len(self.planted)

    @property
    def decoys_chosen(self) -> list[str]:
        return sorted(self.decoys[neuron] for neuron in self.chosen & self.decoys.keys())


@dataclass(frozen=True)
class Fidelity:
    """How close one way brought a model to what it would be without the mechanism that was planted."""

    mechanism: Mechanism
    family: str
    seed: int
    way: str
    num_chosen: int
    decoys_chosen: list[str]
    outliers_left: float
    """After the block with the most, as a fraction of those after the block that had the most before."""
    cosine_of_patches: float
    """Mean over all patches behind the last block."""
    cosine_of_pooled: float
    """Of CLS, or of the mean of the patches where there is none."""


@dataclass(frozen=True)
class Verdict:
    """Whether one way left a model alone that has nothing to move."""

    family: str
    way: str
    kind: str
    """clean or fixed."""
    left_alone: bool


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    size = image_size(args.patch_size)
    images, unseen = crops(0, SPLIT, args.crops, size), crops(SPLIT, 384, TEST_CROPS, size)
    for mechanism in args.mechanisms:
        first = DEVELOPMENT if args.development else FIRST_SEED.get(mechanism, OTHER_FIRST_SEED)
        count = args.seeds or SEEDS.get(mechanism, OTHER_SEEDS)
        models = [(family, seed) for family in args.families for seed in range(first, first + count)]
        progress = tqdm(models, desc=mechanism, unit="model", disable=None)
        print(f"\n## {mechanism}, seeds {first} to {first + count - 1}\n", flush=True)
        if mechanism == "direct":
            prove_direct(progress, images, unseen)
        else:
            found = [
                each
                for family, seed in progress
                for each in fidelities(mechanism, family, seed, images, unseen, args.patch_size, args.ways)
            ]
            print_fidelities(found, args.ways)


def prove_direct(models: Iterable[tuple[str, int]], images: Tensor, unseen: Tensor) -> None:
    """Find neurons that make the outliers by themselves, and measure precision and recall; leave clean models alone."""
    outcomes: list[Outcome] = []
    verdicts: list[Verdict] = []
    recalls: dict[Score, list[float]] = {score: [] for score in SCORES}
    for family, seed in models:
        model, planted = planted_model(family, seed, images)
        neurons = as_set(planted.neurons)
        chosen = {
            "testreg": calibrated(model, images),
            "paper": by_paper(model, images, len(neurons), max(planted.neurons)),
            "planted": neurons,
        }
        outcomes += [measure(family, seed, way, model, planted, chosen[way], unseen) for way in WAYS]
        for score, found in recalls.items():
            found.append(recall(score, model, neurons, images))
        for kind in ("clean", "fixed") if family in WITH_POSITIONS else ("clean",):
            model = plain_model(family, seed, images, fixed=kind == "fixed")
            verdicts.append(Verdict(family, "testreg", kind, not calibrated(model, images)))
            verdicts.append(Verdict(family, "paper", kind, not by_paper(model, images, *PAPER_CHOICE)))
    print_outcomes(outcomes, verdicts)
    print_decoys(outcomes)
    print_recalls(recalls)
    print_shortfalls([each for each in outcomes if each.way == "testreg"])


def fidelities(
    mechanism: Mechanism,
    family: str,
    seed: int,
    images: Tensor,
    unseen: Tensor,
    patch_size: int,
    ways: Sequence[str],
) -> list[Fidelity]:
    """What each way makes of one model with a mechanism; nothing where it cannot be planted."""
    model = random_model(family, seed, DEPTHS[seed % len(DEPTHS)], patch_size)
    fixed_position = FIXED if family in WITH_POSITIONS and seed % 4 >= 2 else None
    try:
        planted = plant(model, images, mechanism=mechanism, decoys=True, fixed_position=fixed_position, seed=seed)
    except ValueError as error:
        print(f"{family}, seed {seed}, is left out: {error}", flush=True)
        return []
    neurons = as_set(planted.neurons)
    chosen: dict[str, set[Neuron]] = {"planted": neurons, "untouched": set()}
    if "testreg" in ways:
        chosen["testreg"] = calibrated(model, images)
    if "paper" in ways:
        chosen["paper"] = by_paper(model, images, len(neurons), max(planted.neurons))
    for score in SCORES:
        if score in ways:
            chosen[score] = calibrated(model, images, score=score, top_k=len(neurons), **ALL_IMAGES)
    with planted.silenced(model):
        _, *truth = observe(model, unseen)
    outlier, *_ = observe(model, unseen)
    most = outlier.sum((1, 2)).max().clamp(min=1)
    found = []
    for way in ways:
        with moved(model, chosen[way]):
            outlier, *tokens = observe(model, unseen)
        (prefix, patches), (true_prefix, true_patches) = tokens, truth
        if prefix.shape[1]:
            pooled, true_pooled = prefix[:, 0], true_prefix[:, 0]
        else:
            pooled, true_pooled = patches.mean(1), true_patches.mean(1)
        decoys = sorted(name for name, neuron in planted.named_decoys.items() if neuron in chosen[way])
        figures = (
            float(outlier.sum((1, 2)).max() / most),
            1 - float(distance(patches, true_patches).mean()),
            1 - float(distance(pooled, true_pooled).mean()),
        )
        found.append(Fidelity(mechanism, family, seed, way, len(chosen[way]), decoys, *figures))
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    mechanisms = typing.get_args(Mechanism)
    parser.add_argument("--mechanisms", nargs="+", choices=mechanisms, default=mechanisms, metavar="MECHANISM")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=MECHANISM_WAYS,
        default=MECHANISM_WAYS,
        metavar="WAY",
        help="rows of the tables of other mechanisms than direct",
    )
    parser.add_argument(
        "--patch-size", type=int, default=PATCH, help="of the same models, in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=CALIBRATION_CROPS,
        help="for calibration, of each photograph (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, help=f"models of each family (default: {SEEDS['direct']} of direct, {OTHER_SEEDS} else)"
    )
    parser.add_argument("--development", action="store_true", help="seeds that the report does not use")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.ways = [*args.ways, *({"planted"} - set(args.ways))]  # what the others are compared with
    if args.patch_size != PATCH and "direct" in args.mechanisms:
        parser.error("--patch-size: the mechanism direct has its own; name others with --mechanisms")
    return args


# Images and models ----------------------------------------------------------------------------------------------------


def image_size(patch_size: int) -> int:
    """The side of the images in pixels: IMAGE, cut to whole patches."""
    return IMAGE // patch_size * patch_size


def crops(left: int, right: int, count: int, size: int = IMAGE) -> Tensor:
    """Random crops (5 * count, 3, h, w) between two columns of the photographs, equalised, some of them mirrored."""
    generator = torch.Generator().manual_seed(left)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    found = []
    for path in image_paths(PHOTOGRAPHS):
        photograph = tv.pil_to_tensor(open_image(path))[..., left:right]
        for _ in range(count):
            side = IMAGE + below(right - left - IMAGE + 1)
            crop = tv.crop(photograph, below(384 - side + 1), below(right - left - side + 1), side, side)
            crop = tv.resize(tv.equalize(crop), [size, size], antialias=True)
            found.append(tv.horizontal_flip(crop) if below(2) else crop)
    return torch.stack(found).float() / 127.5 - 1


def planted_model(name: str, seed: int, images: Tensor) -> tuple[nn.Module, Planted]:
    """Each planted neuron writes enough to make outliers by itself, so that none can be left out."""
    num_neurons = 4 + seed % 7
    model = random_model(name, seed)
    planted = plant(
        model,
        images,
        block=2 + seed % 3,
        num_neurons=num_neurons,
        two_blocks=seed % 2 == 1,
        norm_ratio=4.0 * num_neurons,
        decoys=True,
        fixed_position=FIXED if name in WITH_POSITIONS and seed % 4 >= 2 else None,
        seed=seed,
    )
    return model, planted


def plain_model(name: str, seed: int, images: Tensor, *, fixed: bool) -> nn.Module:
    """Without register neurons."""
    model = random_model(name, seed)
    decoys, fixed_position = seed % 2 == 1, FIXED if fixed else None
    plant(model, images, num_neurons=0, decoys=decoys, fixed_position=fixed_position, seed=seed)
    return model


def random_model(name: str, seed: int, depth: int = DEPTH, patch_size: int = PATCH) -> nn.Module:
    return with_random_blocks(functools.partial(FAMILIES[name], depth, image_size(patch_size), patch_size), seed)


@torch.no_grad()
def with_random_blocks(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose weights are random, those of the blocks as large as trained ones."""
    torch.manual_seed(seed)
    model = build().eval()
    for block in find_tower(model).blocks:
        for parameter in block.module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=STRENGTH / parameter.shape[1] ** 0.5)
    return model


# Ways of choosing neurons ---------------------------------------------------------------------------------------------


def calibrated(model: nn.Module, images: Tensor, **options: Any) -> set[Neuron]:
    """The neurons that `calibrate` recommends; none if it says that there is nothing to move."""
    try:
        found = testreg.calibrate(model, images, progress=False, **options)
    except (testreg.NoOutliersError, testreg.ImmovableOutliersError):
        return set()
    return {(block, unit) for block, unit, _ in found.truncate().ranking}


def by_paper(model: nn.Module, images: Tensor, top_k: int, max_block: int) -> set[Neuron]:
    tower = find_tower(model)
    norms = token_norms(tower, images)[-1, :, tower.num_prefix :]
    return calibrated(
        model,
        images,
        block=-1,
        threshold=float(norms.mean() + 3 * norms.std()),
        max_block=max_block,
        score="activation",
        sparsity_filter=True,
        top_k=top_k,
        **ALL_IMAGES,
    )


def recall(score: Score, model: nn.Module, neurons: set[Neuron], images: Tensor) -> float:
    """Of the planted neurons, among the first of a ranking, as many as were planted."""
    return len(calibrated(model, images, score=score, top_k=len(neurons), **ALL_IMAGES) & neurons) / len(neurons)


def as_set(neurons: dict[int, list[int]]) -> set[Neuron]:
    return {(block, unit) for block, units in neurons.items() for unit in units}


# Measures -------------------------------------------------------------------------------------------------------------


def measure(
    family: str, seed: int, way: str, model: nn.Module, planted: Planted, chosen: set[Neuron], images: Tensor
) -> Outcome:
    before = observe(model, images)
    with moved(model, chosen):
        after = observe(model, images)
    (outlier, prefix, patches), (outlier_after, prefix_after, patches_after) = before, after
    made = slice(min(planted.neurons), None)  # blocks
    left = outlier_after[made].sum((1, 2)) / outlier[made].sum((1, 2)).clamp(min=1)
    normal = ~outlier.any(0)  # (B, N)
    change = distance(patches, patches_after)[normal].mean()
    if prefix.shape[1]:
        change_of_pooled = distance(prefix[:, 0], prefix_after[:, 0]).mean()
    else:
        means = [(each * normal.unsqueeze(-1)).sum(1) for each in (patches, patches_after)]
        change_of_pooled = distance(*means).mean()
    decoys = {neuron: name for name, neuron in planted.named_decoys.items()}
    figures = (float(left.max()), float(change), float(change_of_pooled))
    return Outcome(family, seed, way, chosen, as_set(planted.neurons), decoys, *figures)


def moved(model: nn.Module, chosen: set[Neuron]) -> AbstractContextManager[object]:
    """Within the context these neurons, if any, are moved onto a register."""
    neurons = {block: [unit for i, unit in chosen if i == block] for block, _ in chosen}
    return testreg.patched(model, neurons) if chosen else nullcontext()


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches (L, B, N) are outliers, and prefix tokens (B, P, C) and patches (B, N, C) behind the last block.

    The rule is written out here: norm > max(median + 5 * 1.4826 * MAD, 2 * median) of the image's patches. The position
    that may be an artefact is left out.
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
    kept = [i for i in range(num_patches) if i != FIXED[0] * columns + FIXED[1]]
    patches = [each[:, tower.num_prefix :][:, kept] for each in tokens]
    norms = torch.stack(patches).norm(dim=-1)  # (L, B, N)
    median = norms.median(-1, keepdim=True).values
    spread = 1.4826 * (norms - median).abs().median(-1, keepdim=True).values
    return norms > torch.maximum(median + 5 * spread, 2 * median), tokens[-1][:, : tower.num_prefix], patches[-1]


def distance(before: Tensor, after: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(before, after, dim=-1)).clamp(min=0)


# Tables ---------------------------------------------------------------------------------------------------------------


def print_outcomes(outcomes: list[Outcome], verdicts: list[Verdict]) -> None:
    print(
        "| family | way | precision | recall | decoys chosen | outliers left | change of patches | of CLS or mean "
        "| clean left alone | fixed left alone |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    families = list(dict.fromkeys(each.family for each in outcomes))
    for family in (*families, "all"):
        for way in WAYS if family == "all" else WAYS[:2]:
            rows = [each for each in outcomes if family in (each.family, "all") and each.way == way]
            alone = [each for each in verdicts if family in (each.family, "all") and each.way == way]
            cells = [
                family,
                way,
                mean_and_worst([each.precision for each in rows], min),
                mean_and_worst([each.recall for each in rows], min),
                str(sum(len(each.decoys_chosen) for each in rows)),
                mean_and_worst([each.outliers_left for each in rows], max, ".1%"),
                mean_and_worst([each.change_of_patches for each in rows], max, ".3f"),
                mean_and_worst([each.change_of_pooled for each in rows], max, ".3f"),
                *(fraction([each.left_alone for each in alone if each.kind == kind]) for kind in ("clean", "fixed")),
            ]
            print(f"| {' | '.join(cells)} |")
    print("\nMean over the seeds (worst).")


def print_fidelities(found: list[Fidelity], ways: Sequence[str]) -> None:
    print(
        "| way | neurons | outliers left | models under 5 % | decoys chosen | cosine of patches | to that of planted "
        "| cosine of CLS or mean | to that of planted |\n|---|---|---|---|---|---|---|---|---|"
    )
    bounds = {(each.family, each.seed): each for each in found if each.way == "planted"}
    for way in ways:
        rows = [each for each in found if each.way == way]
        best = [bounds[each.family, each.seed] for each in rows]
        patches, pooled = [each.cosine_of_patches for each in rows], [each.cosine_of_pooled for each in rows]
        cells = [
            way,
            f"{sum(each.num_chosen for each in rows) / len(rows):.1f}",
            mean_and_worst([each.outliers_left for each in rows], max, ".1%"),
            fraction([each.outliers_left < 0.05 for each in rows]),
            str(sum(len(each.decoys_chosen) for each in rows)),
            mean_and_worst(patches, min, ".3f"),
            mean_and_worst([a / b.cosine_of_patches for a, b in zip(patches, best, strict=True)], min, ".3f"),
            mean_and_worst(pooled, min, ".3f"),
            mean_and_worst([a / b.cosine_of_pooled for a, b in zip(pooled, best, strict=True)], min, ".3f"),
        ]
        print(f"| {' | '.join(cells)} |")
    print("\nMean over the models (worst). Where testreg fell short:")
    for each in found:
        best = bounds[each.family, each.seed]
        is_near = (
            each.cosine_of_patches >= NEAR * best.cosine_of_patches
            and each.cosine_of_pooled >= NEAR * best.cosine_of_pooled
        )
        if each.way == "testreg" and (each.outliers_left >= 0.05 or each.decoys_chosen or not is_near):
            print(
                f"- {each.family}, seed {each.seed}: {each.num_chosen} neurons, decoys {each.decoys_chosen}, "
                f"{each.outliers_left:.1%} of the outliers left, cosines {each.cosine_of_patches:.3f} and "
                f"{each.cosine_of_pooled:.3f} ({best.cosine_of_patches:.3f} and {best.cosine_of_pooled:.3f} planted)"
            )


def print_decoys(outcomes: list[Outcome]) -> None:
    for way in WAYS[:2]:
        names = Counter(name for each in outcomes if each.way == way for name in each.decoys_chosen)
        print(f"\nDecoys that {way} chose: {', '.join(f'{name} {n}' for name, n in names.most_common()) or 'none'}.")


def mean_and_worst(values: list[float], worst: Callable[[list[float]], float], form: str = ".2f") -> str:
    return f"{sum(values) / len(values):{form}} ({worst(values):{form}})"


def fraction(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}" if flags else ""


def print_recalls(recalls: dict[Score, list[float]]) -> None:
    """Of the scores alone: how many planted neurons are first, if as many are taken."""
    print("\n| score | recall | models with all |\n|---|---|---|")
    for score, values in recalls.items():
        print(f"| {score} | {mean_and_worst(values, min)} | {fraction([value == 1 for value in values])} |")


def print_shortfalls(outcomes: list[Outcome]) -> None:
    print("\nWhere testreg fell short:")
    for each in outcomes:
        if each.chosen != each.planted or each.outliers_left >= 0.05:
            others = len(each.chosen - each.planted - each.decoys.keys())
            print(
                f"- {each.family}, seed {each.seed}: missed {len(each.planted - each.chosen)} of {len(each.planted)}, "
                f"chose {each.decoys_chosen} and {others} others; {each.outliers_left:.1%} of the outliers left"
            )


if __name__ == "__main__":
    main()
