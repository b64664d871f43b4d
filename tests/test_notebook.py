"""testreg in a Jupyter notebook, which runs headless."""

from typing import Any

import pytest

pytestmark = pytest.mark.slow

CELLS = (
    "import testreg\nfrom testreg.demo.run import photographs",
    "model, images = testreg.demo_model(64), photographs(64)",
    "found = testreg.diagnose(model, images)\nfound",
    "found.plot()",
    'testreg.RegisterNeurons.load("demo")',
    'testreg.RegisterNeurons.load("demo").plot()',
    "testreg.bundled()",
)


@pytest.fixture(scope="module")
def outputs() -> list[list[Any]]:
    """The outputs of each cell."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from nbformat import v4

    notebook = v4.new_notebook(cells=[v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def shown(outputs: list[Any], kind: str) -> list[str]:
    """What a cell shows in one form, such as text/html."""
    return [each["data"][kind] for each in outputs if kind in each.get("data", {})]


def test_progress_shows(outputs: list[list[Any]]) -> None:
    streams = "".join(each["text"] for each in outputs[2] if each["output_type"] == "stream")
    assert "diagnosing: 100%" in streams or shown(outputs[2], "application/vnd.jupyter.widget-view+json")
    assert "testreg: diagnosing" not in streams  # which is for where no bar can move


def test_what_was_found_shows_itself(outputs: list[list[Any]]) -> None:
    (diagnosis,) = shown(outputs[2], "text/html")
    assert "<strong>Diagnosis: outliers from block 3 (MLP), " in diagnosis
    (neurons,) = shown(outputs[4], "text/html")
    assert "<strong>Register neurons: 6 in block 3, of 100 listed</strong>" in neurons
    (lists,) = shown(outputs[6], "text/html")
    assert "bundled lists of register neurons" in lists


@pytest.mark.parametrize("cell", [3, 5])
def test_plots_show_once(cell: int, outputs: list[list[Any]]) -> None:
    assert len(shown(outputs[cell], "image/png")) == 1
