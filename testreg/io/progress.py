"""Shows the progress of a phase: as a bar on a terminal or in a notebook, as lines of text elsewhere.

If several processes run, only the first one shows it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from testreg.io.processes import rank

if TYPE_CHECKING:
    from tqdm import tqdm


PAUSE = 30.0  # seconds between two lines of text


@contextmanager
def progress_bar(what: str, total: int | None, shown: bool, unit: str = "image") -> Iterator[tqdm]:
    """Yield a progress bar, whose `update(n)` counts n more steps.

    If stderr is a file or a pipe, where a bar cannot be redrawn, lines are printed instead: one when the phase begins,
    and one every `PAUSE` seconds.

    Args:
        what: what the phase is called.
        total: the largest number of steps; a phase that ends with fewer shows a complete bar. None: unknown.
        shown: whether to show anything.
        unit: what a step is called.
    """
    from tqdm.auto import tqdm

    is_shown = shown and rank() == 0
    can_redraw = sys.stderr.isatty() or _in_notebook()
    if is_shown and not can_redraw:
        print(f"testreg: {what}" + (f", up to {total} {unit}s" if total else ""), file=sys.stderr, flush=True)
        yield _bar_of_lines(what, total, unit)
        return
    with tqdm(total=total, unit=unit, desc=what, disable=not is_shown) as bar:
        yield bar
        if not bar.disable and bar.n != bar.total:
            done, started = bar.n, bar.start_t
            bar.reset(total=done)  # the only way to change the length of a notebook's bar
            bar.start_t = started
            bar.update(done)


def _bar_of_lines(what: str, total: int | None, unit: str) -> tqdm:
    """A bar that prints a line every `PAUSE` seconds, and none at the end."""
    from tqdm import tqdm

    class Lines(tqdm):
        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if self.n:
                print(f"testreg: {self}", file=sys.stderr, flush=True)
            return True

        def close(self) -> None:
            self.disable = True

    of_total = "" if total is None else f" of at most {total}"
    remaining = "" if total is None else ", {remaining} left at most"
    line_format = f"{{desc}}, {{n_fmt}} {unit}s{of_total} in {{elapsed}}{remaining}"
    return Lines(total=total, desc=what, mininterval=PAUSE, maxinterval=math.inf, miniters=1, bar_format=line_format)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process. Its stderr is not a terminal, but can show bars."""
    if (ipython := sys.modules.get("IPython")) is None or (shell := ipython.get_ipython()) is None:
        return False
    return "IPKernelApp" in shell.config
