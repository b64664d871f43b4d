"""Files are replaced whole or not at all, whatever happens on the way."""

import errno
import os
import stat
import time
from pathlib import Path

import pytest

from testreg import files
from testreg.files import check_format, check_writable, check_writable_folder, read_text, regular_file, replacing

STEPS = ("write", "chmod", "fsync", "replace")


def write(target, text="new", fail=lambda step: None):
    """Replace `target` by `text`; `fail` is called in front of each step."""
    with pytest.MonkeyPatch.context() as patched:
        for owner, name in ((Path, "chmod"), (os, "fsync"), (os, "replace")):
            real = getattr(owner, name)
            patched.setattr(owner, name, lambda *args, real=real, name=name: (fail(name), real(*args)))
        with replacing(target) as temporary:
            temporary.write_text(text[:1])
            fail("write")
            temporary.write_text(text)


@pytest.mark.parametrize("step", STEPS)
def test_a_process_killed_at_any_step_leaves_the_old_file_whole(step, tmp_path):
    target = tmp_path / "neurons.json"
    target.write_text("old")
    child = os.fork()
    if child == 0:  # as after kill -9, nothing is tidied up
        write(target, fail=lambda each: os._exit(9) if each == step else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert target.read_text() == "old"
    write(target)
    assert target.read_text() == "new"


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_is_one_error_and_leaves_the_old_file(step, tmp_path):
    def full(each):
        if each == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "neurons.json"
    target.write_text("old")
    with pytest.raises(OSError, match=r"cannot write .*neurons.json, which is left as it was: .*No space left"):
        write(target, fail=full)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path):
    steps = []
    write(tmp_path / "file", fail=steps.append)
    assert steps == list(STEPS)


def test_what_killed_runs_left_is_swept_and_nothing_else(tmp_path):
    target = tmp_path / "a[1].json"
    old = time.time() - 2 * files.STALE
    left, fresh = (tmp_path / f".a[1].json.{name}{files.SUFFIX}" for name in ("left", "fresh"))
    others = [tmp_path / f".a1.json.x{files.SUFFIX}", tmp_path / ".a[1].json.notes", tmp_path / "a[1].json.bak"]
    for path in (left, fresh, *others):
        path.touch()
        if path is not fresh:
            os.utime(path, (old, old))
    write(target)
    assert set(tmp_path.iterdir()) == {target, fresh, *others}


def test_permissions_are_those_of_any_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nothing")
    (tmp_path / "text").write_text("é", encoding="utf-8")
    assert read_text(tmp_path / "text") == "é"
    for path, error, message in (
        (tmp_path / "fifo", OSError, "fifo is not a regular file"),
        (Path("/dev/null"), OSError, "null is not a regular file"),
        (tmp_path / "link", FileNotFoundError, "there is no file .*link"),
        (tmp_path, IsADirectoryError, "is a folder, not a file"),
    ):
        with pytest.raises(error, match=message):
            regular_file(path)


def test_a_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for write_to in (write, check_writable):
        with pytest.raises(OSError, match=r"cannot write .*fifo: it is not a regular file"):
            write_to(tmp_path / "fifo")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_writability_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    check_writable_folder(tmp_path)
    check_writable_folder(tmp_path / "new" / "newer")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for check, path, error, message in (
        (check_writable, tmp_path, IsADirectoryError, "is a folder: name a file"),
        (check_writable, tmp_path / "none" / "new", FileNotFoundError, "there is no folder .*none"),
        (check_writable, tmp_path / ("x" * 250), OSError, "cannot write x*.*: File name too long"),
        (check_writable_folder, tmp_path / "file", NotADirectoryError, "is a file: name a folder"),
    ):
        with pytest.raises(error, match=message):
            check(path)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="/proc, where nobody can write, is of Linux")
def test_a_folder_that_takes_no_files_is_known_before():
    for check, path in ((check_writable, "/proc/new"), (check_writable_folder, "/proc/new/folder")):
        with pytest.raises(OSError, match="cannot write /proc/"):
            check(path)


def test_the_format_of_a_file_is_checked():
    def check(data):
        return check_format(
            data, "letters", 2, {"format", "version", "a"}, source="f.json", expected="a list of letters"
        )

    assert check({"format": "letters", "version": 1, "b": 0}) == {"format": "letters", "version": 1, "b": 0}
    for data in (None, [], {}, {"format": "numbers", "version": 1}):
        with pytest.raises(ValueError, match=r'^f.json is not a list of letters \("format": "letters" is missing\)$'):
            check(data)
    for version in (None, True, 0, -1, 1.0, "1", [10**9] * 10**6):
        with pytest.raises(ValueError, match=r"^f.json: version must be a whole number, got .{1,100}$"):
            check({"format": "letters", "version": version})
    with pytest.warns(UserWarning, match=r"f.json has version 3, newer .* \(2\); keys that are ignored: b\\x1b, c\."):
        check({"format": "letters", "version": 3, "a": 0, "b\x1b": 0, "c": 0})
