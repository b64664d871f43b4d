"""The time that a calibration may take, and what it cut short."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal

from testreg.io.processes import all_gather

FORWARDS = 4  # a calibration costs some 2 to 4 forwards of each image, and more where the search is long
MIN_IMAGES = 8  # so many are used, however little time there is

Cut = Literal["images", "ranking", "choosing"]


class Budget:
    """The seconds that a calibration may take from now on, in the slowest of the processes; None: without a limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.started = time.monotonic()
        self.forward_seconds = 0.0
        """Seconds for a forward of one image, divided by the number of processes; `images` measures it."""
        self.cut: list[Cut] = []
        """What was cut short. "images": not all of the first were used; "ranking": it ended before it was stable;
        "choosing": sets of neurons were not measured."""

    def is_spent(self, doing: Cut, forwards_to_come: int = 0) -> bool:
        """Whether less time is left than so many forwards of an image take.

        If so, the step that asks is noted as cut short.
        """
        if self.seconds is None:
            return False
        left = self.seconds - (time.monotonic() - self.started) - forwards_to_come * self.forward_seconds
        if not any(all_gather(left < 0)):
            return False
        self._remember(doing)
        return True

    def images(self, first: int, forward: Callable[[], object]) -> int | None:
        """How many of the `first` images there is time for, an even number; None for all of them.

        `forward` runs one image, which tells how long others will take. So diagnosis, ranking, choice and verification
        all get their share, where a deadline alone would leave nothing for the last of them.
        """
        if self.seconds is None:
            return None
        forward()  # warms up
        start = time.perf_counter()
        forward()
        shares = all_gather(time.perf_counter() - start)
        self.forward_seconds = max(shares) / len(shares)
        number = 2 * int(self.seconds / (2 * FORWARDS * self.forward_seconds))
        if number < MIN_IMAGES <= first:
            warnings.warn(
                f"a budget of {self.seconds:g} seconds does not pay for {MIN_IMAGES} images, the fewest that are used: "
                f"these take {MIN_IMAGES * FORWARDS * self.forward_seconds:.0f} or so",
                stacklevel=3,
            )
        if max(MIN_IMAGES, number) >= first:
            return None
        self._remember("images")
        return max(MIN_IMAGES, number)

    def _remember(self, doing: Cut) -> None:
        if doing not in self.cut:
            self.cut.append(doing)
