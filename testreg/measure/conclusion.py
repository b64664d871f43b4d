"""Conclude a diagnosis: compute its figures from sums over images, and find where the outliers come from.

*Outliers* are patches whose norm is far above the others' of their image. *Hook points* are the places at which the
residual stream was measured: 0 in front of the first block, 2i+1 after the attention of block i, 2i+2 after its MLP.
The *ratio* of a token is its norm over the median norm of the image's patches.
"""

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

HIGH_NORM = 5.0  # a prefix token with this ratio is as high as an outlier; DINOv2-B has 64, clean models below 2.3
# A channel is massive if its magnitude is over this many times the median of all channels. In a random vector of 4096
# channels, the largest magnitude is about 6 times the median.
MASSIVE = 10.0
# Outliers are a *sink* if they draw much attention: more than this many times their share of the patches.
SINK = 2.0
BICUBIC = 2  # bicubic interpolation makes an embedding of those at most this many positions away, in rows and columns
NUM_CHANNELS = 3  # at most this many massive channels are reported at each hook point


def conclude(
    model: nn.Module, parts: Sequence[Observations], rule: OutlierRule, *, block: int | None = None
) -> Diagnosis:
    """Make the diagnosis of `model` from what was observed on some images, by one process or by several.

    Args:
        parts: the observations of each process; at least one has an image. The others are added to the first in place.
        rule: the rule that decided which patches are outliers.
        block: the block whose outliers are judged; None takes the block after which they stand out most.
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
    """The figures of the residual stream at a hook point, from the sums there."""
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
    """The quantiles of the ratios at the levels `QUANTILES`: each is the middle of the histogram's bin it lies in."""
    levels = torch.tensor(QUANTILES, dtype=torch.float64) * histogram.sum()
    index = torch.searchsorted(histogram.cumsum(0), levels)
    return (LOWEST + (index + 0.5) * BIN).exp().tolist()


def _kurtosis(moments: Tensor) -> float | None:
    """The kurtosis, from the first four moments about some point; None if the variance is zero."""
    first, second, third, fourth = moments.tolist()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None


def _massive_channels(magnitude: Tensor, energy: Tensor) -> list[tuple[int, float]]:
    """The channels that dominate the outliers, each with its share of their squared norm.

    Args:
        magnitude: the |sum| of each channel over the outliers, (C,).
        energy: the sum of squares of each channel over the outliers, (C,).
    """
    values, channels = magnitude.topk(min(NUM_CHANNELS, len(magnitude)))
    share = energy / energy.sum()
    massive = channels[values > MASSIVE * magnitude.median()].tolist()
    return [(channel, float(share[channel])) for channel in massive]


def _blocks(residuals: Sequence[Residual | None], attention: Sequence[Sums]) -> list[BlockDiagnosis]:
    """The diagnosis of each block, from the residual stream at all hook points, and the sums of each attention."""
    blocks = []
    for after_attention, after_mlp, sums in zip(residuals[1::2], residuals[2::2], attention, strict=True):
        assert after_mlp is not None
        blocks.append(
            BlockDiagnosis(after_attention=after_attention, after_mlp=after_mlp, **_attention_figures(sums))
            if sums
            else BlockDiagnosis(after_attention, after_mlp, None, None)
        )
    return blocks


def _attention_figures(sums: Sums) -> dict[str, Any]:
    """The attention figures of a `BlockDiagnosis`, by the name of the field."""
    to_outliers = sums["to_outliers"] / sums["images"]  # (heads,)
    values = ranks = torch.full_like(to_outliers, math.nan)
    if "values" in sums:
        values = sums["values"] / sums["outliers"]
        ranks = torch.stack([_effective_rank(taken) for taken in sums["taken"]])

    def mean(of_heads: Tensor) -> float | None:
        """The mean over heads, weighted by the attention that each gives to outliers."""
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
    """The effective rank of vectors with this second moment (D, D): exp of the entropy of their singular values, taken
    as shares of their sum."""
    singular_values = torch.linalg.eigvalsh(second_moment).clamp(min=0).sqrt()
    share = singular_values / singular_values.sum()
    return (-torch.xlogy(share, share).sum()).exp()


