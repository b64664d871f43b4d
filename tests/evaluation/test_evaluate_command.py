"""testreg evaluate: a command for each task, its result in words and as JSON, and its errors."""

import json
from pathlib import Path

import pytest
from scenes import masks

from testreg.cli import main
from testreg.evaluation.names import TASKS
from testreg.neurons import RegisterNeurons


def test_a_task_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = masks(tmp_path / "data", 2)
    neurons = tmp_path / "neurons.json"
    RegisterNeurons.from_blocks({3: [47, 55]}).save(neurons)
    command = ["evaluate", "attention-seg", "demo", "--data", str(folder), "--size", "64", "--resamples", "5", "-q"]
    written = ["--json", str(tmp_path / "result.json"), "--figures", str(tmp_path / "figures")]
    assert main([*command, "--neurons", str(neurons), *written]) == 0
    output = capsys.readouterr().out
    assert "patched - plain" in output
    assert str(tmp_path / "figures" / "attention-seg-attention.png") in output
    data = json.loads((tmp_path / "result.json").read_text())
    assert (data["task"], data["model"], data["data"]) == ("attention-seg", "demo", str(folder))
    assert set(data["difference"]) == {"miou", "pixel_accuracy", "map"}
    assert main([*command, "--neurons", "none", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["patched"] is None


def test_bad_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "lost", "demo", "--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("testreg: error: no data folder at")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_help(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", task, "--help"])
    assert "--data" in capsys.readouterr().out


def test_help_is_broken_where_the_terminal_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    with pytest.raises(SystemExit):
        main(["evaluate", "depth", "--help"])
    output = capsys.readouterr().out
    paragraph = output[output.index("A linear layer") : output.index("Metrics are computed")]
    assert all(len(line.strip()) > 50 for line in paragraph.splitlines()[:-1])


def test_an_unknown_task_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "chess", "demo"])
    assert ended.value.code == 2
    assert "chess" in capsys.readouterr().err
