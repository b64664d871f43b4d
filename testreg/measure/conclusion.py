"""The conclusion of a diagnosis: sums over images become figures, which say where the outliers come from."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Grid, Tower, find_tower, position_embedding
from testreg.io.processes import Sums
from testreg.measure.diagnosis import (
    HALF,
    MIN_IMAGES,
    QUANTILES,
    AttentionHead,
    BlockDiagnosis,
    Diagnosis,
    EmbeddingPosition,
    FixedPosition,
    Outliers,
    Part,
    PrefixRole,
    Residual,
    Sink,
    StandingEmbeddings,
)
from testreg.measure.observation import BIN, LOWEST, Observations
from testreg.measure.outliers import MIN_FRACTION, OutlierRule
from testreg.measure.repair import is_repaired, positions_of, standing_out
from testreg.measure.sampling import NUM_QUERIES
from testreg.neurons import describe_model
from testreg.register import is_patched

HIGH_NORM = 5.0  # largest norm over the median: below 2.3 in a model without outliers, 64 in DINOv2-B
MASSIVE = 10.0  # times the median channel; the largest channel of a Gaussian direction (C = 4096) is at 6 times
SINK = 2.0  # outliers are a sink if their share of attention is over so many times their share of the patches
BICUBIC = 2  # positions on either side that interpolation makes an embedding of
NUM_CHANNELS = 3  # massive channels reported at each hook point


def conclude(
    model: nn.Module, parts: Sequence[Observations], rule: OutlierRule, *, block: int | None = None
) -> Diagnosis:
    """The diagnosis from what was observed of `model` on some images, by this process or by several.

    Args:
        parts: the observations of each process, at least one of which has an image. The first is changed in place: the
            others are added to it.
    """
    tower = find_tower(model)
    sums = functools.reduce(Observations.add, parts)
    assert sums.image_size is not None
    residuals = [_residual(each) if each else None for each in sums.hook_points]
    embedding, *_ = residuals
    assert embedding is not None
    blocks = _blocks(residuals, sums.attention)
    standing = _standing_embeddings(tower)
    return Diagnosis(
        model=describe_model(model, tower),
        patched=is_patched(model),
        images=int(sums.hook_points[0]["images"]),
        unreadable_images=sums.unreadable_images,
        image_size=sums.image_size,
        rule=rule.describe(),
        embedding=embedding,
        blocks=blocks,
        outliers=_outliers(sums, blocks, block, standing),
        prefix_roles=_prefix_roles(blocks, tower.num_trained_registers),
        trained_registers=tower.num_trained_registers,
        embedding_positions=_embedding_positions(sums),
        attention_queries=NUM_QUERIES if any(sums.attention) else None,
        num_frames=sums.num_frames,
        standing_embeddings=standing,
        repaired=is_repaired(tower),
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
    """The kurtosis, from the first four moments about any point; None if there is no variance."""
    first, second, third, fourth = moments.tolist()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None


def _massive_channels(mean: Tensor, energy: Tensor) -> list[tuple[int, float]]:
    """Channels that dominate the outliers, from their |sum| (C,) and sum of squares (C,) over the outliers."""
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
            BlockDiagnosis(after_attention=before, after_mlp=after, **_attention(drawn))
            if drawn
            else BlockDiagnosis(before, after, None, None)
        )
    return blocks


def _attention(sums: Sums) -> dict[str, Any]:
    """The fields of a `BlockDiagnosis` that are of attention, by name."""
    to_outliers = sums["to_outliers"] / sums["images"]  # (heads,)
    values = ranks = torch.full_like(to_outliers, math.nan)
    if "values" in sums:
        values = sums["values"] / sums["outliers"]
        ranks = torch.stack([_effective_rank(taken) for taken in sums["taken"]])

    def mean(of_heads: Tensor) -> float | None:
        return _if_finite((of_heads * to_outliers).sum() / to_outliers.sum())

    return {
        "outlier_attention": float(to_outliers.mean()),
        "prefix_attention": (sums["prefix"] / sums["images"]).tolist(),
        "column_ratio": float(sums["column_ratio"] / sums["images"]),
        "value_ratio": mean(values),
        "broadcast_rank": mean(ranks),
        "heads": [
            AttentionHead(float(drawn), _if_finite(value), _if_finite(rank))
            for drawn, value, rank in zip(to_outliers, values, ranks, strict=True)
        ],
    }


def _effective_rank(second_moment: Tensor) -> Tensor:
    """exp(entropy of the singular values, as shares of their sum) of vectors with this second moment (D, D)."""
    singular = torch.linalg.eigvalsh(second_moment).clamp(min=0).sqrt()
    share = singular / singular.sum()
    return (-torch.xlogy(share, share).sum()).exp()


def _if_finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _outliers(
    sums: Observations,
    blocks: Sequence[BlockDiagnosis],
    wanted_block: int | None,
    standing: StandingEmbeddings | None,
) -> Outliers | None:
    """The outliers after the wanted block, by default where they stand out most; None if they are too few."""
    fraction = torch.tensor([block.after_mlp.outlier_fraction for block in blocks], dtype=torch.float64)
    candidates = fraction >= MIN_FRACTION
    if wanted_block is not None:
        candidates &= torch.arange(len(blocks)) == wanted_block
    if not candidates.any():
        return None
    excess = sums.excess[:, 2::2]  # (L, L), after blocks
    d = int(excess.diagonal().masked_fill(~candidates, -math.inf).argmax())
    path, peak = sums.excess[d, : 2 * d + 3], excess[d, d]
    onset = int((path >= HALF * peak).float().argmax())  # never a hook point with NaN
    faded = (excess[d, d + 1 :] < HALF * peak).nonzero()
    added = (path[2::2] - path[1::2]).sum() / peak  # by MLPs
    fixed_share, border_share, fixed_positions = _fixed_positions(sums, d, standing)
    return Outliers(
        block=d,
        fraction=float(fraction[d]),
        onset_block=max(onset - 1, 0) // 2,
        onset_part=_part(onset, path),
        fade_block=d + 1 + int(faded[0]) if len(faded) else None,
        mlp_share=None if added.isnan() else float(added),
        fixed_share=fixed_share,
        fixed_positions=fixed_positions,
        border_share=border_share,
        sink=_sink(blocks),
        first_block=_first_of_run(sums, fraction, d),
        last_block=_last_of_run(fraction, d),
    )


def _first_of_run(sums: Observations, fraction: Tensor, d: int) -> int | None:
    """The first block of the run of blocks with outliers that `d` is in; None if it begins in front of block 0."""
    first = d
    while first > 0 and fraction[first - 1] >= MIN_FRACTION:
        first -= 1
    embedding = sums.hook_points[0]
    return None if first == 0 and embedding["outliers"] >= MIN_FRACTION * embedding["patches"] else first


def _last_of_run(fraction: Tensor, d: int) -> int:
    """The last block of the run of blocks with outliers that `d` is in."""
    last = d
    while last + 1 < len(fraction) and fraction[last + 1] >= MIN_FRACTION:
        last += 1
    return last


def _sink(blocks: Sequence[BlockDiagnosis]) -> Sink | None:
    """The block where outliers draw most attention; None if they draw hardly more than other patches."""
    fractions = [0.0, *(block.after_mlp.outlier_fraction for block in blocks)]  # at the input of each block
    drawing = [
        (block.outlier_attention, index)
        for index, block in enumerate(blocks)
        if block.outlier_attention is not None
        and fractions[index] >= MIN_FRACTION
        and block.outlier_attention > SINK * fractions[index]
    ]
    if not drawing:
        return None
    drawn, index = max(drawing)
    heads = [head.outlier_attention for head in blocks[index].heads or ()]
    return Sink(
        block=index,
        attention=drawn,
        head=heads.index(max(heads)),
        head_attention=max(heads),
        value_ratio=blocks[index].value_ratio,
        broadcast_rank=blocks[index].broadcast_rank,
    )


def _part(hook_point: int, excess: Tensor) -> Part:
    """The part of the model that a hook point comes after; `excess` is NaN at those that cannot be observed."""
    if hook_point == 0:
        return "embedding"
    if hook_point % 2:
        return "attention"
    return "block" if excess[hook_point - 1].isnan() else "MLP"


def _fixed_positions(
    sums: Observations, d: int, standing_embeddings: StandingEmbeddings | None
) -> tuple[float | None, float | None, list[FixedPosition]]:
    """Positions that are outliers after block d in at least half of the images.

    If images have several sizes, only those of the most frequent size are compared.

    Returns:
        The share of the outliers at these positions, the share in the border, and the positions.
    """
    grid, counts = _most_frequent(sums)
    images, events = float(counts["images"]), counts["events"][d]  # (N,)
    if images < MIN_IMAGES or not events.any():
        return None, None, []
    is_fixed = events >= HALF * images
    border = _border(grid)
    standing = {each.position for each in _embedding_positions(sums)}
    positions = []
    for n in is_fixed.nonzero().flatten().tolist():
        time, row, column = _place(n, grid)
        frequency, ratio = float(events[n]) / images, float(counts["embedding"][n]) / images
        in_border = border is not None and bool(border[n])
        each = FixedPosition(row, column, frequency, ratio, in_border, time=time)
        is_repairable = standing_embeddings is not None and _comes_from(each, grid, standing_embeddings)
        positions.append(replace(each, is_embedding=each.position in standing, is_repairable=is_repairable))
    border_share = None if border is None else float(events[border].sum() / events.sum())
    return float(events[is_fixed].sum() / events.sum()), border_share, positions


def _place(number: int, grid: Grid) -> tuple[int | None, int, int]:
    """The time, row and column of a patch by its number; the time is None in an image."""
    *times, rows, columns = grid
    number, column = divmod(number, columns)
    time, row = divmod(number, rows)
    return time if times else None, row, column


def _most_frequent(sums: Observations) -> tuple[Grid, Sums]:
    """The grid of patches that most images have, and the sums over these images."""
    return max(sums.positions.items(), key=lambda item: float(item[1]["images"]))


def _border(grid: Grid) -> Tensor | None:
    """Which patches (N,) are in the outermost rows and columns; None if these are half of the patches or more."""
    border = torch.ones(grid, dtype=torch.bool)
    border[..., 1:-1, 1:-1] = False
    return border.flatten() if 2 * border.sum() < border.numel() else None


def _embedding_positions(sums: Observations) -> list[EmbeddingPosition]:
    """The positions whose norm in front of the first block stands out, averaged over the images."""
    grid, counts = _most_frequent(sums)
    if counts["images"] < MIN_IMAGES:
        return []
    ratios = counts["embedding"] / counts["images"]  # (N,)
    standing = (ratios > OutlierRule().limit(ratios)).nonzero().flatten().tolist()
    places = [(n, *_place(n, grid)) for n in standing]
    return [EmbeddingPosition(row, column, float(ratios[n]), time) for n, time, row, column in places]


def _standing_embeddings(tower: Tower) -> StandingEmbeddings | None:
    """The position embeddings that `repair` would replace."""
    embedding = position_embedding(tower)
    if embedding is None or not (where := standing_out(embedding)).any():
        return None
    norms, positions = embedding.patches.float().norm(dim=-1), positions_of(where.nonzero().flatten(), embedding)
    return StandingEmbeddings(positions, norms[where].tolist(), float(norms.median()), embedding.grid)


def _comes_from(fixed: FixedPosition, grid: Grid, standing: StandingEmbeddings) -> bool:
    """Whether one of the embeddings is that of a fixed position, or is interpolated to it."""
    rows, columns = grid[-2:]
    if (rows, columns) == standing.grid:
        return (fixed.row, fixed.column) in standing.positions
    down, across = standing.grid[0] / rows, standing.grid[1] / columns
    # The centre of the patch, in positions of the embeddings' own grid.
    row, column = (fixed.row + 0.5) * down - 0.5, (fixed.column + 0.5) * across - 0.5
    return any(
        abs(one - row) <= BICUBIC * max(1.0, down) and abs(other - column) <= BICUBIC * max(1.0, across)
        for one, other in standing.positions
    )


def _prefix_roles(blocks: Sequence[BlockDiagnosis], trained_registers: int) -> list[PrefixRole]:
    """The prefix tokens whose norm is as high as an outlier's; the last prefix tokens are trained registers."""
    roles, count = [], len(blocks[0].after_mlp.prefix_ratio)
    for token in range(count):
        ratios = [block.after_mlp.prefix_ratio[token] for block in blocks]
        drawn = [block.prefix_attention[token] for block in blocks if block.prefix_attention is not None]
        if max(ratios) >= HIGH_NORM:
            block, is_register = ratios.index(max(ratios)), token >= count - trained_registers
            roles.append(PrefixRole(token, block, max(ratios), max(drawn, default=None), is_register))
    return roles
