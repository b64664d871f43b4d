"""Replaces the checkpoint in a folder (the target) completely or not at all, even if the process is killed.

1. All new files are written into a folder inside the target (`PENDING`).
2. The old files are moved out of the target, testreg.json first, and the new files in, testreg.json last.

So whenever the target has a testreg.json, the checkpoint that it describes is complete. If `PENDING` exists without a
testreg.json beside it, a save was interrupted or is under way, and `PENDING` has what is needed to undo it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from testreg.files import flush

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be locked
    fcntl = None  # type: ignore[assignment]

RECORD = "testreg.json"
"""The file that describes a patched checkpoint."""
PENDING = ".testreg-save"
"""The folder inside the target. In it, `new` has the files to be moved in, and `old` those that were moved out."""
_FILE_NAMES = {  # names of files that testreg or a library writes into a checkpoint, beside weights
    "config.json",
    "generation_config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    RECORD,
}


def may_be_replaced(path: Path) -> bool:
    """Whether `path` is a file with a name that testreg or a library writes.

    No other file is ever moved, whatever a stranger's testreg.json lists.
    """
    name = path.name
    return (name in _FILE_NAMES or name.endswith((".safetensors", ".safetensors.index.json"))) and path.is_file()


def is_interrupted(target: Path) -> bool:
    """Whether a save into `target` stopped, or still is, between the old checkpoint and the new one."""
    return (target / PENDING).is_dir() and not os.path.lexists(target / RECORD)


def recover(target: Path) -> None:
    """Undo an interrupted save into `target`, so that the earlier checkpoint is there again.

    Raises:
        OSError: another process is saving into `target`, or a file could not be moved.
    """
    if os.path.lexists(target / PENDING):
        with _locked(target):
            _roll_back(target)


@contextmanager
def installing(target: Path, replaced: Iterable[str]) -> Iterator[Path]:
    """Yield an empty folder. When the `with` block ends, its files move into `target` and replace the files `replaced`.

    After an error, `target` is as it was before.

    Raises:
        OSError: another process is saving into `target`, or a file could not be moved.
    """
    is_new = not target.exists()
    if is_new:
        target.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        try:
            _roll_back(target)
            new = target / PENDING / "new"
            new.mkdir(parents=True)
            yield new
            _install(target, replaced)
        except BaseException:
            _roll_back(target)
            if is_new:
                target.rmdir()
            raise
        shutil.rmtree(target / PENDING, ignore_errors=True)


def _install(target: Path, replaced: Iterable[str]) -> None:
    """Move the old files out and the new files in. The order, and when the disk is flushed, makes a crash harmless."""
    new, old = target / PENDING / "new", target / PENDING / "old"
    arriving = _record_last(os.listdir(new))
    leaving = [name for name in {*replaced, *arriving} if may_be_replaced(target / name)]
    if blocking := [name for name in arriving if name not in leaving and os.path.lexists(target / name)]:
        raise FileExistsError(f"{target / blocking[0]} is in the way, and no file of testreg's: move it elsewhere")
    old.mkdir()
    for name in arriving:
        (new / name).chmod(new.stat().st_mode & 0o666)  # the umask's mode; some libraries write 0600
        flush(new / name)
    for folder in (new, new.parent, target):
        flush(folder)
    for name in reversed(_record_last(leaving)):
        os.rename(target / name, old / name)
        if name == RECORD:
            flush(target)
    for name in arriving:
        if name == RECORD:
            flush(target)
        os.rename(new / name, target / name)
    try:
        flush(target)
    except OSError:
        os.rename(target / RECORD, new / RECORD)
        raise


def _roll_back(target: Path) -> None:
    """Bring `target` to the state before the last save into it. This may itself be interrupted, and called again."""
    pending = target / PENDING
    if not os.path.lexists(pending):
        return
    new, old = pending / "new", pending / "old"
    if any(path.is_symlink() for path in (pending, new, old)):
        raise OSError(f"{pending} holds links, which testreg never makes: delete it")
    if is_interrupted(target):
        for name in _files_in_record(new / RECORD):
            if may_be_replaced(target / name) and not os.path.lexists(new / name):
                os.rename(target / name, new / name)
        for name in _record_last(os.listdir(old) if old.is_dir() else ()):
            if may_be_replaced(old / name):  # `_install` moves no other files
                os.rename(old / name, target / name)
        flush(target)
    shutil.rmtree(pending)


def _files_in_record(record: Path) -> list[str]:
    """The files that a new testreg.json lists; [] if it is incomplete, since then no file has been moved yet."""
    try:
        names = json.loads(record.read_text(encoding="utf-8"))["files"] if record.is_file() else []
        return [name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _record_last(names: Iterable[str]) -> list[str]:
    """The names sorted, with testreg.json at the end."""
    return sorted(names, key=lambda name: (name == RECORD, name))


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Within the `with` block, no other process or thread can save into `target`, where files can be locked. The lock
    ends with its process."""
    if fcntl is None:
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is saving into {target}: save from one process, or wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
