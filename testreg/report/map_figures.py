"""Maps of what a model does on images, without and with test-time registers, and pictures of them."""

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

BEFORE, AFTER = "#d55e00", "#0072b2"  # colours that the colour-blind tell apart (Okabe and Ito)


@dataclass(frozen=True)
class Maps:
    """What a model does on images (B, 3, h, w) with a grid of rows x columns patches."""

    norms: Tensor
    """(B, rows, columns), the norms of the patches after one block."""
    attention: Tensor | None
    """(B, rows, columns), what CLS gives to the patches in the last block, mean of the heads; None if not observed."""
    features: Tensor
    """(B, rows, columns, C), the patches after the last block."""
    outlier_fraction: float
    """Share of the patches that are outliers after the block of the norms."""
    max_over_median: float
    """Mean over the images of the largest norm over the median norm."""
    attention_entropy: float | None
    """Entropy, in nats, of that attention over the patches; mean over heads and images."""


def maps_before_and_after(
    model: nn.Module, images: Tensor, block: int = -1, *, attention: bool = True
) -> tuple[Maps, Maps]:
    """Maps of a patched model without and with its registers.

    Args:
        images: (B, 3, h, w), preprocessed.
        block: the block after which norms are taken.
        attention: False leaves attention out, for towers in which it cannot be observed.
    """
    tower = find_tower(model)
    with disabled(model):
        before, limit = measure_maps(tower, images, block, attention=attention)
    after, _ = measure_maps(tower, images, block, limit, attention=attention)
    return before, after


def measure_maps(
    tower: Tower, images: Tensor, block: int, limit: Tensor | None = None, *, attention: bool = True
) -> tuple[Maps, Tensor]:
    """Maps of a tower as it is, and the norm (B, 1) above which a patch counts as an outlier.

    A `limit` from an earlier call is used again, so that what is left of the outliers is counted by the same measure.
    """
    with recorded_tokens(tower, images, -1) as last:
        norms = token_norms(tower, images)  # (L, B, T)
    grid, patches = tower.grid(images), tower.patches(images)
    norms = norms[block, :, patches]  # (B, N)
    limit = OutlierRule().limit(norms) if limit is None else limit
    drawn = attention_to_patches(tower, images) if attention else None  # (B, heads, N)
    maps = Maps(
        norms=norms.unflatten(1, grid).cpu(),
        attention=None if drawn is None else drawn.mean(1).unflatten(1, grid).cpu(),
        features=last[0][:, patches].float().unflatten(1, grid).cpu(),
        outlier_fraction=float((norms > limit).float().mean()),
        max_over_median=float((norms.amax(1) / norms.median(1).values).mean()),
        attention_entropy=None if drawn is None else float(entropy(drawn).mean()),
    )
    return maps, limit


def figures_of(maps: Maps) -> dict[str, float | None]:
    """The figures among the maps, by name."""
    return {name: getattr(maps, name) for name in ("outlier_fraction", "max_over_median", "attention_entropy")}


def table(before: Maps, after: Maps) -> str:
    """The figures of a comparison, as text."""
    rows = [
        ("outlier patches", f"{before.outlier_fraction:.2%}", f"{after.outlier_fraction:.2%}"),
        ("max / median norm", f"{before.max_over_median:.2f}", f"{after.max_over_median:.2f}"),
    ]
    if before.attention_entropy is not None and after.attention_entropy is not None:
        rows.append(("attention entropy (nats)", f"{before.attention_entropy:.2f}", f"{after.attention_entropy:.2f}"))
    lines = [f"{'':26}{'before':>10}{'after':>10}"]
    return "\n".join(lines + [f"{name:26}{first:>10}{second:>10}" for name, first, second in rows])


def scales_of(maps: Maps) -> str:
    """What the colours of the maps, before and after, span: for the caption of a picture."""
    norms = "Norms: one logarithmic scale for before and after"
    return norms if maps.attention is None else f"{norms}. Attention: each map from its least to its largest value"


def feature_colours(before: Maps, after: Maps) -> tuple[Tensor, Tensor]:
    """Features as colours in [0, 1], twice (B, rows, columns, 3): their first three principal components.

    The same feature has the same colour in all images, before and after.
    """
    first, second = principal_colours([before.features, after.features])
    return first, second


