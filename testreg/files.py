"""Files that are there whole or not at all, that are opened only if they are files, and that say what is in them."""

from __future__ import annotations

import errno
import glob
import os
import reprlib
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".testreg-part"  # of the temporary files, so that no other file is swept
UNFINISHED = ".unfinished"  # behind the name of a file that a later run goes on with
STALE = 3600.0  # seconds without a write after which a temporary file is of a run that was killed
LONGEST = 200  # characters of a file's content that a message repeats


def regular_file(path: str | os.PathLike[str]) -> Path:
    """`path`, which can be opened for reading without waiting: a FIFO or a device could block for ever.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: there is no such file, or it is something else.
    """
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder, not a file")
    if file.exists():
        raise OSError(f"{file} is not a regular file (but a pipe, a socket or a device): copy it to one")
    raise FileNotFoundError(f"there is no file {file}")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a regular file in UTF-8; raises as `regular_file`."""
    return regular_file(path).read_text(encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends: nobody ever meets half a file.

    Raises:
        OSError: `path` is a folder or a device, or could not be written. What was there is left as it was.
    """
    target = Path(path)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = _temporary(target)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        flush(temporary)  # or a power cut could leave an empty file under the name of the whole one
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {target}, which is left as it was: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise at once what `replacing(path)` would raise after the work; the folder must exist.

    Raises:
        OSError: there is no such folder, nothing can be written to it, or `path` is no file that may be replaced.
    """
    target = Path(path)
    _check_replaceable(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {target}: it is read-only")
    _try(target)


def check_writable_folder(path: str | os.PathLike[str]) -> None:
    """Raise at once if `path`, a folder that need not exist yet, could not be filled.

    Raises:
        OSError: `path` is a file, or nothing can be written there.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder")
    while not folder.is_dir():
        folder = folder.parent
    _try(folder / Path(path).name)


def flush(path: Path) -> None:
    """Make sure that the disk holds what was written to a file or a folder, before anything relies on it."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # folders cannot be flushed there
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a file system says that cannot do this for folders
            raise
    finally:
        os.close(handle)


def _check_replaceable(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file to write")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {target}: it is not a regular file (but a pipe, a socket or a device)")


def _try(target: Path) -> None:
    try:
        _temporary(target).unlink()
    except OSError as error:
        raise type(error)(f"cannot write {target}: {error.strerror}") from None


def _temporary(target: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=SUFFIX)
    os.close(handle)
    return Path(name)


def _sweep(target: Path) -> None:
    """Remove what killed runs left beside `target`.

    By age, since process numbers mean nothing on another machine that shares the folder. Should a run have been asleep
    for so long, it ends with an error, and the target is whole.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{SUFFIX}"):
        try:
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
        except OSError:  # another run was faster, or it is not ours
            pass


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# What is in a file ----------------------------------------------------------------------------------------------------


def check_format(
    data: object, name: str, version: int, known: Collection[str], *, source: str, expected: str
) -> dict[str, Any]:
    """The JSON object `data`, if it says that it is of the format `name`, in any version.

    Warns if its version is newer than `version`, and names the keys that are ignored because they are not `known`.

    Raises:
        ValueError: it is of no version, or of another format: "`source` is not `expected`".
    """
    if not isinstance(data, dict) or data.get("format") != name:
        raise ValueError(f'{source} is not {expected} ("format": "{name}" is missing)')
    number: Any = data.get("version")
    if type(number) is not int or number < 1:
        raise ValueError(f"{source}: version must be a whole number, got {shown(number)}")
    if number > version:
        ignored = plain(", ".join(sorted(data.keys() - known))) or "none"
        warnings.warn(
            f"{source} has version {shown(number)}, newer than this testreg reads ({version}); "
            f"keys that are ignored: {ignored}. Upgrade testreg to use them",
            stacklevel=4,  # of who called the function that reads the file
        )
    return data


def shown(value: object) -> str:
    """A short repr without control characters, for messages about what someone else has written."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print whole numbers of many thousand digits
        return f"a {type(value).__name__} of enormous size"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def plain(text: object, longest: int | None = LONGEST) -> str:
    """Text of a file for a message: on one line, without control characters, and not longer than a few lines."""
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text)[:longest])
    return line if longest is None or len(line) <= longest else line[:longest] + "..."
