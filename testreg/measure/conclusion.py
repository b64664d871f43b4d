"""The conclusion of a diagnosis: from sums over images to figures, and to where the outliers come from."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from testreg.families import find_tower
from testreg.io.processes import Sums
from testreg.measure.diagnosis import (
    HALF,
    MIN_IMAGES,
    QUANTILES,
    BlockDiagnosis,
    Diagnosis,
    FixedPosition,
    Outliers,
    Part,
    PrefixRole,
    Residual,
)
from testreg.measure.observation import BIN, LOWEST, Observations
from testreg.measure.outliers import MIN_FRACTION, OutlierRule
from testreg.neurons import describe_model
from testreg.register import is_patched

HIGH_NORM = 5.0  # largest norm over the median: below 2.3 in a model without outliers, 64 in DINOv2-B
MASSIVE = 10.0  # a direction without massive channels (Gaussian, C = 4096) has its largest at 6 times the median
NUM_CHANNELS = 3  # massive channels reported at each hook point


def conclude(
    model: nn.Module, parts: Sequence[Observations], rule: OutlierRule, *, block: int | None = None
) -> Diagnosis:
    """The diagnosis from what was observed of `model` on some images, by this process or by several.

    Args:
        parts: at least one of them is of an image. They are added up in the first, in place.
    """
    tower = find_tower(model)
    sums = functools.reduce(Observations.add, parts)
    assert sums.image_size is not None
    residuals = [_residual(each) if each else None for each in sums.hook_points]
    embedding, *_ = residuals
    assert embedding is not None
    blocks = _blocks(residuals, sums.attention)
    return Diagnosis(
        model=describe_model(model, tower),
        patched=is_patched(model),
        images=int(sums.hook_points[0]["images"]),
        unreadable_images=sums.unreadable_images,
        image_size=sums.image_size,
        rule=rule.describe(),
        embedding=embedding,
        blocks=blocks,
        outliers=_outliers(sums, blocks, block),
        prefix_roles=_prefix_roles(blocks),
    )


def _residual(sums: Sums) -> Residual:
    if not all(value.isfinite().all() for value in sums.values()):
        raise ValueError("the norms of the tokens are not finite (or zero): run the model in float32 or bfloat16")
    images, patches, outliers = (float(sums[name]) for name in ("images", "patches", "outliers"))

    def mean(name: str, count: float) -> float | None:
        return float(sums[name]) / count if count else None

    return Residual(
        median_norm=float(sums["median"]) / images,
        quantiles=_quantiles(sums["histogram"]),
        max_over_median=float(sums["maximum"]) / images,
        kurtosis=_kurtosis(sums["moments"] / patches),
        outlier_fraction=outliers / patches,
        outlier_ratio=mean("outlier_ratio", outliers),
        outlier_cosine=mean("outlier_cosine", outliers),
        normal_cosine=mean("normal_cosine", patches - outliers),
        massive_channels=_massive_channels(sums["channels"].abs(), sums["channel_energy"]) if outliers else [],
        prefix_ratio=(sums["prefix"] / images).tolist(),
    )


def _quantiles(histogram: Tensor) -> list[float]:
    """The ratios at `QUANTILES`: the middle of the bin in which each lies."""
    levels = torch.tensor(QUANTILES, dtype=torch.float64) * histogram.sum()
    index = torch.searchsorted(histogram.cumsum(0), levels)
    return (LOWEST + (index + 0.5) * BIN).exp().tolist()


def _kurtosis(moments: Tensor) -> float | None:
    """The kurtosis, from the first four moments about any point."""
    first, second, third, fourth = moments.tolist()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None


def _massive_channels(mean: Tensor, energy: Tensor) -> list[tuple[int, float]]:
    """Channels that dominate the outliers, from |sum| and sum of squares (C,) of each channel at them."""
    values, channels = mean.topk(min(NUM_CHANNELS, len(mean)))
    share = energy / energy.sum()
    massive = channels[values > MASSIVE * mean.median()].tolist()
    return [(channel, float(share[channel])) for channel in massive]


def _blocks(residuals: Sequence[Residual | None], attention: Sequence[Sums]) -> list[BlockDiagnosis]:
    """The blocks, from the residual stream at all hook points and from sums over attention."""
    blocks = []
    for before, after, drawn in zip(residuals[1::2], residuals[2::2], attention, strict=True):
        assert after is not None
        blocks.append(
            BlockDiagnosis(
                after_attention=before,
                after_mlp=after,
                outlier_attention=float(drawn["outliers"] / drawn["images"]) if drawn else None,
                prefix_attention=(drawn["prefix"] / drawn["images"]).tolist() if drawn else None,
            )
        )
    return blocks


def _outliers(sums: Observations, blocks: Sequence[BlockDiagnosis], at: int | None) -> Outliers | None:
    """The outliers after block `at`, or after the block where they stand out most; None if they are too few."""
    fraction = torch.tensor([block.after_mlp.outlier_fraction for block in blocks], dtype=torch.float64)
    candidates = fraction >= MIN_FRACTION
    if at is not None:
        candidates &= torch.arange(len(blocks)) == at
    if not candidates.any():
        return None
    excess = sums.excess[:, 2::2]  # (L, L), after blocks
    d = int(excess.diagonal().masked_fill(~candidates, -math.inf).argmax())
    path, peak = sums.excess[d, : 2 * d + 3], excess[d, d]
    onset = int((path >= HALF * peak).float().argmax())  # NaN is not
    faded = (excess[d, d + 1 :] < HALF * peak).nonzero()
    added = (path[2::2] - path[1::2]).sum() / peak  # by MLPs
    fixed_share, fixed_positions = _fixed_positions(sums, d)
    return Outliers(
        block=d,
        fraction=float(fraction[d]),
        onset_block=max(onset - 1, 0) // 2,
        onset_part=_part(onset, path),
        fade_block=d + 1 + int(faded[0]) if len(faded) else None,
        mlp_share=None if added.isnan() else float(added),
        fixed_share=fixed_share,
        fixed_positions=fixed_positions,
    )


def _part(hook_point: int, excess: Tensor) -> Part:
    """The part of the model in front of a hook point; `excess` is NaN at those that cannot be observed."""
    if hook_point == 0:
        return "embedding"
    if hook_point % 2:
        return "attention"
    return "block" if excess[hook_point - 1].isnan() else "MLP"


def _fixed_positions(sums: Observations, d: int) -> tuple[float | None, list[FixedPosition]]:
    """The share of the outliers after block d that lie at positions where most images have one, and these positions.

    Of images of several sizes, those of the most frequent size are compared.
    """
    (_, columns), counts = max(sums.positions.items(), key=lambda item: float(item[1]["images"]))
    images, events = float(counts["images"]), counts["events"][d]  # (N,)
    if images < MIN_IMAGES or not events.any():
        return None, []
    is_fixed = events >= HALF * images
    positions = [
        FixedPosition(n // columns, n % columns, float(events[n]) / images, float(counts["embedding"][n]) / images)
        for n in is_fixed.nonzero().flatten().tolist()
    ]
    return float(events[is_fixed].sum() / events.sum()), positions


def _prefix_roles(blocks: Sequence[BlockDiagnosis]) -> list[PrefixRole]:
    roles = []
    for token in range(len(blocks[0].after_mlp.prefix_ratio)):
        ratios = [block.after_mlp.prefix_ratio[token] for block in blocks]
        drawn = [block.prefix_attention[token] for block in blocks if block.prefix_attention is not None]
        if max(ratios) >= HIGH_NORM:
            roles.append(PrefixRole(token, ratios.index(max(ratios)), max(ratios), max(drawn, default=None)))
    return roles
