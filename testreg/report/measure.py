"""What a report shows: the measurements of a model without and with the registers of a list of neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from testreg.calibration.effects import what_is_wrong_with_maps
from testreg.families import Tower, find_tower
from testreg.measure.conclusion import conclude
from testreg.measure.diagnosis import Diagnosis
from testreg.measure.observation import observe
from testreg.measure.outliers import MIN_FRACTION, OutlierRule, ignored_patches, token_norms
from testreg.neurons import RegisterNeurons, describe_model
from testreg.register import disabled, patched, registers
from testreg.report.maps import Maps, compare
from testreg.report.values import numbers_in, percent

NUM_PHOTOGRAPHS = 5
AGREEMENT = 0.99  # of a head with itself: less than that counts as a change for the worse


@dataclass(frozen=True)
class Norms:
    """Norms of a tower's patches, for L blocks and B images."""

    largest: Tensor
    """(L,), the largest norm of an image's patches after each block, mean over the images."""
    median: Tensor
    """(L,), the median norm, mean over the images."""
    registers: Tensor | None
    """(L,), mean norm of the registers; None without registers."""
    ratios: dict[int, Tensor]
    """By block, for some of the blocks: norms (B, N) over the median norm of the image's patches."""
    outliers: Tensor
    """(B,), how many patches are outliers after the first of these blocks."""


@dataclass(frozen=True)
class Report:
    """A model without and with its registers.

    Whatever the neurons' `calibration` says is read from it with care: a list may come from elsewhere, and any entry
    may be missing.
    """

    neurons: RegisterNeurons
    model: Mapping[str, Any]
    block: int
    """The block after which outliers stand out most."""
    ignored: list[tuple[int, int]]
    """Rows and columns of patches that do not count as outliers: calibration left these fixed positions out."""
    before: Diagnosis
    after: Diagnosis
    norms_before: Norms
    norms_after: Norms
    photographs: Tensor
    """(b, 3, h, w), the images with most outliers."""
    maps_before: Maps
    maps_after: Maps

    @property
    def chosen(self) -> RegisterNeurons:
        """The neurons that are used, of all that were ranked."""
        return self.neurons.truncate()

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the list says about how it was made."""
        return self.neurons.calibration

    @property
    def outliers(self) -> tuple[float, float]:
        """Share of the patches that are outliers after `block`, before and after."""
        before, after = (side.blocks[self.block].after_mlp.outlier_fraction for side in (self.before, self.after))
        return before, after

    @property
    def curve(self) -> list[dict[str, float]]:
        """Points of the trade-off between what is left of the outliers and what else changes."""
        points = [numbers_in(point) for point in self.facts.get("curve") or ()]
        return [point for point in points if "neurons" in point]

    @property
    def rounds(self) -> list[Mapping[str, Any]]:
        """The rounds of the calibration, if it had any: what each added to the neurons, and what was left then."""
        rounds = self.facts.get("rounds")
        return [each for each in rounds if isinstance(each, Mapping)] if isinstance(rounds, list | tuple) else []

    @property
    def choice(self) -> dict[str, float]:
        """The point of the curve that was chosen; empty if unknown."""
        return numbers_in(self.facts.get("chosen") or {})

    @property
    def checks(self) -> list[dict[str, float]]:
        """What was measured on images that had no part in the choice, at each image size."""
        return [numbers_in(check) for check in self.facts.get("verified_at") or ()]

    @property
    def limits(self) -> dict[str, float]:
        """What the choice had to meet, as far as known: target, max_change."""
        return numbers_in({key: self.facts.get(key) for key in ("target", "max_change")})

    @property
    def change(self) -> float | None:
        """The largest change of the pooled feature at any image size; None if unknown."""
        return max((check["change_pooled"] for check in self.checks if "change_pooled" in check), default=None)

    @property
    def worst_sink(self) -> tuple[float, float] | None:
        """Attention to former outliers over that to other patches, before and after, at the image size where most of it
        stays; None if unknown."""
        known = [each for each in self.facts.get("verified_at") or () if each.get("sink") is not None]
        worst = max(known, key=lambda each: each["sink"], default=None)
        return None if worst is None else (worst["before"]["sink"], worst["sink"])

    @property
    def agreement(self) -> float | None:
        """The lowest share of images to which the user's head gives the same class as before; None if unknown."""
        return min((check["agreement"] for check in self.checks if "agreement" in check), default=None)

    @property
    def disagrees(self) -> bool:
        """Whether the user's head gives another class to more images than it should."""
        return self.agreement is not None and self.agreement < AGREEMENT

    @property
    def headline(self) -> str:
        """What the registers did, in one line, with what they made worse."""
        if self.before.kind == "none":
            return "No outliers: nothing to fix"
        count = len(self.chosen.ranking)
        but = f", but {' and '.join(self.worse)}" if self.worse else ""
        return f"{count} register neuron{'s' * (count != 1)}: {self._effect}{but}"

    @property
    def _effect(self) -> str:
        """What became of the outliers."""
        before, after = self.outliers
        if after >= before:
            return "the outliers stay"
        share = math.floor(1000 * (1 - after / before)) / 10  # never rounded up to 100
        return f"{'all' if after == 0 else percent(share)} of the outlier patches are gone"

    @property
    def worse(self) -> list[str]:
        """What got worse, each in a few words that can follow "but"."""
        found = []
        grown = [
            after.after_mlp.outlier_fraction - before.after_mlp.outlier_fraction
            for before, after in zip(self.before.blocks, self.after.blocks, strict=True)
        ]
        if max(grown) >= MIN_FRACTION:
            found.append(f"there are more outliers after block {grown.index(max(grown))}")
        for check in self.facts.get("verified_at") or ():
            found += what_is_wrong_with_maps(check)
        if self.change is not None and self.change > self.limits.get("max_change", math.inf):
            found.append(f"the pooled feature changes by {self.change:.2g}")
        if self.agreement is not None and self.disagrees:
            found.append(f"the head changes its mind on {percent(100 * (1 - self.agreement))} of the images")
        return found


