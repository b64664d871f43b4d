"""Safety for checkpoints that strangers made: their files are checked before a library reads them, and no code is run.

Errors that a library raises for them become one error, which names the input and the fix.
"""

from __future__ import annotations

import json
import textwrap
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

CHECK_HUB = "Check the name on huggingface.co, and the network"
CHECK_FOLDER = "The folder is damaged, or not for this release of the library: copy it, or save it, again"
_READ_BY_LIBRARIES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # suffixes of files that libraries open
LONGEST = 300  # so many characters of a library's error are quoted
_ONE_AT_A_TIME = threading.RLock()


def check_folder(folder: Path) -> None:
    """Raise an error if a library, given this folder, would wait for ever, read files outside of it, or read pickles.

    Raises:
        OSError, ValueError: the error names the file.
    """
    for path in folder.iterdir():
        if path.suffix in _READ_BY_LIBRARIES and path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(f"{path} is a pipe or a device, not a file")
    names_in = {"config.json": lambda data: [data["transformers_weights"]] if data.get("transformers_weights") else []}
    names_in |= {
        path.name: lambda data: data["weight_map"].values() for path in folder.glob("*.safetensors.index.json")
    }
    for file, names in names_in.items():
        if not (folder / file).is_file():
            continue
        data = read_json(folder / file)
        try:
            bad = [name for name in names(data) if not (is_file_name(name) and ".safetensors" in name)]
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{folder / file} is damaged: copy it again") from None
        if bad:
            raise ValueError(f"{folder / file} names {one_line(bad[0])}, which is no safetensors file of its folder")


def require(folder: Path, pattern: str) -> None:
    """Raise an error if a folder has no file that matches the glob `pattern`, or if `check_folder` refuses it."""
    if folder.is_dir():
        check_folder(folder)
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if pattern.endswith(".safetensors") and pickles:
        raise ValueError(
            f"{folder} has no {pattern}, and testreg reads no pickles ({pickles[0]}) from folders, since they can run "
            "code: if you trust it, load it with its own library and save it as safetensors"
        )
    raise FileNotFoundError(f"{folder} has no {pattern}: name the folder of a complete checkpoint")


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        OSError: the file cannot be read, or is a pipe or a device, whose reading might never end.
        ValueError: the file is not valid JSON.
    """
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a broken link: copy the folder again, with the files that it links to")
    if not path.is_file():
        raise OSError(f"{path} is not a regular file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: JSON that is nested too deeply
        raise ValueError(f"{path} is damaged, not valid JSON (truncated?): {one_line(error)}") from None


def is_file_name(name: str) -> bool:
    """Whether `name` is a bare file name, without folders: a name in a stranger's file must not lead elsewhere."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()


@contextmanager
def without_asking() -> Iterator[None]:
    """Within the `with` block, transformers never asks on the terminal whether to run code: it raises an error instead.

    This is needed beside `trust_remote_code=False`, which does not apply to models inside of a model, nor to
    open_clip's text towers. Only one thread at a time can be in the block, since transformers has one setting for all
    threads.
    """
    from transformers import dynamic_module_utils

    with _ONE_AT_A_TIME:
        seconds_before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
        try:
            yield
        finally:
            dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds_before


def asking_only_if(trusted: bool) -> AbstractContextManager[None]:
    """A context manager in which libraries may ask whether to run a repository's code, if `trusted`.

    If not, it is `without_asking`.
    """
    return nullcontext() if trusted else without_asking()


@contextmanager
def explained(name: str, fix: str) -> Iterator[None]:
    """Turn any error of a library into an OSError or ValueError that names the input and the fix."""
    try:
        yield
    except Exception as error:
        from huggingface_hub import constants

        message = one_line(error).rstrip(".")
        if "trust_remote_code" in str(error):
            fix = "If you trust that code, pass trust_remote_code=True (--trust-remote-code)"
        kind = OSError if isinstance(error, OSError) else ValueError
        is_of_network = kind is OSError or "download" in message
        if is_of_network and fix != CHECK_FOLDER and constants.HF_HUB_OFFLINE:
            fix = f"HF_HUB_OFFLINE is set, so that nothing is downloaded: unset it, or name a local folder. {fix}"
        raise kind(f"cannot load {name}: {message}. {fix}") from error


def one_line(message: object) -> str:
    """The first line of an error's message, shortened and with printable characters only, to be quoted in another."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()] or [type(message).__name__]
    line = "".join(char if char.isprintable() else "?" for char in lines[0])
    return textwrap.shorten(line, LONGEST, placeholder=" [...]") if " " in line[:LONGEST] else line[:LONGEST]