def _if_finite(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _outliers(
    sums: Observations,
    blocks: Sequence[BlockDiagnosis],
    wanted_block: int | None,
    standing_embeddings: StandingEmbeddings | None,
) -> Outliers | None:
    """Judge the outliers after the wanted block; None takes the block after which they stand out most.

    Returns None if there are too few outliers.
    """
    fraction = torch.tensor([block.after_mlp.outlier_fraction for block in blocks], dtype=torch.float64)
    candidates = fraction >= MIN_FRACTION
    if wanted_block is not None:
        candidates &= torch.arange(len(blocks)) == wanted_block
    if not candidates.any():
        return None
    # (L, L): in row i and column j, the excess norm that the outliers after block i have after block j.
    excess = sums.excess[:, 2::2]
    block = int(excess.diagonal().masked_fill(~candidates, -math.inf).argmax())
    # The excess norm of the outliers after this block, at all hook points up to it.
    course, peak = sums.excess[block, : 2 * block + 3], excess[block, block]
    onset = int((course >= HALF * peak).float().argmax())  # a hook point; comparisons with NaN are False
    faded = (excess[block, block + 1 :] < HALF * peak).nonzero()
    added_by_mlps = (course[2::2] - course[1::2]).sum() / peak
    fixed_share, border_share, fixed_positions = _fixed_positions(sums, block, standing_embeddings)
    return Outliers(
        block=block,
        fraction=float(fraction[block]),
        onset_block=max(onset - 1, 0) // 2,
        onset_part=_part(onset, course),
        fade_block=block + 1 + int(faded[0]) if len(faded) else None,
        mlp_share=None if added_by_mlps.isnan() else float(added_by_mlps),
        fixed_share=fixed_share,
        fixed_positions=fixed_positions,
        border_share=border_share,
        sink=_sink(blocks),
        first_block=_first_of_run(sums, fraction, block),
        last_block=_last_of_run(fraction, block),
    )


def _first_of_run(sums: Observations, fraction: Tensor, block: int) -> int | None:
    """The first of the successive blocks with outliers around `block`; None if it is block 0, and its input has
    outliers already.

    `fraction` (L,) is the fraction of the patches that are outliers after each block.
    """
    first = block
    while first > 0 and fraction[first - 1] >= MIN_FRACTION:
        first -= 1
    embedding = sums.hook_points[0]
    return None if first == 0 and embedding["outliers"] >= MIN_FRACTION * embedding["patches"] else first


def _last_of_run(fraction: Tensor, block: int) -> int:
    """The last of the successive blocks with outliers around `block`."""
    last = block
    while last + 1 < len(fraction) and fraction[last + 1] >= MIN_FRACTION:
        last += 1
    return last


def _sink(blocks: Sequence[BlockDiagnosis]) -> Sink | None:
    """The attention to outliers in the block where they draw most; None if they draw hardly more than other patches."""
    # The fraction of outliers in the input of each block. Block 0 has 0, so that it is never the sink.
    fractions = [0.0, *(block.after_mlp.outlier_fraction for block in blocks)]
    sinks = [
        (block.outlier_attention, index)
        for index, block in enumerate(blocks)
        if block.outlier_attention is not None
        and fractions[index] >= MIN_FRACTION
        and block.outlier_attention > SINK * fractions[index]
    ]
    if not sinks:
        return None
    drawn, index = max(sinks)
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
    """The part of the model in front of a hook point; `excess` is NaN at hook points that cannot be observed."""
    if hook_point == 0:
        return "embedding"
    if hook_point % 2:
        return "attention"
    return "block" if excess[hook_point - 1].isnan() else "MLP"


def _fixed_positions(
    sums: Observations, block: int, standing_embeddings: StandingEmbeddings | None
) -> tuple[float | None, float | None, list[FixedPosition]]:
    """Find the fixed positions: those that are outliers after `block` in at least half of the images.

    If images have several sizes, only images of the most frequent size are compared.

    Returns:
        The share of the outliers at these positions; the share in the border; the positions.
    """
    grid, at_positions = _most_frequent_grid(sums)
    num_images, num_outliers = float(at_positions["images"]), at_positions["outliers"][block]  # (N,)
    if num_images < MIN_IMAGES or not num_outliers.any():
        return None, None, []
    is_fixed = num_outliers >= HALF * num_images
    is_border = _border(grid)
    of_embedding = {each.position for each in _embedding_positions(sums)}
    positions = []
    for patch in is_fixed.nonzero().flatten().tolist():
        time, row, column = _place(patch, grid)
        frequency = float(num_outliers[patch]) / num_images
        ratio = float(at_positions["embedding"][patch]) / num_images
        in_border = is_border is not None and bool(is_border[patch])
        each = FixedPosition(row, column, frequency, ratio, in_border, time=time)
        is_repairable = standing_embeddings is not None and _comes_from(each, grid, standing_embeddings)
        positions.append(replace(each, is_embedding=each.position in of_embedding, is_repairable=is_repairable))
    border_share = None if is_border is None else float(num_outliers[is_border].sum() / num_outliers.sum())
    return float(num_outliers[is_fixed].sum() / num_outliers.sum()), border_share, positions


def _place(number: int, grid: Grid) -> tuple[int | None, int, int]:
    """The time, row and column of the patch with this number in a grid; the time is None in an image."""
    *times, rows, columns = grid
    number, column = divmod(number, columns)
    time, row = divmod(number, rows)
    return time if times else None, row, column


def _most_frequent_grid(sums: Observations) -> tuple[Grid, Sums]:
    """The grid of patches that most images have, and the sums over these images at each position of the grid."""
    return max(sums.positions.items(), key=lambda item: float(item[1]["images"]))


def _border(grid: Grid) -> Tensor | None:
    """Whether a patch is in the border, the outermost rows and columns, (N,).

    Returns None if the border has half of the patches or more.
    """
    border = torch.ones(grid, dtype=torch.bool)
    border[..., 1:-1, 1:-1] = False
    return border.flatten() if 2 * border.sum() < border.numel() else None


def _embedding_positions(sums: Observations) -> list[EmbeddingPosition]:
    """The positions whose mean ratio in front of the first block stands out by the default outlier rule."""
    grid, at_positions = _most_frequent_grid(sums)
    if at_positions["images"] < MIN_IMAGES:
        return []
    ratios = at_positions["embedding"] / at_positions["images"]  # (N,)
    patches = (ratios > OutlierRule().limit(ratios)).nonzero().flatten().tolist()
    places = [(patch, *_place(patch, grid)) for patch in patches]
    return [EmbeddingPosition(row, column, float(ratios[patch]), time) for patch, time, row, column in places]


def _standing_embeddings(tower: Tower) -> StandingEmbeddings | None:
    """The position embeddings that `testreg.repair` would replace; None if there are none."""
    embedding = position_embedding(tower)
    if embedding is None or not (where := standing_out(embedding)).any():
        return None
    norms, positions = embedding.patches.float().norm(dim=-1), positions_of(where.nonzero().flatten(), embedding)
    return StandingEmbeddings(positions, norms[where].tolist(), float(norms.median()), embedding.grid)


def _comes_from(fixed: FixedPosition, grid: Grid, standing: StandingEmbeddings) -> bool:
    """Whether an embedding that stands out is that of a fixed position, or is among those interpolated to it."""
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
    """The prefix tokens (such as CLS) whose norm is as high as an outlier's.

    The last `trained_registers` of the prefix tokens are trained registers.
    """
    roles, count = [], len(blocks[0].after_mlp.prefix_ratio)
    for token in range(count):
        ratios = [block.after_mlp.prefix_ratio[token] for block in blocks]
        drawn = [block.prefix_attention[token] for block in blocks if block.prefix_attention is not None]
        if max(ratios) >= HIGH_NORM:
            block, is_register = ratios.index(max(ratios)), token >= count - trained_registers
            roles.append(PrefixRole(token, block, max(ratios), max(drawn, default=None), is_register))
    return roles
