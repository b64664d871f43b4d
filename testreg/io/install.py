"""Replace the checkpoint in a folder, all of it or nothing, also through a crash.

Everything is written into a folder inside the target. Then the old files move out, testreg.json first, and the new ones
in, testreg.json last. Whenever testreg.json is there, the checkpoint that it describes is there whole. Where it is not,
the folder inside says that a save was interrupted, and holds what is needed to undo it.
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
PENDING = ".testreg-save"
"""The folder inside the target: `new` are files to be moved in, `old` files that were moved out."""
_OURS = {
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
    """Whether it is a file, of a name that testreg or a library writes: a stranger's testreg.json may list others."""
    name = path.name
    return (name in _OURS or name.endswith((".safetensors", ".safetensors.index.json"))) and path.is_file()


def is_interrupted(target: Path) -> bool:
    """Whether a save into `target` ended, or is, between the old checkpoint and the new one."""
    return (target / PENDING).is_dir() and not os.path.lexists(target / RECORD)


def recover(target: Path) -> None:
    """Undo what an interrupted save left in `target`: the checkpoint that was there before is there again.

    Raises:
        OSError: another process is saving into it, or a file could not be moved.
    """
    if os.path.lexists(target / PENDING):
        with _locked(target):
            _roll_back(target)


@contextmanager
def installing(target: Path, replaced: Iterable[str]) -> Iterator[Path]:
    """Yield an empty folder whose files, when the context ends, replace the `replaced` ones in `target`.

    After an error, within the context or in the moving, `target` is what it was.

    Raises:
        OSError: another process is saving into it, or a file could not be moved.
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
    new, old = target / PENDING / "new", target / PENDING / "old"
    arriving = _record_last(os.listdir(new))
    leaving = [name for name in {*replaced, *arriving} if may_be_replaced(target / name)]
    if in_the_way := [name for name in arriving if name not in leaving and os.path.lexists(target / name)]:
        raise FileExistsError(f"{target / in_the_way[0]} is in the way, and no file of testreg's: move it elsewhere")
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
    """Bring `target` to where the last save into it began. May be interrupted and called again at any point."""
    pending = target / PENDING
    if not os.path.lexists(pending):
        return
    new, old = pending / "new", pending / "old"
    if any(path.is_symlink() for path in (pending, new, old)):
        raise OSError(f"{pending} holds links, which testreg never makes: delete it")
    if is_interrupted(target):
        for name in _listed(new / RECORD):
            if may_be_replaced(target / name) and not os.path.lexists(new / name):
                os.rename(target / name, new / name)
        for name in _record_last(os.listdir(old) if old.is_dir() else ()):
            if may_be_replaced(old / name):  # and nothing else was ever moved there
                os.rename(old / name, target / name)
        flush(target)
    shutil.rmtree(pending)


def _listed(record: Path) -> list[str]:
    """The files of a checkpoint that is about to be moved in; none if its record is incomplete: none was moved then."""
    try:
        names = json.loads(record.read_text(encoding="utf-8"))["files"] if record.is_file() else []
        return [name for name in names if Path(name).name == name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _record_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == RECORD, name))


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keep other processes and threads from saving into `target`. The lock ends with the process that holds it."""
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