def measure_report(
    model: nn.Module,
    neurons: RegisterNeurons,
    images: Tensor | Sequence[Tensor],
    *,
    rule: OutlierRule | None = None,
    batch_size: int = 16,
) -> Report:
    """Measure `model`, which is unpatched and left so, without and with the registers of `neurons`.

    All is done by the process that asks for it: of several (torch.distributed), the others need not know.
    """
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected image tensors (B, 3, h, w), one at least, got {tuple(images.shape)}")
    rule = rule or OutlierRule()
    tower, batches = find_tower(model), images.split(batch_size)
    ignored = _ignored(neurons, tower.rows_and_columns(images))
    # What the neurons do is about to be measured, so `patch` need not warn that they are not verified.
    with patched(model, replace(neurons, verified=True)), tower.evaluating():
        with disabled(model):
            before = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
            block = _most_outlying(before, neurons)
            norms_before = _norms(model, tower, batches, block, rule, ignored)
        after = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
        norms_after = _norms(model, tower, batches, block, rule, ignored)
        photographs = images[images_with_most(norms_before.outliers, NUM_PHOTOGRAPHS)]
        observable = before.blocks[-1].outlier_attention is not None
        maps_before, maps_after = compare(model, photographs, block, attention=observable)
    return Report(
        neurons=neurons,
        model=describe_model(model, tower),
        block=block,
        ignored=ignored,
        before=replace(before, patched=False),
        after=after,
        norms_before=norms_before,
        norms_after=norms_after,
        photographs=photographs,
        maps_before=maps_before,
        maps_after=maps_after,
    )


def images_with_most(outliers: Tensor, count: int) -> Tensor:
    """The numbers of the images with most outliers, of which (B,) says how many each has; in ascending order."""
    return outliers.argsort(descending=True, stable=True)[:count].sort().values


def _most_outlying(before: Diagnosis, neurons: RegisterNeurons) -> int:
    """The block at which the diagnosis finds most outliers, else that at which calibration did, else the last."""
    last = len(before.blocks) - 1
    return before.outliers.block if before.outliers else int(neurons.calibration.get("detection_block", last))


def _ignored(neurons: RegisterNeurons, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The fixed positions that calibration left out on this grid, as far as the list names any."""
    ignored: list[tuple[int, int]] = []
    entries = neurons.calibration.get("ignored")
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"grid": [rows, columns], "positions": [*positions]} if (rows, columns) == grid:
                ignored += [tuple(each) for each in positions if _is_pair(each)]
    return ignored


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, int) and each >= 0 for each in value)


def _norms(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Tensor],
    block: int,
    rule: OutlierRule,
    ignored: Sequence[tuple[int, int]],
) -> Norms:
    """Norms over batches of images (b, 3, h, w); the ratios are those after `block` and after the last block."""
    grid, patches = tower.grid(batches[0]), tower.patches(batches[0])
    largest, median, on_registers, kept = [], [], [], []
    for batch in batches:
        with registers(model) as seen:
            norms = token_norms(tower, batch)[..., patches]  # (L, b, N)
        largest.append(norms.amax(-1))
        median.append(norms.median(-1).values)
        kept.append(norms[[block, -1]])
        if seen:
            on_registers.append(torch.stack([each.float().norm(dim=-1).mean(-1) for each in seen]))  # (L, b)
    shown = torch.cat(kept, 1).cpu()  # (2, B, N)
    return Norms(
        largest=torch.cat(largest, 1).mean(1).cpu(),
        median=torch.cat(median, 1).mean(1).cpu(),
        registers=torch.cat(on_registers, 1).mean(1).cpu() if on_registers else None,
        ratios=dict(zip((block, tower.depth - 1), shown / shown.median(-1, keepdim=True).values, strict=True)),
        outliers=((shown[0] > rule.limit(shown[0])) & ~ignored_patches(ignored, grid)).sum(1),
    )
