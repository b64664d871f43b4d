"""Does calibration find the neurons that make outliers, and nothing else? Measured where the answer is known.

    python scripts/proof.py --mechanisms direct              # under half an hour on one core
    python scripts/proof.py                                  # everything: hours
    python scripts/proof.py --seeds 2 --families "timm ViT" --mechanisms spread fading
    python scripts/proof.py --seeds 1 --patch-size 3 --ways testreg --mechanisms spread       # 1,369 patches

Models are small, random and *planted* (`planting`): register neurons, which make outliers (patches of huge norm), were
set by hand. *Decoys* are neurons that fire strongly but make no outliers. In models with the mechanism `direct`, the
seed decides the block and the number of the planted neurons, whether they are in two blocks, and whether one position
has an artefact that no neuron makes (in families whose position embeddings can do that). The other mechanisms are
described in `planting/mechanisms.py`; their models have 8 to 10 blocks. Clean models, and clean models with an artefact
at a fixed position, have no register neurons; every other seed has decoys.

The report uses seeds on which nothing may be tuned: use `--development` to tune. The seeds below those of the report
were used while the choice of neurons was developed.

The rows of the tables are ways to choose neurons:

- `testreg`: `testreg.calibrate(model, images)` with its defaults. It is told nothing.
- `paper`: the recipe of arXiv 2506.08010 with the released code's sparsity filter: mean |activation| at the patches
  whose norm after the last block exceeds mean + 3 sigma. The recipe leaves open how many neurons to take, and up to
  which block: it is told the true numbers.
- `contribution` and other scores of `testreg.calibrate`: the best neurons by that score, as many as were planted.
- `planted`: the planted neurons, as a bound of what is possible.
- `untouched`: no neurons are moved.

The truth is the same model with the planted neurons set to zero. Outliers and changes are measured on crops of parts of
the photographs that calibration does not see.
"""

from __future__ import annotations

import argparse
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from planting import Mechanism, Planted, plant
from planting.networks import (
    CALIBRATION_CROPS,
    DEPTH,
    FAMILIES,
    FIXED,
    PATCH,
    SPLIT,
    TEST_CROPS,
    Neuron,
    as_set,
    crops,
    distance,
    image_size,
    moved,
    observe,
    random_model,
)
from torch import Tensor, nn
from tqdm import tqdm

import testreg
from testreg.families import find_tower
from testreg.measure.outliers import token_norms
from testreg.measure.score import Score

DEPTHS = 8, 9, 10  # numbers of blocks, by seed, of models with other mechanisms than `direct`
DEVELOPMENT = 1000  # the first seed of --development
FIRST_SEED = {"direct": 15}  # the first seed of the report
OTHER_FIRST_SEED = 3  # the same for other mechanisms
SEEDS = {"direct": 10}  # models of each family, by default
OTHER_SEEDS = 2  # the same for other mechanisms
NEAR_SHARE = 0.95  # testreg is near `planted` if it reaches this share of its cosine
PAPER_CHOICE = 10, DEPTH // 2  # the paper's number of neurons and last block in clean models: as published for ViT-B/16

WITH_POSITIONS = ("timm ViT", "timm Eva", "DINOv2", "SigLIP")
"""Families with learned position embeddings and no norm after them, which can have an artefact at a fixed position."""

ALL_IMAGES: dict[str, Any] = {
    "held_out": 0,
    "stability": None,
}  # options to rank on all images, since none have to choose
SCORES: tuple[Score, ...] = typing.get_args(Score)
WAYS = ("testreg", "paper", "planted")
MECHANISM_WAYS = ("testreg", "paper", *(score for score in SCORES if score != "activation"), "planted", "untouched")


@dataclass(frozen=True)
class Outcome:
    """What one way of choosing neurons gave on one model with the mechanism `direct`."""

    family: str
    seed: int
    way: str
    chosen: set[Neuron]
    planted: set[Neuron]
    decoys: dict[Neuron, str]
    """{decoy: its name}."""
    outliers_left: float
    """Outliers after, as a fraction of those before, after the block where it is largest."""
    change_of_patches: float
    """1 - cosine of normal patches after the last block, to those before; mean."""
    change_of_pooled: float
    """The same for CLS, or for the mean of the normal patches in models without CLS."""

    @property
    def precision(self) -> float:
        """The share of the chosen neurons that were planted."""
        return len(self.chosen & self.planted) / max(1, len(self.chosen))

    @property
    def recall(self) -> float:
        """The share of the planted neurons that were chosen."""
        return len(self.chosen & self.planted) / len(self.planted)

    @property
    def decoys_chosen(self) -> list[str]:
        """The names of the decoys that were chosen."""
        return sorted(self.decoys[neuron] for neuron in self.chosen & self.decoys.keys())


