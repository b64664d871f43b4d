"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import testreg
from testreg.families import FAMILIES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_family_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.partition("### A family of your own")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    known, names = list(FAMILIES), dict[str, Any]()
    try:
        exec(code[1], names)
    finally:
        FAMILIES[:] = known
    assert testreg.is_patched(names["model"])
    assert names["features"].shape == (2, 197, 64)
