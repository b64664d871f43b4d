"""The progress of a phase, shown by the first process: a bar on a terminal or in a notebook, a line elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from testreg.io.processes import rank

if TYPE_CHECKING:
    from tqdm import tqdm


PAUSE = 30.0  # seconds between two lines, where no bar can move


@contextmanager
def progress_bar(what: str, total: int | None, shown: bool, unit: str = "image") -> Iterator[tqdm]:
    """Within the context, a bar that counts what its `update` is told.

    Where no bar can move (a file, a pipe), a line on stderr says instead that the phase has begun, and another every
    `PAUSE` seconds how far it is.

    Args:
        total: at most so many steps; a phase that needs fewer ends with a complete bar. None: unknown.
        shown: False shows nothing.
    """
    from tqdm.auto import tqdm

    is_shown = shown and rank() == 0
    can_move = sys.stderr.isatty() or _in_notebook()
    if is_shown and not can_move:
        print(f"testreg: {what}" + (f", up to {total} {unit}s" if total else ""), file=sys.stderr, flush=True)
        yield _lines(what, total, unit)
        return
    with tqdm(total=total, unit=unit, desc=what, disable=not is_shown) as bar:
        yield bar
        if not bar.disable and bar.n != bar.total:
            done, started = bar.n, bar.start_t
            bar.reset(total=done)  # a notebook's widget learns its length by this alone
            bar.start_t = started
            bar.update(done)


def _lines(what: str, total: int | None, unit: str) -> tqdm:
    """A bar that prints itself as a line every `PAUSE` seconds, and not at the end."""
    from tqdm import tqdm

    class Lines(tqdm):
        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if self.n:
                print(f"testreg: {self}", file=sys.stderr, flush=True)
            return True

        def close(self) -> None:
            self.disable = True

    of_total = "" if total is None else f" of at most {total}"
    left = "" if total is None else ", {remaining} left at most"
    words = f"{{desc}}, {{n_fmt}} {unit}s{of_total} in {{elapsed}}{left}"
    return Lines(total=total, desc=what, mininterval=PAUSE, maxinterval=math.inf, miniters=1, bar_format=words)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process: its stderr is no terminal, but shows bars."""
    if (ipython := sys.modules.get("IPython")) is None or (shell := ipython.get_ipython()) is None:
        return False
    return "IPKernelApp" in shell.config
