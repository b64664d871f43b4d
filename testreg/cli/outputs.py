"""Files that commands write: they are checked before the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from testreg.files import check_writable, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = (".html", ".htm")  # suffixes of reports
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")  # suffixes of pictures that matplotlib writes


def check_file(path: Path | None, *suffixes: str) -> None:
    """Raise an error if the file cannot be written, or has none of the `suffixes` (if any are given)."""
    if path is None:
        return
    check_writable(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a {' or '.join(suffixes)} file")


def save_picture(picture: Figure, path: Path) -> None:
    """Write a picture in the format of its suffix. An existing file is replaced only once the new one is complete."""
    with replacing(path) as temporary:
        picture.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
