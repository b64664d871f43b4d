"""Hides the progress bars, warnings and logs of other libraries while a command runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Environment variables that hide bars. Libraries read them when they are imported, which happens later."""


@contextmanager
def muted(*, verbose: bool) -> Iterator[None]:
    """Within the `with` block, bars, warnings and logs of libraries are hidden; testreg's warnings take a line each.

    If `verbose`, nothing is hidden, and testreg's log is shown too.
    """
    if verbose:
        with _showing_testreg_log():
            yield
        return
    environment_before, level_before = dict(os.environ), logging.root.manager.disable
    os.environ.update({key: value for key, value in _NO_BARS.items() if key not in environment_before})
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _show_testreg_warning
            yield
    finally:
        logging.disable(level_before)
        for key in _NO_BARS.keys() - environment_before.keys():
            os.environ.pop(key, None)


@contextmanager
def _showing_testreg_log() -> Iterator[None]:
    """Within the `with` block, testreg's log is shown on stderr."""
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


def _show_testreg_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Print a warning if code of testreg gave it, which the call stack tells. (`where` may name the code's caller.)"""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").partition(".")[0] == "testreg":
        print(f"testreg: warning: {message}", file=sys.stderr)
