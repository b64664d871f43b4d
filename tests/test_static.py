"""Static registers and their file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from testreg import StaticRegisters
from testreg.static import companion, resolve_static

STATIC = StaticRegisters(
    torch.arange(8.0).view(2, 1, 4), {1: [3, 5]}, "bias", {"name": "m", "fingerprint": "ab"}, {"number": 7}
)


def test_a_file_holds_everything(tmp_path: Path) -> None:
    STATIC.save(tmp_path / "states.safetensors")
    loaded = StaticRegisters.load(tmp_path / "states.safetensors")
    assert loaded.states.equal(STATIC.states)
    for name in ("neurons", "form", "model", "images"):
        assert getattr(loaded, name) == getattr(STATIC, name)
    assert loaded.num_registers == 1


def test_a_neuron_json_has_a_companion(tmp_path: Path) -> None:
    assert companion("a/neurons.json") == Path("a/neurons.static.safetensors")
    assert companion("a/b.safetensors") == Path("a/b.safetensors")
    (tmp_path / "neurons.json").write_text("{}")
    STATIC.save(tmp_path / "neurons.json")
    assert sorted(os.listdir(tmp_path)) == ["neurons.json", "neurons.static.safetensors"]
    assert (tmp_path / "neurons.json").read_text() == "{}"
    found = resolve_static(str(tmp_path / "neurons.json"))
    assert found is not None
    assert found.states.equal(STATIC.states)


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    STATIC.save(tmp_path / "s.safetensors")
    before = (tmp_path / "s.safetensors").read_bytes()

    def fails(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("testreg.static.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        STATIC.save(tmp_path / "s.safetensors")
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert (tmp_path / "s.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("states", "form", "message"),
    [
        (torch.zeros(2, 4), "token", r"\(L, R, C\), got torch.float32 \(2, 4\)"),
        (torch.zeros(2, 1, 4, dtype=torch.long), "token", "torch.int64"),
        (torch.full((2, 1, 4), torch.nan), "token", "not all finite"),
        (torch.zeros(2, 1, 4), "token or bias", "form must be"),
    ],
)
def test_bad_states_are_refused(states: torch.Tensor, form: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StaticRegisters(states, {}, form)


GOOD = {"format": "testreg-static", "version": 1, "form": "token", "neurons": {"1": [3]}, "model": {}, "images": {}}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is not a file of static registers"),
        ({**GOOD, "format": "other"}, "is not a file of static registers"),
        ({key: value for key, value in GOOD.items() if key != "form"}, "no valid file of static registers"),
        ({**GOOD, "neurons": [1]}, "no valid file of static registers"),
        ({**GOOD, "form": "both"}, "form must be"),
        ({**GOOD, "neurons": {"x": [1]}}, "x"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, metadata: Any, message: str) -> None:
    path = tmp_path / "s.safetensors"
    save_file(
        {"states": torch.zeros(2, 1, 4)},
        path,
        None if metadata is None else {"testreg-static": json.dumps(metadata)},
    )
    with pytest.raises(ValueError, match=message):
        StaticRegisters.load(path)


def test_damaged_and_missing_files_and_other_things(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged or truncated"):
        StaticRegisters.load(tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        StaticRegisters.load(tmp_path / "none.json")
    with pytest.raises(TypeError, match="got int"):
        resolve_static(3)  # type: ignore[arg-type]
