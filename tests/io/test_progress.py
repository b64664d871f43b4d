"""Progress: a bar that ends complete where it can move, a line where it cannot."""

import io
import re
from contextlib import redirect_stderr

import pytest

from testreg.io.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def line(self) -> str:
        """The line as it stands at the end."""
        return self.getvalue().rpartition("\r")[2]


def test_a_bar_ends_where_its_phase_ends() -> None:
    with redirect_stderr(Terminal()) as terminal, progress_bar("choosing", 64, True, unit="set") as bar:
        bar.update(4)
        bar.update(5)
    assert "choosing: 100%" in terminal.line
    assert "9/9" in terminal.line


def test_a_bar_of_unknown_length_ends_with_one() -> None:
    with redirect_stderr(Terminal()) as terminal, progress_bar("ranking", None, True) as bar:
        bar.update(7)
    assert "7/7" in terminal.line


def test_a_bar_that_an_error_ends_stays_incomplete() -> None:
    def fail() -> None:
        with progress_bar("choosing", 64, True) as bar:
            bar.update(9)
            bar.update(1 // 0)

    with redirect_stderr(Terminal()) as terminal, pytest.raises(ZeroDivisionError):
        fail()
    assert "9/64" in terminal.line


def test_without_a_terminal_each_phase_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for what, total, unit in (("ranking", 200, "image"), ("choosing", 64, "set"), ("reading", None, "image")):
        with progress_bar(what, total, True, unit) as bar:
            bar.update(3)
    said = capsys.readouterr()
    lines = ["testreg: ranking, up to 200 images", "testreg: choosing, up to 64 sets", "testreg: reading"]
    assert said.err.splitlines() == lines
    assert said.out == ""


def test_without_a_terminal_long_phases_say_how_far_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testreg.io.progress.PAUSE", 0.0)
    with progress_bar("choosing", 64, True, "set") as bar:
        bar.update(16)
    with progress_bar("reading", None, True) as bar:
        bar.update(3)
    first, second, third, last = capsys.readouterr().err.splitlines()
    assert first == "testreg: choosing, up to 64 sets"
    assert re.fullmatch(r"testreg: choosing, 16 sets of at most 64 in 00:00, .* left at most", second)
    assert third == "testreg: reading"
    assert last == "testreg: reading, 3 images in 00:00"


@pytest.mark.parametrize(("shown", "rank"), [(False, 0), (True, 1)])
def test_nothing_is_shown_unasked_or_by_another_process(
    shown: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testreg.io.progress.rank", lambda: rank)
    with redirect_stderr(Terminal()) as terminal, progress_bar("ranking", 200, shown) as bar:
        bar.update(3)
    assert terminal.getvalue() == ""
