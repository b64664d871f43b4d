"""The files of the lists that come with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from testreg.files import shown


def config_folder() -> Path:
    """Where the bundled lists are: in the installed package, or `configs/` of a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def bundled_names() -> list[str]:
    return sorted(path.stem for path in config_folder().glob("*.json"))


def bundled_file(name: str) -> Path:
    """The file of a bundled list; raises ValueError, which names the others, if there is none of that name."""
    path = config_folder() / f"{name}.json"
    if path.is_file():
        return path
    known = bundled_names()
    close = difflib.get_close_matches(name, known, 1)
    hint = f": did you mean {close[0]}?" if close else f"; bundled: {', '.join(known)}"
    raise ValueError(f"no bundled list {shown(name)} (and no such file){hint}")