def principal_colours(sides: Sequence[Tensor], *, foreground: bool = False) -> list[Tensor]:
    """Features (B, rows, columns, C) as colours in [0, 1], (B, rows, columns, 3), with one basis for all of them.

    Components and range are fitted to the patches that are no outliers, since outliers would take all colours for
    themselves.

    Args:
        foreground: blacken the background, and fit the colours to the rest, as DINOv2's pictures do (arXiv 2304.07193,
            figure 1). The first component parts the patches at their mean; background is where most of the images'
            borders lie.
    """
    features = [side.double().cpu() for side in sides]
    norms = [each.norm(dim=-1) for each in features]  # (B, rows, columns)
    normal = [size <= OutlierRule().limit(size.flatten(1)).unsqueeze(-1) for size in norms]
    shown = [torch.ones_like(each) for each in normal]
    if foreground:
        mean, (axis, *_) = _components(torch.cat([each[mask] for each, mask in zip(features, normal, strict=True)]))
        scores = [(each - mean) @ axis for each in features]
        inside = torch.zeros(features[0].shape[1:3], dtype=torch.bool)
        inside[1:-1, 1:-1] = True
        border = torch.cat([score[mask & ~inside] for score, mask in zip(scores, normal, strict=True)])
        shown = [score * border.mean().sign() < 0 for score in scores]
    fitted = torch.cat([each[mask & seen] for each, mask, seen in zip(features, normal, shown, strict=True)])
    mean, axes = _components(fitted)
    low, high = ((fitted - mean) @ axes.T).quantile(torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    colours = [(((each - mean) @ axes.T - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) for each in features]
    return [each * seen.unsqueeze(-1) for each, seen in zip(colours, shown, strict=True)]


def _components(tokens: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """The mean (C,) of tokens (n, C), and their first principal components (count, C), each with its largest entry
    positive."""
    mean = tokens.mean(0)
    _, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))  # ascending
    axes = vectors[:, -count:].flip(1).T
    return mean, axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # the sign is arbitrary


def photograph(image: Tensor) -> Tensor:
    """A preprocessed image (3, h, w), whatever its scale, as a picture (h, w, 3) in [0, 1]."""
    image = image.float().cpu().permute(1, 2, 0)
    return (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-6)


@dataclass(frozen=True)
class Panel:
    """One picture of an image: the photograph or one of its maps."""

    kind: str
    """"photograph", "norms", "attention" or "features"."""
    side: str
    """"before" or "after"; "" for the photograph."""
    pixels: Tensor
    """(h, w, 3), colours in [0, 1]."""
    largest: float | None
    """The largest value of a map; None for a photograph and for features, which have no scale."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.side}".strip()


def panels(image: Tensor, i: int, before: Maps, after: Maps, colours: Sequence[Tensor]) -> list[Panel]:
    """The pictures of image i (3, h, w): the photograph, then each map before and after.

    Norms share a logarithmic colour scale, so that before and after compare. Attention maps have a scale each, since a
    single outlier would leave nothing else to be seen. `colours` are the `feature_colours` of all images.
    """
    sides = {"before": before, "after": after}
    logs = torch.stack([maps.norms[i].log() for maps in sides.values()])  # (2, rows, columns)
    made = [Panel("photograph", "", photograph(image), None)]
    for side, values in zip(sides, logs, strict=True):
        made.append(Panel("norms", side, _coloured(values, "viridis", logs), float(values.amax().exp())))
    for side, maps in sides.items():
        if maps.attention is not None:
            drawn = maps.attention[i]
            made.append(Panel("attention", side, _coloured(drawn, "inferno", drawn), float(drawn.amax())))
    for side, rgb in zip(sides, colours, strict=True):
        made.append(Panel("features", side, rgb[i], None))
    return made


def _coloured(values: Tensor, name: str, scale: Tensor) -> Tensor:
    """Colours (h, w, 3) of values (h, w), from a colour map that spans the values of `scale`."""
    from matplotlib import colormaps

    share = (values - scale.amin()) / (scale.amax() - scale.amin()).clamp(min=1e-12)
    return torch.from_numpy(colormaps[name](share.numpy())[..., :3])


def figure(images: Tensor, before: Maps, after: Maps, title: str) -> Figure:
    """A picture with one row for each image (B, 3, h, w): its photograph and its maps, before and after."""
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
    """A picture of the features (B, h, w, C) of images (B, 3, h, w), of each side, as `principal_colours` has them."""
    colours = principal_colours(list(sides.values()), foreground=foreground)
    named = dict(zip(sides, colours, strict=True))
    per_line = min(per_line, len(images))
    empty = Panel("", "", torch.ones(1, 1, 3), None)
    rows, heads = list[list[Panel]](), list[str]()
    for first in range(0, len(images), per_line):
        part = range(first, min(first + per_line, len(images)))
        missing = [empty] * (per_line - len(part))
        rows.append([Panel("photograph", "", photograph(images[i]), None) for i in part] + missing)
        rows += [[Panel("features", side, made[i], None) for i in part] + missing for side, made in named.items()]
        heads += ["photograph", *sides]
    page = picture_of(rows, _draw, title, panel_size=(1.4, 1.4))
    for row, head in enumerate(heads):
        page.axes[row * per_line].set_ylabel(head, fontsize=9)
    return page


def _draw(axis: Axes, panel: Panel) -> None:
    axis.imshow(panel.pixels.numpy(), interpolation="antialiased" if panel.kind == "photograph" else "nearest")
    if panel.largest is not None:
        axis.set_xlabel(f"max {panel.largest:.3g}", fontsize=8)
    for spine in axis.spines.values():
        spine.set_edgecolor({"before": BEFORE, "after": AFTER}.get(panel.side, "none"))
