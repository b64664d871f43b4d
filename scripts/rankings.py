"""Which ranking of neurons leaves the cleanest maps? Half of the images rank neurons, the other half measure.

    python scripts/rankings.py hf:CLIP --images photos/ -o rankings.json

For each score, the best neurons are moved to `--registers` registers: those of the blocks up to the onset (the first
block after which there are outliers, patches of huge norm), up to the block where outliers stand out most, or of all
blocks. `selective` takes all neurons with more than 80 % of their squared activation at outliers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from testreg.calibration.effects import EffectMeter
from testreg.families import Tower, find_tower
from testreg.files import replacing
from testreg.io.images import ImageStream
from testreg.io.loading import load_model
from testreg.io.packing import PackedImage
from testreg.measure.diagnose import diagnose
from testreg.measure.hooks import recording_inputs
from testreg.measure.outliers import Detection, OutlierRule, token_norms
from testreg.measure.ranking import SELECTIVE, SUMS, best_neurons, statistics_of

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images", required=True)
    parser.add_argument("--num-images", type=int, default=96)
    parser.add_argument("--top-k", type=int, default=30)
    parser.add_argument("--registers", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model)
    model, tower = loaded.model, find_tower(loaded.model)
    images = [image for _, image in ImageStream(args.images, loaded.transform, num_images=args.num_images).numbered()]
    ranking, measuring = torch.stack(images[::2]), images[1::2]
    outliers = diagnose(model, ranking, progress=False).outliers
    assert outliers is not None, "the model has no outliers"
    detection = Detection(OutlierRule(), outliers.block, frozenset(), outliers.onset_block)
    meter = EffectMeter(
        model, tower, [PackedImage.of(each) for each in measuring], detection, outliers.onset_block, batch_size=BATCH
    )
    rankings = rankings_of(tower, ranking, detection)
    rows = []
    sets = [
        (name, last) for name in rankings for last in sorted({outliers.onset_block, outliers.block, tower.depth - 1})
    ]
    print("| ranking | blocks up to | neurons | left | sink | unlike | hottest | change, pooled | change, patches |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, last in tqdm(sets, disable=None):
        neurons = best_neurons(
            rankings[name], last, tower.depth * tower.mlp_width if name == "selective" else args.top_k
        )
        effect = meter.effect(neurons, args.registers)
        rows.append({"ranking": name, "last": last, **asdict(effect)})
        figures = (
            effect.remaining,
            effect.sink,
            effect.unlike,
            effect.hottest,
            effect.change_pooled,
            effect.change_patches,
        )
        cells = (name, str(last), str(len(neurons)), *("-" if each is None else f"{each:.3f}" for each in figures))
        tqdm.write(f"| {' | '.join(cells)} |")
    if args.output:
        with replacing(args.output) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def rankings_of(tower: Tower, images: Tensor, detection: Detection) -> dict[str, Tensor]:
    """{name of a score: the scores of all neurons, (L, H)}, for L blocks of H neurons."""
    numbers = range(len(images))
    sums = {}
    for score in SUMS:
        batches = zip(images.split(BATCH), torch.tensor(numbers).split(BATCH), strict=True)
        parts = [statistics_of(tower, batch, indices.tolist(), detection, score=score) for batch, indices in batches]
        total = parts[0]
        for part in parts[1:]:
            total += part
        sums[score] = total.total()
    selectivity = sums["attribution"].selectivity
    attributed = sums["attribution"].scores(tower) / selectivity.clamp(min=1e-12)
    z_score = z_scores(tower, images, detection)
    return {
        "attribution": attributed,
        "attribution x selectivity": attributed * selectivity,
        "selectivity": selectivity,
        "z-score": z_score,
        "z-score x selectivity": z_score * selectivity,
        "|attribution|, selective": attributed.abs() * (selectivity >= SELECTIVE),
        "selective": (selectivity >= SELECTIVE).float() * (z_score > 1),
        "activation (paper)": sums["activation"].scores(tower),
        "contribution": sums["contribution"].scores(tower),
    }


@torch.no_grad()
def z_scores(tower: Tower, images: Tensor, detection: Detection) -> Tensor:
    """(mean |a| at outliers - mean |a| at other patches) / std of |a| over all patches, (L, H), for activations a."""
    sums = torch.zeros(2, 3, tower.depth, tower.mlp_width, dtype=torch.float64)  # at outliers, elsewhere; n, |a|, a^2
    for batch in images.split(BATCH):
        norms = token_norms(tower, batch)
        patches = tower.patches(batch)
        outlier = detection.outliers(norms[..., : patches.stop], tower.num_prefix, tower.grid(batch))[..., patches]
        outlier_at_block = outlier[detection.block]
        hidden: dict[int, Tensor] = {}
        linears = [block.mlps[0].fc2 for block in tower.blocks]
        with recording_inputs(linears, lambda index, each, hidden=hidden: hidden.__setitem__(index, each)):
            tower.run(batch)
        for index, activation in hidden.items():
            magnitude = tower.batch_first(activation)[:, patches].abs().double()
            for side, mask in enumerate((outlier_at_block, ~outlier_at_block)):
                chosen = magnitude[mask]
                sums[side, :, index] += torch.stack(
                    [torch.full_like(chosen[0], len(chosen)), chosen.sum(0), chosen.square().sum(0)]
                )
    number, mean_sum, square_sum = sums.sum(0)
    std = (square_sum / number - (mean_sum / number).square()).clamp(min=1e-12).sqrt()
    means = sums[:, 1] / sums[:, 0].clamp(min=1)
    return ((means[0] - means[1]) / std).float()


if __name__ == "__main__":
    main()
