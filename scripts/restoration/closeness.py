"""Measures how near a network is to the untouched one, and how many outliers (patches of huge norm) it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.families import find_tower
from testreg.measure.hooks import recorded_norms, recorded_tokens
from testreg.measure.outliers import OutlierRule

BATCH = 16
RULE = OutlierRule()


@dataclass(frozen=True)
class Recorded:
    """Norms and tokens of a network on images."""

    norms: Tensor
    """The norms of the patches after each block, (L, B, N)."""
    tokens: Tensor
    """The tokens after the last block without registers, (B, P + N, C), for P prefix tokens and N patches."""


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> Recorded:
    """Run a network on images (B, 3, h, w) and record its norms and tokens."""
    tower = find_tower(model)
    norms, tokens = [], []
    for batch in images.split(BATCH):
        with recorded_norms(tower, batch) as of_blocks, recorded_tokens(tower, batch, -1) as last:
            tower.run(batch)
        patches = tower.patches(batch)
        norms.append(torch.stack(of_blocks)[..., patches])
        tokens.append(last[0][:, : patches.stop])
    return Recorded(torch.cat(norms, 1), torch.cat(tokens))


def figures(before: Recorded, after: Recorded, untouched: Recorded) -> dict[str, float]:
    """How many outliers a way leaves, and how near it comes to the untouched network.

    "outliers": the share of the patches that were outliers before, after the block with most. "outliers_left": outliers
    after the block that has most, over the same before. "max_over_median": the largest norm over the median norm, after
    the block where the ratio is largest. "cosine_*": the mean cosine with the untouched network of CLS, of all patches,
    and of patches that were outliers before.
    """
    outlier = before.norms > RULE.limit(before.norms)
    limit = torch.maximum(RULE.limit(before.norms), RULE.limit(after.norms))
    outliers_left = (after.norms > limit).sum((1, 2)).max() / outlier.sum((1, 2)).max().clamp(min=1)
    cosine = F.cosine_similarity(after.tokens, untouched.tokens, dim=-1)  # (B, P + N)
    patch_cosine = cosine[:, -outlier.shape[-1] :]
    return {
        "outliers": float(outlier.float().mean((1, 2)).max()),
        "max_over_median": float((after.norms.amax(-1) / after.norms.median(-1).values).mean(1).max()),
        "outliers_left": float(outliers_left),
        "cosine_cls": float(cosine[:, 0].mean()),
        "cosine_patches": float(patch_cosine.mean()),
        "cosine_outliers": float(patch_cosine[outlier.any(0)].mean()),
    }


def counts(moved: Mapping[int, list[int]], planted: Mapping[int, list[int]]) -> dict[str, Any]:
    """How many neurons are moved ("neurons"), and how many of these were planted ("of_planted")."""
    planted_units = [unit for block, units in moved.items() for unit in units if unit in planted.get(block, ())]
    return {"neurons": sum(map(len, moved.values())), "of_planted": len(planted_units)}
