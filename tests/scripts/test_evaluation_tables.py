"""The tables in the docs are those of the results beside them."""

import json

from evaluation_tables import DOCS, PAGES, table_of, with_new_tables
from restoration import tables


def test_the_pages_show_their_results() -> None:
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in PAGES]
    for page in pages:
        assert with_new_tables(page) == page
    for file in (DOCS / "evaluations").glob("*.json"):
        assert any(f"<!-- table {file.stem} " in page for page in pages), f"{file.name} is shown nowhere"
        assert json.loads(file.read_text())["format"].startswith("testreg-")


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


def test_plain_and_patched_of_several_tasks() -> None:
    result = {
        "plain": {"a": 0.5},
        "patched": {"a": 0.75},
        "difference": {"a": [0.25, 0.125, 0.375]},
        "protocol": {"images": 3, "neurons": {}, "size": None},
        "cpu_seconds": 90,
    }
    assert tables.of_plain_and_patched({"tasks": {"lost": result}}).splitlines()[2] == (
        "| lost | `a` | 0.5000 | 0.7500 | +0.2500 [+0.1250, +0.3750] |"
    )
    assert tables.of_samples({"tasks": {"lost": result}}).splitlines()[2] == "| lost | images 3 | 1.5 |"
