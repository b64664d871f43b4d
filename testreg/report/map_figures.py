"""Maps of a model on images: norms, attention and features of the patches, before and after; and pictures of them.

*Before* and *after* mean without and with test-time registers. An outlier is a patch of huge norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from testreg.display import picture_of
from testreg.families import Tower, find_tower
from testreg.measure.attention import attention_to_patches, entropy
from testreg.measure.hooks import recorded_tokens
from testreg.measure.outliers import OutlierRule, token_norms
from testreg.register import disabled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER = "#d55e00", "#0072b2"  # colours that colour-blind people can tell apart (Okabe and Ito)


@dataclass(frozen=True)
class Maps:
    """Maps of a model on images (B, 3, h, w) that have rows x columns patches, and figures that follow from them."""

    norms: Tensor
    """The norms of the patches after one block, (B, rows, columns)."""
    attention: Tensor | None
    """The attention of CLS (or what `attention_to_patches` takes for it) to the patches in the last block, mean over
    heads, (B, rows, columns), or None."""
    features: Tensor
    """The patch tokens after the last block, (B, rows, columns, C)."""
    outlier_fraction: float
    """The share of the patches that are outliers by their norms."""
    max_over_median: float
    """The largest norm of an image's patches over their median norm, mean over images."""
    attention_entropy: float | None
    """The entropy, in nats, of each head's attention over the patches, mean over heads and images."""


def maps_before_and_after(
    model: nn.Module, images: Tensor, block: int = -1, *, attention: bool = True
) -> tuple[Maps, Maps]:
    """Maps of a patched model without and with its registers.

    Args:
        images: preprocessed images (B, 3, h, w).
        block: the block after which norms are taken.
        attention: whether to measure attention, which is not possible in all models.
    """
    tower = find_tower(model)
    with disabled(model):
        before, limit = measure_maps(tower, images, block, attention=attention)
    after, _ = measure_maps(tower, images, block, limit, attention=attention)
    return before, after


def measure_maps(
    tower: Tower, images: Tensor, block: int, limit: Tensor | None = None, *, attention: bool = True
) -> tuple[Maps, Tensor]:
    """Maps of a tower in its current state, and the norm (B, 1) of each image above which a patch is an outlier.

    Args:
        limit: such norms from an earlier call, to count outliers by the same measure; None computes them anew.
    """
    with recorded_tokens(tower, images, -1) as last:
        norms = token_norms(tower, images)  # (L, B, T)
    grid, patches = tower.grid(images), tower.patches(images)
    norms = norms[block, :, patches]  # (B, N)
    limit = OutlierRule().limit(norms) if limit is None else limit
    attention_ = attention_to_patches(tower, images) if attention else None  # (B, heads, N)
    maps = Maps(
        norms=norms.unflatten(1, grid).cpu(),
        attention=None if attention_ is None else attention_.mean(1).unflatten(1, grid).cpu(),
        features=last[0][:, patches].float().unflatten(1, grid).cpu(),
        outlier_fraction=float((norms > limit).float().mean()),
        max_over_median=float((norms.amax(1) / norms.median(1).values).mean()),
        attention_entropy=None if attention_ is None else float(entropy(attention_).mean()),
    )
    return maps, limit


def figures_of(maps: Maps) -> dict[str, float | None]:
    """{name: value} of the figures in `Maps`, without the maps."""
    return {name: getattr(maps, name) for name in ("outlier_fraction", "max_over_median", "attention_entropy")}


def table(before: Maps, after: Maps) -> str:
    """The figures before and after, as a table of text."""
    rows = [
        ("outlier patches", f"{before.outlier_fraction:.2%}", f"{after.outlier_fraction:.2%}"),
        ("max / median norm", f"{before.max_over_median:.2f}", f"{after.max_over_median:.2f}"),
    ]
    if before.attention_entropy is not None and after.attention_entropy is not None:
        rows.append(("attention entropy (nats)", f"{before.attention_entropy:.2f}", f"{after.attention_entropy:.2f}"))
    lines = [f"{'':26}{'before':>10}{'after':>10}"]
    return "\n".join(lines + [f"{name:26}{first:>10}{second:>10}" for name, first, second in rows])


def scales_of(maps: Maps) -> str:
    """A caption that says which values the colours of the maps stand for."""
    norms = "Norms: one logarithmic scale for before and after"
    return norms if maps.attention is None else f"{norms}. Attention: each map from its least to its largest value"


def feature_colours(before: Maps, after: Maps) -> tuple[Tensor, Tensor]:
    """Features before and after as colours in [0, 1], each (B, rows, columns, 3): their first 3 principal components.

    The same feature has the same colour in all images, before and after.
    """
    first, second = principal_colours([before.features, after.features])
    return first, second


