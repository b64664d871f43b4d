"""The progress bar: on a terminal, of the first process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testreg.io.processes import rank

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(what: str, total: int | None, shown: bool, unit: str = "image") -> tqdm:
    from tqdm import tqdm

    # disable=None shows the bar on a terminal only
    return tqdm(total=total, unit=unit, desc=what, disable=None if shown and rank() == 0 else True)
