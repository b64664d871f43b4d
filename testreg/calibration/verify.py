"""Verify the chosen register neurons: measure what moving them does, on held-out images that did not choose them.

A neuron is *moved* when its activation is taken from the patches and placed on extra tokens, the registers. *Outliers*
are patches with huge norms, which should be gone then.
"""

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
    """What moving the chosen neurons does on the images that verify them."""

    measured: tuple[Verification, ...]
    """What was measured at each image size."""
    target_met: bool
    """Whether few enough outliers are left, by the option `target`, at each image size."""
    on_new_images: bool
    """Whether the images that verify the neurons had no part in choosing them."""

    @property
    def verified(self) -> bool:
        """Whether the neurons count as verified: the target is met and attention maps are clean, at each image size, on
        at least `MIN_VERIFYING` new images."""
        # Images without outliers would verify any list of neurons.
        enough_images = all(each.images >= MIN_VERIFYING and each.outlier_fraction > 0 for each in self.measured)
        maps_are_clean = not any(map(what_is_wrong_with_maps, self.measured))
        return self.target_met and maps_are_clean and self.on_new_images and enough_images


def verify(detected: Sequence[Detected], choice: Choice, meters: Sequence[Meters], options: Options) -> Checks | None:
    """Measure what moving the chosen neurons does at each image size.

    Returns None if no images are held out, so that there are no `meters`.
    """
    if not meters:
        return None
    measured = []
    for each, (_, meter) in zip(detected, meters, strict=True):
        unpatched = meter.effect_of_nothing
        measured.append(
            Verification(
                image_size=each.image_size,
                dtype=each.view.dtype,
                grid=meter.grid,
                images=meter.num_images,
                outlier_fraction=meter.outlier_fraction,
                effect=meter.effect(choice.neurons, choice.num_registers, choice.start),
                before=PlainAttention(unpatched.sink, unpatched.hottest),
            )
        )
    return Checks(
        tuple(measured),
        target_met=worst_of([each.effect for each in measured]).remaining <= options.target,
        on_new_images=choice.selection is None or all(each.split.can_verify for each in detected),
    )
