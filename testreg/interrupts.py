"""Ctrl-C ends the command line in one line, even while Python is importing what the command line is made of."""

import sys
from pathlib import Path
from types import TracebackType

INTERRUPTED = 130  # the exit code, as shells have it


def _is_command_line() -> bool:
    """Whether this process is `testreg` or `python -m testreg`, and not a program that imports the package."""
    return Path(sys.argv[0]).stem == "testreg" or (sys.argv[0] == "-m" and "testreg" in sys.orig_argv)


def _end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted; nothing was written", file=sys.stderr)
    raise SystemExit(INTERRUPTED)


if _is_command_line():
    sys.excepthook = _end