@dataclass(frozen=True)
class Fidelity:
    """How close one way of choosing neurons brought a planted model to the model without the mechanism."""

    mechanism: Mechanism
    family: str
    seed: int
    way: str
    num_chosen: int
    decoys_chosen: list[str]
    outliers_left: float
    """Outliers after the block that has most, as a fraction of those after the block that had most before."""
    cosine_of_patches: float
    """Cosine of the patches after the last block with the truth, mean over patches."""
    cosine_of_pooled: float
    """The same for CLS, or for the mean of the patches in models without CLS."""


@dataclass(frozen=True)
class Verdict:
    """Whether one way of choosing neurons left a model alone that has no register neurons."""

    family: str
    way: str
    kind: str
    """"clean", or "fixed" for an artefact at a fixed position."""
    left_alone: bool
    """Whether it chose no neurons."""


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
            results = [
                each
                for family, seed in progress
                for each in fidelities(mechanism, family, seed, images, unseen, args.patch_size, args.ways)
            ]
            print_fidelities(results, args.ways)


def prove_direct(models: Iterable[tuple[str, int]], images: Tensor, unseen: Tensor) -> None:
    """Measure precision and recall in models with the mechanism `direct`, and whether clean models are left alone."""
    outcomes: list[Outcome] = []
    verdicts: list[Verdict] = []
    recalls: dict[Score, list[float]] = {score: [] for score in SCORES}
    for family, seed in models:
        model, planted = planted_model(family, seed, images)
        neurons = as_set(planted.neurons)
        chosen = {
            "testreg": chosen_by_calibration(model, images),
            "paper": chosen_by_paper(model, images, len(neurons), max(planted.neurons)),
            "planted": neurons,
        }
        outcomes += [measure(family, seed, way, model, planted, chosen[way], unseen) for way in WAYS]
        for score, values in recalls.items():
            values.append(recall(score, model, neurons, images))
        for kind in ("clean", "fixed") if family in WITH_POSITIONS else ("clean",):
            model = plain_model(family, seed, images, fixed=kind == "fixed")
            verdicts.append(Verdict(family, "testreg", kind, not chosen_by_calibration(model, images)))
            verdicts.append(Verdict(family, "paper", kind, not chosen_by_paper(model, images, *PAPER_CHOICE)))
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
    """The result of each way on one model with a mechanism; [] if the mechanism cannot be planted into the model."""
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
        chosen["testreg"] = chosen_by_calibration(model, images)
    if "paper" in ways:
        chosen["paper"] = chosen_by_paper(model, images, len(neurons), max(planted.neurons))
    for score in SCORES:
        if score in ways:
            chosen[score] = chosen_by_calibration(model, images, score=score, top_k=len(neurons), **ALL_IMAGES)
    with planted.silenced(model):
        _, *truth = observe(model, unseen)
    outlier, *_ = observe(model, unseen)
    most = outlier.sum((1, 2)).max().clamp(min=1)
    results = []
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
        results.append(Fidelity(mechanism, family, seed, way, len(chosen[way]), decoys, *figures))
    return results


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


def planted_model(name: str, seed: int, images: Tensor) -> tuple[nn.Module, Planted]:
    """A model with the mechanism `direct`. Each planted neuron makes outliers by itself: all must be found."""
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
    """A model without register neurons, with an artefact at a fixed position if `fixed`."""
    model = random_model(name, seed)
    decoys, fixed_position = seed % 2 == 1, FIXED if fixed else None
    plant(model, images, num_neurons=0, decoys=decoys, fixed_position=fixed_position, seed=seed)
    return model


# Ways of choosing neurons ---------------------------------------------------------------------------------------------


def chosen_by_calibration(model: nn.Module, images: Tensor, **options: Any) -> set[Neuron]:
    """The neurons that `testreg.calibrate` chooses; none if it says that there is nothing to move."""
    try:
        found = testreg.calibrate(model, images, progress=False, **options)
    except (testreg.NoOutliersError, testreg.ImmovableOutliersError):
        return set()
    return {(block, unit) for block, unit, _ in found.truncate().ranking}


