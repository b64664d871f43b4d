"""Measure the chosen neurons on images that had no part in the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from testreg.calibration.choose import Choice
from testreg.calibration.detect import Detected, Meters
from testreg.calibration.effects import what_is_wrong_with_maps, worst_of
from testreg.calibration.options import Options
from testreg.calibration.split import MIN_VERIFYING
from testreg.records.calibration import PlainAttention, Verification


@dataclass(frozen=True)
class Checks:
    """What the chosen neurons do on the images that verify them."""

    measured: tuple[Verification, ...]
    """At each image size."""
    target_met: bool
    on_others: bool
    """Whether these images had no part in the choice."""

    @property
    def verified(self) -> bool:
        """Whether the target was met, and maps are clean, on enough images, with outliers, that had no part in the
        choice."""
        # Images without an outlier would verify any list.
        enough = all(each.images >= MIN_VERIFYING and each.outlier_fraction > 0 for each in self.measured)
        are_clean = not any(map(what_is_wrong_with_maps, self.measured))
        return self.target_met and are_clean and self.on_others and enough


def verify(detected: Sequence[Detected], choice: Choice, meters: Sequence[Meters], options: Options) -> Checks | None:
    """Measure the chosen neurons at each image size; None if no images are held out."""
    if not meters:
        return None
    measured = []
    for each, (_, meter) in zip(detected, meters, strict=True):
        before = meter.untouched
        measured.append(
            Verification(
                image_size=each.image_size,
                dtype=each.view.dtype,
                grid=meter.grid,
                images=meter.num_images,
                outlier_fraction=meter.outlier_fraction,
                effect=meter.effect(choice.neurons, choice.num_registers, choice.start),
                before=PlainAttention(before.sink, before.hottest),
            )
        )
    return Checks(
        tuple(measured),
        target_met=worst_of([each.effect for each in measured]).remaining <= options.target,
        on_others=choice.selection is None or all(each.split.can_verify for each in detected),
    )
