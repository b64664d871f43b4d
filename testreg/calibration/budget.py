"""The seconds that a calibration may take, and what they were too few for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal

from testreg.io.processes import all_gather

FORWARDS = 4  # of an image, that a calibration takes in all: 2 to 4, and more where the search is long
FEWEST = 8  # images, however little time there is

Cut = Literal["images", "ranking", "choosing"]


class Budget:
    """The seconds that a calibration may take from now on, in the slowest of the processes; None for any number."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.started = time.monotonic()
        self.forward_seconds = 0.0
        """That an image takes, of many that the processes share; measured by `images`."""
        self.cut: list[Cut] = []
        """What would have gone on with more time: fewer images than the first were used, ranking ended before it was
        stable, or sets of neurons were not measured."""

    def is_spent(self, doing: Cut, forwards_to_come: int = 0) -> bool:
        """Whether no more time is left than so many forwards of an image take, which cuts short what is being done."""
        if self.seconds is None:
            return False
        left = self.seconds - (time.monotonic() - self.started) - forwards_to_come * self.forward_seconds
        if not any(all_gather(left < 0)):
            return False
        self._remember(doing)
        return True

    def images(self, first: int, forward: Callable[[], object]) -> int | None:
        """How many of the `first` images can be used, an even number, if `forward` runs one; None for all of them.

        One image says how long others will take: so diagnosis, ranking, choice and verification all get their share,
        where a deadline alone would leave nothing for what comes last.
        """
        if self.seconds is None:
            return None
        forward()  # warms up
        start = time.perf_counter()
        forward()
        shares = all_gather(time.perf_counter() - start)
        self.forward_seconds = max(shares) / len(shares)
        number = 2 * int(self.seconds / (2 * FORWARDS * self.forward_seconds))
        if number < FEWEST <= first:
            warnings.warn(
                f"a budget of {self.seconds:g} seconds does not pay for {FEWEST} images, the fewest that are used: "
                f"these take {FEWEST * FORWARDS * self.forward_seconds:.0f} or so",
                stacklevel=3,
            )
        if max(FEWEST, number) >= first:
            return None
        self._remember("images")
        return max(FEWEST, number)

    def _remember(self, doing: Cut) -> None:
        if doing not in self.cut:
            self.cut.append(doing)
