"""What the libraries show of themselves beside what testreg shows: progress bars, warnings and logs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # read when imported


@contextmanager
def muted(*, verbose: bool) -> Iterator[None]:
    """Within the context, the bars, warnings and logs of libraries are not shown; testreg's warnings are a line each.

    If `verbose`, nothing is held back, and testreg's log is shown too.
    """
    if verbose:
        with _log_shown():
            yield
        return
    before, disabled = dict(os.environ), logging.root.manager.disable
    os.environ.update({key: value for key, value in _NO_BARS.items() if key not in before})
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_our_own
            yield
    finally:
        logging.disable(disabled)
        for key in _NO_BARS.keys() - before.keys():
            os.environ.pop(key, None)


@contextmanager
def _log_shown() -> Iterator[None]:
    log, handler = logging.getLogger("testreg"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("testreg: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _show_our_own(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Show a warning if code of testreg gives it: the place that it names is that of whoever called this code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").partition(".")[0] == "testreg":
        print(f"testreg: warning: {message}", file=sys.stderr)
