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
from testreg.measure.outliers import MIN_FRACTION, OutlierRule, Position, ignored_patches, token_norms
from testreg.neurons import RegisterNeurons, describe_model
from testreg.records.calibration import Calibration
from testreg.register import disabled, patched, registers
from testreg.report.map_figures import Maps, maps_before_and_after
from testreg.report.values import percent

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

    The list may come from elsewhere: of how it was made, much may be unknown.
    """

    neurons: RegisterNeurons
    model: Mapping[str, Any]
    block: int
    """The block after which outliers stand out most."""
    ignored: list[Position]
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
    def facts(self) -> Calibration:
        """What the list says about how it was made."""
        return self.neurons.calibration

    @property
    def outliers(self) -> tuple[float, float]:
        """Share of the patches that are outliers after `block`, before and after."""
        before, after = (side.blocks[self.block].after_mlp.outlier_fraction for side in (self.before, self.after))
        return before, after

    @property
    def change(self) -> float | None:
        """The largest change of the pooled feature at any image size; None if unknown."""
        return max((check.effect.change_pooled for check in self.facts.verified_at), default=None)

    @property
    def worst_sink(self) -> tuple[float, float] | None:
        """Attention to former outliers over that to other patches, before and after, at the image size where most of it
        stays; None if unknown."""
        known = [
            (check.before.sink, check.effect.sink)
            for check in self.facts.verified_at
            if check.before is not None and check.before.sink is not None and check.effect.sink is not None
        ]
        return max(known, key=lambda sink: sink[1], default=None)

    @property
    def agreement(self) -> float | None:
        """The lowest share of images to which the user's head gives the same class as before; None if unknown."""
        agreements = (check.effect.agreement for check in self.facts.verified_at)
        return min((agreement for agreement in agreements if agreement is not None), default=None)

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
        faults = []
        grown = [
            after.after_mlp.outlier_fraction - before.after_mlp.outlier_fraction
            for before, after in zip(self.before.blocks, self.after.blocks, strict=True)
        ]
        if max(grown) >= MIN_FRACTION:
            faults.append(f"there are more outliers after block {grown.index(max(grown))}")
        for check in self.facts.verified_at:
            faults += what_is_wrong_with_maps(check)
        limit = math.inf if self.facts.max_change is None else self.facts.max_change
        if self.change is not None and self.change > limit:
            faults.append(f"the pooled feature changes by {self.change:.2g}")
        if self.agreement is not None and self.disagrees:
            faults.append(f"the head changes its mind on {percent(100 * (1 - self.agreement))} of the images")
        return faults


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
            block = _block_with_most_outliers(before, neurons)
            norms_before = _norms(model, tower, batches, block, rule, ignored)
        after = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
        norms_after = _norms(model, tower, batches, block, rule, ignored)
        photographs = images[images_with_most(norms_before.outliers, NUM_PHOTOGRAPHS)]
        observable = before.blocks[-1].outlier_attention is not None
        maps_before, maps_after = maps_before_and_after(model, photographs, block, attention=observable)
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


def _block_with_most_outliers(before: Diagnosis, neurons: RegisterNeurons) -> int:
    """The block at which the diagnosis finds most outliers, else that at which calibration did, else the last."""
    last = len(before.blocks) - 1
    detected = neurons.calibration.detection_block
    return before.outliers.block if before.outliers else last if detected is None else detected


def _ignored(neurons: RegisterNeurons, grid: tuple[int, int]) -> list[Position]:
    """The fixed positions that calibration left out on this grid, as far as the list names any."""
    return [each for fixed in neurons.calibration.ignored if fixed.grid == grid for each in fixed.positions]


def _norms(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Tensor],
    block: int,
    rule: OutlierRule,
    ignored: Sequence[Position],
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
