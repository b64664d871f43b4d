"""The files that commands write, which are checked before the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from testreg.files import check_writable, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = (".html", ".htm")


def check_file(path: Path | None, *suffixes: str) -> None:
    """Raise at once what writing the file would raise after the work, and if its name ends in none of `suffixes`."""
    if path is None:
        return
    check_writable(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {path}: name a {' or '.join(suffixes)} file")


def check_picture(path: Path) -> None:
    """Raise at once what writing the picture would raise after the work."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if _picture_format(path) not in kinds:
        raise ValueError(f"cannot write {path}: pictures are {', '.join(sorted(kinds))}")
    check_writable(path)


def _picture_format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def save_picture(picture: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        picture.savefig(temporary, format=_picture_format(path), dpi=150)
