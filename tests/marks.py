"""Which of many alike cases run by default; the others are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases of a parametrisation, all but `quick` marked slow; a tuple holds the values of several names."""
    cases = list(cases)
    assert set(quick) <= set(cases)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in quick else pytest.mark.slow for case in cases]
    return [pytest.param(*each, marks=mark) for each, mark in zip(values, marks, strict=True)]
