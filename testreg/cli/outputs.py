"""The files that commands write, which are checked before the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from testreg.files import check_writable, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = (".html", ".htm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def check_file(path: Path | None, *suffixes: str) -> None:
    """Raise at once what writing the file would raise after the work, and if its name ends in none of `suffixes`."""
    if path is None:
        return
    check_writable(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a {' or '.join(suffixes)} file")


def save_picture(picture: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        picture.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