def chosen_by_paper(model: nn.Module, images: Tensor, top_k: int, max_block: int) -> set[Neuron]:
    """The neurons that the recipe of the paper chooses."""
    tower = find_tower(model)
    norms = token_norms(tower, images)[-1, :, tower.num_prefix :]
    return chosen_by_calibration(
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
    """The share of the n planted neurons that are among the first n of the ranking by a score."""
    return len(chosen_by_calibration(model, images, score=score, top_k=len(neurons), **ALL_IMAGES) & neurons) / len(
        neurons
    )


# Measures -------------------------------------------------------------------------------------------------------------


def measure(
    family: str, seed: int, way: str, model: nn.Module, planted: Planted, chosen: set[Neuron], images: Tensor
) -> Outcome:
    """Measure outliers and features with the chosen neurons moved."""
    before = observe(model, images)
    with moved(model, chosen):
        after = observe(model, images)
    (outlier, prefix, patches), (outlier_after, prefix_after, patches_after) = before, after
    planted_blocks = slice(min(planted.neurons), None)  # blocks
    outliers_left = outlier_after[planted_blocks].sum((1, 2)) / outlier[planted_blocks].sum((1, 2)).clamp(min=1)
    normal = ~outlier.any(0)  # (B, N)
    change = distance(patches, patches_after)[normal].mean()
    if prefix.shape[1]:
        change_of_pooled = distance(prefix[:, 0], prefix_after[:, 0]).mean()
    else:
        means = [(each * normal.unsqueeze(-1)).sum(1) for each in (patches, patches_after)]
        change_of_pooled = distance(*means).mean()
    decoys = {neuron: name for name, neuron in planted.named_decoys.items()}
    figures = (float(outliers_left.max()), float(change), float(change_of_pooled))
    return Outcome(family, seed, way, chosen, as_set(planted.neurons), decoys, *figures)


# Tables ---------------------------------------------------------------------------------------------------------------


def print_outcomes(outcomes: list[Outcome], verdicts: list[Verdict]) -> None:
    """Print the table of precision, recall and clean models, by family."""
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


def print_fidelities(fidelities_: list[Fidelity], ways: Sequence[str]) -> None:
    """Print the table of a mechanism by way, and where testreg fell short."""
    print(
        "| way | neurons | outliers left | models under 5 % | decoys chosen | cosine of patches | to that of planted "
        "| cosine of CLS or mean | to that of planted |\n|---|---|---|---|---|---|---|---|---|"
    )
    bounds = {(each.family, each.seed): each for each in fidelities_ if each.way == "planted"}
    for way in ways:
        rows = [each for each in fidelities_ if each.way == way]
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
    for each in fidelities_:
        best = bounds[each.family, each.seed]
        is_near = (
            each.cosine_of_patches >= NEAR_SHARE * best.cosine_of_patches
            and each.cosine_of_pooled >= NEAR_SHARE * best.cosine_of_pooled
        )
        if each.way == "testreg" and (each.outliers_left >= 0.05 or each.decoys_chosen or not is_near):
            print(
                f"- {each.family}, seed {each.seed}: {each.num_chosen} neurons, decoys {each.decoys_chosen}, "
                f"{each.outliers_left:.1%} of the outliers left, cosines {each.cosine_of_patches:.3f} and "
                f"{each.cosine_of_pooled:.3f} ({best.cosine_of_patches:.3f} and {best.cosine_of_pooled:.3f} planted)"
            )


def print_decoys(outcomes: list[Outcome]) -> None:
    """Print which decoys were chosen."""
    for way in WAYS[:2]:
        names = Counter(name for each in outcomes if each.way == way for name in each.decoys_chosen)
        print(f"\nDecoys that {way} chose: {', '.join(f'{name} {n}' for name, n in names.most_common()) or 'none'}.")


def mean_and_worst(values: list[float], worst: Callable[[list[float]], float], form: str = ".2f") -> str:
    """The mean of the values and the worst of them, as text."""
    return f"{sum(values) / len(values):{form}} ({worst(values):{form}})"


def fraction(flags: list[bool]) -> str:
    """How many flags are true, as text."""
    return f"{sum(flags)} of {len(flags)}" if flags else ""


def print_recalls(recalls: dict[Score, list[float]]) -> None:
    """Print for each score the share of the n planted neurons that are among the first n of its ranking."""
    print("\n| score | recall | models with all |\n|---|---|---|")
    for score, values in recalls.items():
        print(f"| {score} | {mean_and_worst(values, min)} | {fraction([value == 1 for value in values])} |")


def print_shortfalls(outcomes: list[Outcome]) -> None:
    """Print the models on which testreg missed neurons or chose others."""
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
