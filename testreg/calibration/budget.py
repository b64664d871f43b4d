"""The time that a calibration may take. A step that ends early because the time is over is *cut short*."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal

from testreg.io.processes import all_gather

FORWARDS = 4  # a calibration takes 2 to 4 forwards of each image, and more if the search for neurons is long
MIN_IMAGES = 8  # at least this many images are used, however short the time is

Step = Literal["images", "ranking", "choosing"]
"""A step that may be cut short. "images": fewer images are held out and diagnosed; "ranking": ranking ends before it is
stable; "choosing": some sets of neurons are not measured."""


class Budget:
    """The time that a calibration may take, counted from when this object is made.

    Args:
        seconds: the time; None sets no limit. With several processes, it is over when it is over in one of them.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.started = time.monotonic()
        self.forward_seconds = 0.0
        """Seconds for a forward of one image, divided by the number of processes; `affordable_images` measures it."""
        self.cut_steps: list[Step] = []
        """The steps that were cut short."""

    def is_spent(self, step: Step, forwards_to_come: int = 0) -> bool:
        """Whether the time left is too short for `forwards_to_come` more forwards of one image.

        If it is, `step` is noted as cut short.
        """
        if self.seconds is None:
            return False
        seconds_left = self.seconds - (time.monotonic() - self.started) - forwards_to_come * self.forward_seconds
        if not any(all_gather(seconds_left < 0)):
            return False
        self._note_cut(step)
        return True

    def affordable_images(self, num_images: int, forward: Callable[[], object]) -> int | None:
        """How many of `num_images` images the time is enough for; None if it is enough for all.

        It is an even number, and at least `MIN_IMAGES`.

        `forward` runs one image; the time that this takes is measured. With fewer images every step gets its share of
        the time. A deadline alone would leave no time for the last steps.
        """
        if self.seconds is None:
            return None
        forward()  # warms up
        start = time.perf_counter()
        forward()
        shares = all_gather(time.perf_counter() - start)
        self.forward_seconds = max(shares) / len(shares)
        number = 2 * int(self.seconds / (2 * FORWARDS * self.forward_seconds))
        if number < MIN_IMAGES <= num_images:
            warnings.warn(
                f"a budget of {self.seconds:g} seconds does not pay for {MIN_IMAGES} images, the fewest that are used: "
                f"these take {MIN_IMAGES * FORWARDS * self.forward_seconds:.0f} or so",
                stacklevel=3,
            )
        if max(MIN_IMAGES, number) >= num_images:
            return None
        self._note_cut("images")
        return max(MIN_IMAGES, number)

    def _note_cut(self, step: Step) -> None:
        if step not in self.cut_steps:
            self.cut_steps.append(step)
