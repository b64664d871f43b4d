"""How near a network comes to the untouched one, and how many outliers it has."""

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
class Seen:
    """What a network made of images."""

    norms: Tensor
    """Of the patches behind each block, (L, B, N)."""
    tokens: Tensor
    """Behind the last block, without registers, (B, P + N, C)."""


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> Seen:
    """What a network makes of images (B, 3, h, w)."""
    tower = find_tower(model)
    norms, tokens = [], []
    for batch in images.split(BATCH):
        with recorded_norms(tower, batch) as of_blocks, recorded_tokens(tower, batch, -1) as last:
            tower.run(batch)
        patches = tower.patches(batch)
        norms.append(torch.stack(of_blocks)[..., patches])
        tokens.append(last[0][:, : patches.stop])
    return Seen(torch.cat(norms, 1), torch.cat(tokens))


def figures(before: Seen, after: Seen, untouched: Seen) -> dict[str, float]:
    """Outliers that are left at the worst block, as a share of those of the fullest block before, and the largest norm
    over the median there; mean cosine with the untouched network of CLS, patches, and those that were outliers."""
    outlier = before.norms > RULE.limit(before.norms)
    limit = torch.maximum(RULE.limit(before.norms), RULE.limit(after.norms))
    left = (after.norms > limit).sum((1, 2)).max() / outlier.sum((1, 2)).max().clamp(min=1)
    cosine = F.cosine_similarity(after.tokens, untouched.tokens, dim=-1)  # (B, P + N)
    of_patches = cosine[:, -outlier.shape[-1] :]
    return {
        "outliers": float(outlier.float().mean((1, 2)).max()),
        "max_over_median": float((after.norms.amax(-1) / after.norms.median(-1).values).mean(1).max()),
        "outliers_left": float(left),
        "cosine_cls": float(cosine[:, 0].mean()),
        "cosine_patches": float(of_patches.mean()),
        "cosine_outliers": float(of_patches[outlier.any(0)].mean()),
    }


def counts(moved: Mapping[int, list[int]], planted: Mapping[int, list[int]]) -> dict[str, Any]:
    """How many neurons are moved, and how many of them were planted."""
    of_planted = [unit for block, units in moved.items() for unit in units if unit in planted.get(block, ())]
    return {"neurons": sum(map(len, moved.values())), "of_planted": len(of_planted)}
