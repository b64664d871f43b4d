"""Measures for a report what the registers of a list of neurons do to a model: before (without) and after (with).

Register neurons make outliers (patches of huge norm); a register is an extra token onto which they are moved.
"""

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

NUM_PHOTOGRAPHS = 5  # images whose maps a report shows
MIN_AGREEMENT = 0.99  # the head's class should stay the same on at least this share of the images


@dataclass(frozen=True)
class Norms:
    """Norms of the N patches of B images after each of L blocks."""

    largest: Tensor
    """The largest norm of an image's patches after each block, mean over images, (L,)."""
    median: Tensor
    """The median norm of an image's patches after each block, mean over images, (L,)."""
    registers: Tensor | None
    """The mean norm of the registers after each block, (L,), NaN after blocks in front of the one that they enter; None
    without registers."""
    ratios: dict[int, Tensor]
    """{block: norms of the patches over the median norm of their image, (B, N)}, for `Report.block` and the last
    block."""
    outliers: Tensor
    """The number of outliers in each image after the first block in `ratios`, (B,)."""


@dataclass(frozen=True)
class Report:
    """Measurements of a model before (without registers) and after (with registers).

    Properties that depend on how the list of neurons was made are None if the list does not tell.
    """

    neurons: RegisterNeurons
    model: Mapping[str, Any]
    """The description of the model, see `testreg.neurons.describe_model`."""
    block: int
    """The block after which outliers stand out most; if there are none, the calibration's block, or the last."""
    ignored: list[Position]
    """(row, column) of patches that are not counted as outliers, since calibration left these fixed positions out."""
    before: Diagnosis
    after: Diagnosis
    norms_before: Norms
    norms_after: Norms
    photographs: Tensor
    """The images with most outliers, (b, 3, h, w)."""
    maps_before: Maps
    maps_after: Maps

    @property
    def chosen(self) -> RegisterNeurons:
        """The list without the ranked neurons that are not used."""
        return self.neurons.truncate()

    @property
    def facts(self) -> Calibration:
        """How the list of neurons was made."""
        return self.neurons.calibration

    @property
    def outliers(self) -> tuple[float, float]:
        """The share of the patches that are outliers after `block`: (before, after)."""
        before, after = (side.blocks[self.block].after_mlp.outlier_fraction for side in (self.before, self.after))
        return before, after

    @property
    def change(self) -> float | None:
        """The change of the pooled feature (1 - cosine), at the image size where it is largest; None if unknown."""
        return max((check.effect.change_pooled for check in self.facts.verified_at), default=None)

    @property
    def worst_sink(self) -> tuple[float, float] | None:
        """The attention to patches that were outliers over that to other patches: (before, after).

        It is taken at the image size where it is largest after; None if unknown.
        """
        sinks = [
            (check.before.sink, check.effect.sink)
            for check in self.facts.verified_at
            if check.before is not None and check.before.sink is not None and check.effect.sink is not None
        ]
        return max(sinks, key=lambda sink: sink[1], default=None)

    @property
    def agreement(self) -> float | None:
        """The share of images whose class, by the user's head, stays the same; the lowest of all sizes, or None."""
        agreements = (check.effect.agreement for check in self.facts.verified_at)
        return min((agreement for agreement in agreements if agreement is not None), default=None)

    @property
    def head_disagrees(self) -> bool:
        """Whether the user's head gives too many images another class with registers."""
        return self.agreement is not None and self.agreement < MIN_AGREEMENT

    @property
    def headline(self) -> str:
        """What the registers did, and what they made worse, in one line."""
        if self.before.kind == "none":
            return "No outliers: nothing to fix"
        count = len(self.chosen.ranking)
        drawbacks_in_words = f", but {' and '.join(self.drawbacks)}" if self.drawbacks else ""
        return f"{count} register neuron{'s' * (count != 1)}: {self._effect}{drawbacks_in_words}"

    @property
    def _effect(self) -> str:
        """What the registers did to the outliers, in words."""
        before, after = self.outliers
        if after >= before:
            return "the outliers stay"
        share = math.floor(1000 * (1 - after / before)) / 10  # never rounded up to 100
        return f"{'all' if after == 0 else percent(share)} of the outlier patches are gone"

    @property
    def drawbacks(self) -> list[str]:
        """What got worse, as phrases that can follow "but"."""
        faults = []
        growth = [
            after.after_mlp.outlier_fraction - before.after_mlp.outlier_fraction
            for before, after in zip(self.before.blocks, self.after.blocks, strict=True)
        ]
        if max(growth) >= MIN_FRACTION:
            faults.append(f"there are more outliers after block {growth.index(max(growth))}")
        for check in self.facts.verified_at:
            faults += what_is_wrong_with_maps(check)
        limit = math.inf if self.facts.max_change is None else self.facts.max_change
        if self.change is not None and self.change > limit:
            faults.append(f"the pooled feature changes by {self.change:.2g}")
        if self.agreement is not None and self.head_disagrees:
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
    """Measure what the registers of `neurons` do to `model`, which must not be patched, and is not changed.

    Only the process that calls this computes, even if there are several (torch.distributed).

    Args:
        images: preprocessed images of one size, (B, 3, h, w) or a list of (3, h, w).
        rule: decides which patches are outliers.
        batch_size: how many images are run at once.
    """
    images = images if isinstance(images, Tensor) else torch.stack(list(images))
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected image tensors (B, 3, h, w), one at least, got {tuple(images.shape)}")
    rule = rule or OutlierRule()
    tower, batches = find_tower(model), images.split(batch_size)
    ignored = _ignored(neurons, tower.rows_and_columns(images))
    # `verified=True` suppresses the warning that neurons are not verified: the report will show what they do.
    with patched(model, replace(neurons, verified=True)), tower.evaluating():
        with disabled(model):
            before = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
            block = _block_with_most_outliers(before, neurons)
            norms_before = _norms(model, tower, batches, block, rule, ignored)
        after = conclude(model, [observe(tower, batches, rule, ignored=ignored)], rule)
        norms_after = _norms(model, tower, batches, block, rule, ignored)
        photographs = images[images_with_most(norms_before.outliers, NUM_PHOTOGRAPHS)]
        with_attention = before.blocks[-1].outlier_attention is not None
        maps_before, maps_after = maps_before_and_after(model, photographs, block, attention=with_attention)
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
    """The indices, in ascending order, of the images with most outliers, from the number in each image (B,)."""
    return outliers.argsort(descending=True, stable=True)[:count].sort().values


