"""The tables in the docs are those of the results beside them."""

import json

from evaluation_tables import DOCS, table_of, updated


def test_the_page_shows_its_results() -> None:
    page = (DOCS / "evaluate.md").read_text(encoding="utf-8")
    assert updated(page) == page
    for file in (DOCS / "evaluations").glob("*.json"):
        assert f"<!-- table {file.stem} -->" in page, f"{file.name} is shown nowhere"
        assert json.loads(file.read_text())["format"] == "testreg-evaluation"


def test_a_table_by_hand() -> None:
    result = {
        "plain": {"a": 0.5, "b": None},
        "patched": {"a": 0.75, "b": 1.0},
        "against": None,
        "difference": {"a": [0.25, 0.125, 0.375], "b": [None, None, None]},
        "baselines": {"c": 0.1},
    }
    assert table_of(result).splitlines() == [
        "| metric | plain | patched | patched - plain, 95 % interval |",
        "| --- | ---: | ---: | ---: |",
        "| `a` | 0.5000 | 0.7500 | +0.2500 [+0.1250, +0.3750] |",
        "| `b` | not defined | 1.0000 |  |",
        "| `c`, no model | 0.1000 |  |  |",
    ]
