"""Find the files of the bundled lists of register neurons."""

from __future__ import annotations

import difflib
from pathlib import Path

from testreg.files import shown


def config_folder() -> Path:
    """The folder of the bundled lists: in the installed package, or `configs/` in a checkout of the repository."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def bundled_names() -> list[str]:
    """The names of the bundled lists, sorted."""
    return sorted(path.stem for path in config_folder().glob("*.json"))


def bundled_file(name: str) -> Path:
    """The file of the bundled list with this name. If there is none, raises ValueError, which names other lists."""
    path = config_folder() / f"{name}.json"
    if path.is_file():
        return path
    known = bundled_names()
    close = difflib.get_close_matches(name, known, 1)
    hint = f": did you mean {close[0]}?" if close else f"; bundled: {', '.join(known)}"
    raise ValueError(f"no bundled list {shown(name)} (and no such file){hint}")