def _block_with_most_outliers(before: Diagnosis, neurons: RegisterNeurons) -> int:
    """The block after which the diagnosis finds most outliers; if it finds none, calibration's block, or the last."""
    last = len(before.blocks) - 1
    detected = neurons.calibration.detection_block
    return before.outliers.block if before.outliers else last if detected is None else detected


def _ignored(neurons: RegisterNeurons, grid: tuple[int, int]) -> list[Position]:
    """The fixed positions that calibration left out for images with this grid of patches."""
    return [each for fixed in neurons.calibration.ignored if fixed.grid == grid for each in fixed.positions]


def _norms(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Tensor],
    block: int,
    rule: OutlierRule,
    ignored: Sequence[Position],
) -> Norms:
    """The norms over batches of images (b, 3, h, w), with ratios after `block` and after the last block."""
    grid, patches = tower.grid(batches[0]), tower.patches(batches[0])
    largest, median, register_norms, selected = [], [], [], []
    for batch in batches:
        with registers(model) as states:
            norms = token_norms(tower, batch)[..., patches]  # (L, b, N)
        largest.append(norms.amax(-1))
        median.append(norms.median(-1).values)
        selected.append(norms[[block, -1]])
        if states:
            register_norms.append(torch.stack([each.float().norm(dim=-1).mean(-1) for each in states]))  # (L, b)
    selected_norms = torch.cat(selected, 1).cpu()  # (2, B, N)
    return Norms(
        largest=torch.cat(largest, 1).mean(1).cpu(),
        median=torch.cat(median, 1).mean(1).cpu(),
        registers=torch.cat(register_norms, 1).mean(1).cpu() if register_norms else None,
        ratios=dict(
            zip((block, tower.depth - 1), selected_norms / selected_norms.median(-1, keepdim=True).values, strict=True)
        ),
        outliers=((selected_norms[0] > rule.limit(selected_norms[0])) & ~ignored_patches(ignored, grid)).sum(1),
    )
