"""The exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """The exit codes of the command line."""

    meaning: str
    """What the exit code means, for the help."""

    def __new__(cls, code: int, meaning: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done"
    ERROR = 1, "error"
    USAGE = 2, "wrong usage"  # typer itself exits with this code
    NOTHING_TO_FIX = 3, "no outliers: nothing to fix"
    NOT_FIXABLE = (
        4,
        "outliers that registers do not fix: at fixed positions, not made by MLPs, or left in a patched model",
    )
    NOT_VERIFIED = (
        5,
        ("neurons were written, but are not verified: the target was not met, or on too few held-out images"),
    )
    INTERRUPTED = 130, "interrupted"


def exit_codes(*others: Exit, done: str = Exit.DONE.meaning) -> str:
    """A sentence for the help: the exit codes that every command has, and `others`; `done` is what 0 means."""
    codes = sorted({Exit.DONE, Exit.ERROR, Exit.USAGE, Exit.INTERRUPTED, *others})
    meanings = (f"{code.value} {done if code is Exit.DONE else code.meaning}" for code in codes)
    return f"Exit codes: {'; '.join(meanings)}."
