"""The before/after picture: photo, token norms and attention, without and with test-time registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from testreg.attention import attention_to_patches, entropy
from testreg.families import Tower, find_tower
from testreg.outliers import OutlierRule, token_norms
from testreg.register import disabled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Maps:
    """What a model does on images (B, 3, h, w) with a grid of rows x columns patches."""

    norms: Tensor
    """(B, rows, columns), of the patches after one block."""
    attention: Tensor
    """(B, rows, columns), from CLS in the last block, mean of the heads."""
    outlier_fraction: float
    max_over_median: float
    """Mean over the images of the largest norm over the median norm."""
    attention_entropy: float
    """Of CLS over the patches in the last block, in nats; mean over heads and images."""


def measure(tower: Tower, images: Tensor, layer: int, limit: Tensor | None = None) -> tuple[Maps, Tensor]:
    """Maps of a tower as it is, and the norm (B, 1) above which a patch counts as an outlier.

    Args:
        layer: the block whose output norms are looked at.
        limit: an earlier result's limit, to count what is left of the outliers by the same measure.
    """
    norms = token_norms(tower, images)[layer, :, tower.num_prefix :]  # (B, N)
    limit = OutlierRule().limit(norms) if limit is None else limit
    attention = attention_to_patches(tower, images)  # (B, heads, N)
    grid = tower.grid(images)
    maps = Maps(
        norms=norms.unflatten(1, grid).cpu(),
        attention=attention.mean(1).unflatten(1, grid).cpu(),
        outlier_fraction=float((norms > limit).float().mean()),
        max_over_median=float((norms.amax(1) / norms.median(1).values).mean()),
        attention_entropy=float(entropy(attention).mean()),
    )
    return maps, limit


def compare(model: nn.Module, images: Tensor, layer: int = -1) -> tuple[Maps, Maps]:
    """Maps of a patched model without and with its registers."""
    tower = find_tower(model)
    with disabled(model):
        before, limit = measure(tower, images, layer)
    after, _ = measure(tower, images, layer, limit)
    return before, after


def table(before: Maps, after: Maps) -> str:
    """The figures of both, as text."""
    rows = [
        ("outlier patches", f"{before.outlier_fraction:.2%}", f"{after.outlier_fraction:.2%}"),
        ("max / median norm", f"{before.max_over_median:.2f}", f"{after.max_over_median:.2f}"),
        ("attention entropy (nats)", f"{before.attention_entropy:.2f}", f"{after.attention_entropy:.2f}"),
    ]
    lines = [f"{'':26}{'before':>10}{'after':>10}"]
    return "\n".join(lines + [f"{name:26}{first:>10}{second:>10}" for name, first, second in rows])


def figure(images: Tensor, before: Maps, after: Maps, title: str) -> Figure:
    """One row an image (B, 3, h, w): photo, norms and attention before, norms and attention after.

    Norms share a colour scale within a row, so that before and after compare; attention maps have one each, since a
    single outlier would leave nothing else to be seen.
    """
    from matplotlib.figure import Figure

    count = len(images)
    page = Figure(figsize=(10.5, 2.1 * count + 0.7), layout="constrained")
    axes = page.subplots(count, 5, squeeze=False)
    headings = ("photo", "norms before", "attention before", "norms after", "attention after")
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=10)
    for i, row in enumerate(axes):
        photo = images[i].float().cpu()
        photo = (photo - photo.amin()) / (photo.amax() - photo.amin()).clamp(min=1e-6)
        low = float(torch.minimum(before.norms[i].amin(), after.norms[i].amin()))
        high = float(torch.maximum(before.norms[i].amax(), after.norms[i].amax()))
        row[0].imshow(photo.permute(1, 2, 0).numpy())
        for column, maps in ((1, before), (3, after)):
            row[column].imshow(maps.norms[i].numpy(), cmap="viridis", vmin=low, vmax=high)
            row[column].set_xlabel(f"max {float(maps.norms[i].amax()):.3g}", fontsize=8)
            row[column + 1].imshow(maps.attention[i].numpy(), cmap="inferno")
            row[column + 1].set_xlabel(f"max {float(maps.attention[i].amax()):.2g}", fontsize=8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    page.suptitle(title, fontsize=11)
    return page
