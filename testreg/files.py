"""Read and write files safely.

A file is written under a temporary name and then renamed, so that nobody meets half a file. Only regular files are
opened. The JSON in a file names its format and its version, which are checked. Text from a file is made safe to print.
"""

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

SUFFIX = ".testreg-part"  # the suffix of temporary files: old ones are removed, and no other files
UNFINISHED = ".unfinished"  # is appended to the name of a file that is not complete, and that a later run goes on with
STALE = 3600.0  # a temporary file that was not written to for this many seconds was left by a run that was killed
LONGEST = 200  # a message repeats at most this many characters of a file


def regular_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` if it is a regular file. Opening anything else, such as a FIFO, could block forever.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        OSError: it is a pipe, a socket or a device.
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
    """Read the text of a regular file in UTF-8. Raises the errors of `regular_file`."""
    return regular_file(path).read_text(encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within the context, write to the temporary file that is returned; it replaces `path` when the context ends.

    So nobody ever meets half a file. If an error is raised in the context, `path` stays as it was.

    Raises:
        OSError: `path` is a folder or a device, or cannot be written.
    """
    target = Path(path)
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    temporary = _new_temporary(target)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        flush(temporary)  # otherwise, after a power cut, `path` could be an empty file
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {target}, which is left as it was: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check before long work that `replacing(path)` will be able to write. The folder of `path` must exist.

    Raises:
        OSError: the folder does not exist, or cannot be written to; or `path` is no file that may be replaced.
    """
    target = Path(path)
    _check_replaceable(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"cannot write {target}: it is read-only")
    _try_to_write(target)


def check_writable_folder(path: str | os.PathLike[str]) -> None:
    """Check before long work that files can be written to the folder `path`, which need not exist yet.

    Raises:
        OSError: `path` is a file, or nothing can be written there.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder")
    while not folder.is_dir():
        folder = folder.parent
    _try_to_write(folder / Path(path).name)


def flush(path: Path) -> None:
    """Wait until the disk has what was written to a file or a folder."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows cannot flush folders
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the error of file systems that cannot flush folders
            raise
    finally:
        os.close(handle)


def _check_replaceable(target: Path) -> None:
    """Raise OSError if `target` exists and is not a regular file."""
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file to write")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {target}: it is not a regular file (but a pipe, a socket or a device)")


def _try_to_write(target: Path) -> None:
    """Raise OSError if no file can be made beside `target`."""
    try:
        _new_temporary(target).unlink()
    except OSError as error:
        raise type(error)(f"cannot write {target}: {error.strerror}") from None


def _new_temporary(target: Path) -> Path:
    """Make an empty temporary file beside `target`."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=SUFFIX)
    os.close(handle)
    return Path(name)


def _remove_stale(target: Path) -> None:
    """Remove the temporary files that killed runs left beside `target`.

    They are recognised by their age: whether a process is alive cannot be known if it ran on another machine that
    shares the folder. A run that merely paused for so long ends with an error, and the target is whole.
    """
    for temporary in target.parent.glob(f".{glob.escape(target.name)}.*{SUFFIX}"):
        try:
            if time.time() - temporary.stat().st_mtime > STALE:
                temporary.unlink()
        except OSError:  # another run has removed it, or it belongs to another user
            pass


def _umask() -> int:
    """The mask of permissions that new files do not get; it can be read only by setting another."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


# The content of a file ------------------------------------------------------------------------------------------------


def check_format(
    data: object, name: str, version: int, known: Collection[str], *, source: str, expected: str
) -> dict[str, Any]:
    """Check that a JSON object names the format `name` and a version, and return it.

    If the version is newer than `version`, a warning names the keys that are ignored since they are not `known`.

    Args:
        source: what the file is called in messages.
        expected: the format in words: the error says that `source` is not `expected`.

    Raises:
        ValueError: `data` is no such object.
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
            stacklevel=4,  # the caller of the function that reads the file
        )
    return data


def shown(value: object) -> str:
    """A short repr of a value that is not trusted, without control characters, for messages."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print whole numbers of many thousand digits
        return f"a {type(value).__name__} of enormous size"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def plain(text: object, longest: int | None = LONGEST) -> str:
    """Text that is not trusted, on one line, without control characters, for messages.

    It is cut to `longest` characters; None does not cut it.
    """
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text)[:longest])
    return line if longest is None or len(line) <= longest else line[:longest] + "..."