def principal_colours(sides: Sequence[Tensor], *, foreground: bool = False) -> list[Tensor]:
    """Features (B, rows, columns, C) as colours in [0, 1], (B, rows, columns, 3), with the same principal components.

    Components and colour range are computed without outliers, whose large values would otherwise determine them.

    Args:
        sides: features before and after, or of other variants of a model.
        foreground: make the background black, and compute the colours from the rest, as in DINOv2's pictures (arXiv
            2304.07193, figure 1). The sign of the first component divides the patches in two; the background is the
            part with the sign of the mean over the images' borders.
    """
    features = [side.double().cpu() for side in sides]
    norms = [each.norm(dim=-1) for each in features]  # (B, rows, columns)
    normal = [size <= OutlierRule().limit(size.flatten(1)).unsqueeze(-1) for size in norms]
    foregrounds = [torch.ones_like(each) for each in normal]
    if foreground:
        mean, (axis, *_) = _components(torch.cat([each[mask] for each, mask in zip(features, normal, strict=True)]))
        scores = [(each - mean) @ axis for each in features]
        is_inside = torch.zeros(features[0].shape[1:3], dtype=torch.bool)
        is_inside[1:-1, 1:-1] = True
        border = torch.cat([score[mask & ~is_inside] for score, mask in zip(scores, normal, strict=True)])
        foregrounds = [score * border.mean().sign() < 0 for score in scores]
    coloured_patches = torch.cat(
        [each[mask & is_foreground] for each, mask, is_foreground in zip(features, normal, foregrounds, strict=True)]
    )
    mean, axes = _components(coloured_patches)
    low, high = ((coloured_patches - mean) @ axes.T).quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    colours = [(((each - mean) @ axes.T - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) for each in features]
    return [each * is_foreground.unsqueeze(-1) for each, is_foreground in zip(colours, foregrounds, strict=True)]


def _components(tokens: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """The mean (C,) of tokens (n, C), and their first principal components (count, C).

    The sign of a component is arbitrary; it is chosen so that the entry of largest magnitude is positive.
    """
    mean = tokens.mean(0)
    _, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))  # ascending
    axes = vectors[:, -count:].flip(1).T
    return mean, axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()


def photograph(image: Tensor) -> Tensor:
    """A preprocessed image (3, h, w) as a picture (h, w, 3), scaled to [0, 1]."""
    image = image.float().cpu().permute(1, 2, 0)
    return (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-6)


@dataclass(frozen=True)
class Panel:
    """One panel of a picture: a photograph or one of its maps."""

    kind: str
    """"photograph", "norms", "attention" or "features"."""
    side: str
    """"before" or "after"; "" for the photograph."""
    pixels: Tensor
    """Colours in [0, 1], (h, w, 3)."""
    largest: float | None
    """The largest value of a map; None for photographs and features, whose colours stand for no value."""

    @property
    def name(self) -> str:
        """Kind and side, e.g. "norms before"."""
        return f"{self.kind} {self.side}".strip()


def panels(image: Tensor, i: int, before: Maps, after: Maps, colours: Sequence[Tensor]) -> list[Panel]:
    """The panels of image i, (3, h, w): the photograph, then each map before and after.

    Norms before and after have the same logarithmic colour scale. Each attention map has its own scale, since with a
    common one, a single outlier before would make everything after look dark. `colours` are `feature_colours`.
    """
    sides = {"before": before, "after": after}
    logs = torch.stack([maps.norms[i].log() for maps in sides.values()])  # (2, rows, columns)
    all_panels = [Panel("photograph", "", photograph(image), None)]
    for side, values in zip(sides, logs, strict=True):
        all_panels.append(Panel("norms", side, _coloured(values, "viridis", logs), float(values.amax().exp())))
    for side, maps in sides.items():
        if maps.attention is not None:
            attention = maps.attention[i]
            all_panels.append(
                Panel("attention", side, _coloured(attention, "inferno", attention), float(attention.amax()))
            )
    for side, rgb in zip(sides, colours, strict=True):
        all_panels.append(Panel("features", side, rgb[i], None))
    return all_panels


def _coloured(values: Tensor, name: str, scale: Tensor) -> Tensor:
    """Values (h, w) as colours (h, w, 3) of the colour map `name`, which spans the range of the values in `scale`."""
    from matplotlib import colormaps

    fractions = (values - scale.amin()) / (scale.amax() - scale.amin()).clamp(min=1e-12)
    return torch.from_numpy(colormaps[name](fractions.numpy())[..., :3])


def figure(images: Tensor, before: Maps, after: Maps, title: str) -> Figure:
    """A picture with a row for each image (B, 3, h, w): the photograph, and its maps before and after."""
    colours = feature_colours(before, after)
    rows = [panels(image, i, before, after, colours) for i, image in enumerate(images)]
    page = picture_of(rows, _draw, title, panel_size=(1.5, 1.68))
    for axis, panel in zip(page.axes, rows[0], strict=False):
        axis.set_title(panel.name, fontsize=9)
    page.supxlabel(scales_of(before), fontsize=8)
    return page


def principal_figure(
    images: Tensor, sides: Mapping[str, Tensor], title: str, *, foreground: bool = False, per_line: int = 8
) -> Figure:
    """A picture of features as colours, see `principal_colours`, with at most `per_line` images side by side.

    Args:
        images: (B, 3, h, w).
        sides: {"before" or "after": features (B, rows, columns, C)}.
    """
    colours = principal_colours(list(sides.values()), foreground=foreground)
    colours_of = dict(zip(sides, colours, strict=True))
    per_line = min(per_line, len(images))
    empty = Panel("", "", torch.ones(1, 1, 3), None)
    rows, labels = list[list[Panel]](), list[str]()
    for first in range(0, len(images), per_line):
        part = range(first, min(first + per_line, len(images)))
        missing = [empty] * (per_line - len(part))
        rows.append([Panel("photograph", "", photograph(images[i]), None) for i in part] + missing)
        rows += [[Panel("features", side, made[i], None) for i in part] + missing for side, made in colours_of.items()]
        labels += ["photograph", *sides]
    page = picture_of(rows, _draw, title, panel_size=(1.4, 1.4))
    for row, label in enumerate(labels):
        page.axes[row * per_line].set_ylabel(label, fontsize=9)
    return page


def _draw(axis: Axes, panel: Panel) -> None:
    """Draw one panel."""
    axis.imshow(panel.pixels.numpy(), interpolation="antialiased" if panel.kind == "photograph" else "nearest")
    if panel.largest is not None:
        axis.set_xlabel(f"max {panel.largest:.3g}", fontsize=8)
    for spine in axis.spines.values():
        spine.set_edgecolor({"before": BEFORE, "after": AFTER}.get(panel.side, "none"))
