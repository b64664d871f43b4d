"""Register neurons and patched checkpoints on the Hub: huggingface_hub against a stand-in of its HTTP API."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub, serving
from huggingface_hub import ModelCard, constants

import testreg
from testreg import RegisterNeurons
from testreg.cli import main
from testreg.hub.repository import is_repository
from testreg.records.calibration import Calibration, Effect, Verification

NEURONS = RegisterNeurons(
    ((3, 47, 2.5), (3, 55, 1.0), (2, 7, 0.5)),
    top_k=2,
    model={"name": "timm:vit_x", "names": ["timm:vit_x", "hf:org/vit-x"], "depth": 8},
    calibration=Calibration(
        verdict="outliers from block 3 (MLP)",
        verified_at=(Verification((56, 64), "float32", (7, 8), 40, 0.046, Effect(2, 0.003, 5, 0.0125, 0.01, 0.02)),),
    ),
    provenance={"note": "<script>found</script> by hand"},
    verified=True,
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub that huggingface_hub asks, logged in as its owner, with an empty cache."""
    if int(huggingface_hub.__version__.split(".")[0]) < 1:
        pytest.skip("the stand-in is made for huggingface_hub 1: older ones copy its address where they are imported")
    with serving() as hub:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_list_is_pushed_and_comes_back(hub: Hub) -> None:
    address = NEURONS.push_to_hub("org/neurons")
    assert address.startswith(f"{hub.address}/org/neurons/commit/")
    assert sorted(hub.files["org/neurons"]) == ["README.md", "neurons.json"]
    assert hub.commits == ["Register neurons of timm:vit_x"]
    found = RegisterNeurons.from_pretrained("org/neurons")
    assert found == NEURONS
    assert found.source == "hf:org/neurons"
    assert RegisterNeurons.load("hf:org/neurons") == NEURONS
    assert RegisterNeurons.from_pretrained("org/neurons", revision="main") == NEURONS


def test_a_model_is_patched_by_a_list_of_the_hub(hub: Hub) -> None:
    NEURONS.push_to_hub("org/neurons", private=True)
    assert hub.private == {"org/neurons"}
    demo, by_hand = testreg.demo_model(32), testreg.demo_model(32)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = testreg.patch(by_hand, {3: [47, 55]})(images)
        assert torch.equal(testreg.patch(demo, "hf:org/neurons")(images), expected)


def test_lists_of_the_hub_warn_as_files_do_if_they_are_not_verified(hub: Hub) -> None:
    RegisterNeurons(((3, 47, None),)).push_to_hub("org/neurons")
    with pytest.warns(testreg.UnverifiedNeuronsWarning, match="hf:org/neurons"):
        testreg.patch(testreg.demo_model(32), "hf:org/neurons")


def test_a_list_of_the_hub_is_checked(hub: Hub) -> None:
    hub.files["org/bad"] = {"neurons.json": b'{"format": "testreg-neurons", "version": 2, "neurons": [[1, -2, null]]}'}
    with pytest.raises(ValueError, match=r"hf:org/bad: .*0-based"):
        RegisterNeurons.load("hf:org/bad")
    hub.files["org/bad"] = {"neurons.json": b"<html>"}
    with pytest.raises(ValueError, match="hf:org/bad is not valid JSON"):
        RegisterNeurons.load("hf:org/bad")


def test_the_card(hub: Hub) -> None:
    NEURONS.push_to_hub("org/neurons")
    text = hub.files["org/neurons"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.base_model == "timm/vit_x"
    assert card.data.library_name == "testreg"
    assert 'testreg.patch(model, "hf:org/neurons")' in text
    assert "| 3 | 47, 55 |" in text
    assert "| 56 x 64 | 40 | 4.6% | 0.3% | 1.2% |" in text
    assert "<script>" not in text
    assert "not verified" not in text
    hub.files["org/neurons"]["README.md"] = b"My own words"
    NEURONS.push_to_hub("org/neurons")
    assert hub.files["org/neurons"]["README.md"] == b"My own words"


@pytest.mark.parametrize("name", testreg.bundled())
def test_every_bundled_list_has_a_card(name: str) -> None:
    neurons = testreg.bundled()[name]
    text = neurons.model_card("org/neurons")
    assert ("**not verified**" in text) is not neurons.verified
    assert all(f"| {block} | " in text for block in neurons.by_block())


def test_a_checkpoint_is_pushed_and_loads(hub: Hub, tmp_path: Path) -> None:
    model, images = testreg.patch(testreg.demo_model(32), NEURONS), torch.rand(2, 3, 32, 32)
    hub.files["org/vit"] = {"model-00001-of-00002.safetensors": b"older", "notes.txt": b"kept"}
    (tmp_path / "out").mkdir()
    testreg.save(model, tmp_path / "out", push_to_hub="org/vit")
    (tmp_path / "out" / "photo.jpg").write_bytes(b"not testreg's")
    testreg.save(model, tmp_path / "out", push_to_hub="org/vit")
    names = ["README.md", "config.json", "model.safetensors", "notes.txt", "testreg.json"]
    assert sorted(hub.files["org/vit"]) == names
    assert 'testreg.load("org/vit")' in hub.files["org/vit"]["README.md"].decode()
    with torch.no_grad():
        for name in ("org/vit", "hf:org/vit"):
            assert torch.equal(testreg.load(name)(images), model(images))


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's tries
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")


CASES: dict[str, Any] = {
    "offline": (
        lambda hub, patch: patch.setattr(constants, "HF_HUB_OFFLINE", True),
        ConnectionError,
        "cannot be reached.*HF_HUB_OFFLINE",
    ),
    "no network": (unreachable, ConnectionError, "cannot be reached. Check the network"),
    "no such repository": (lambda hub, patch: hub.files.clear(), FileNotFoundError, "no such repository.*private"),
    "private": (
        lambda hub, patch: (hub.private.add("org/x"), patch.delenv("HF_TOKEN")),
        FileNotFoundError,
        "or it is private. Check the name, and log in",
    ),
    "gated": (
        lambda hub, patch: (hub.gated.add("org/x"), patch.delenv("HF_TOKEN")),
        PermissionError,
        "is gated. Ask for access",
    ),
    "no such file": (lambda hub, patch: hub.files["org/x"].clear(), FileNotFoundError, "has no such file"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_fetched_is_one_error(case: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, kind, message = CASES[case]
    hub.files["org/x"] = {"neurons.json": b"{}"}
    prepare(hub, monkeypatch)
    with pytest.raises(kind, match=f"no neurons.json could be fetched from org/x: .*{message}") as caught:
        RegisterNeurons.load("hf:org/x")
    assert "\n" not in str(caught.value)


def test_no_such_revision(hub: Hub) -> None:
    NEURONS.push_to_hub("org/x")
    with pytest.raises(FileNotFoundError, match="no such revision"):
        RegisterNeurons.from_pretrained("org/x", revision="v2")


def test_what_was_fetched_is_there_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    NEURONS.push_to_hub("org/x")
    RegisterNeurons.from_pretrained("org/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert RegisterNeurons.from_pretrained("org/x") == NEURONS


@pytest.mark.parametrize("name", ["neurons", "a/b/c", "org/", "../x", "org/na me", ""])
def test_names_that_cannot_be_repositories(name: str, hub: Hub, tmp_path: Path) -> None:
    assert not is_repository(name)
    with pytest.raises(ValueError, match="is no repository of the Hugging Face Hub: write ORGANISATION/NAME"):
        RegisterNeurons.load(f"hf:{name}")
    with pytest.raises(ValueError, match="write ORGANISATION/NAME"):
        NEURONS.push_to_hub(name)
    with pytest.raises(ValueError, match="write ORGANISATION/NAME"):
        testreg.save(testreg.patch(testreg.demo_model(32), NEURONS), tmp_path / "out", push_to_hub=name)
    assert not (tmp_path / "out").exists()


def test_a_path_that_could_be_a_repository_says_so(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"no neuron JSON at org/x \(of a repository on the Hub: hf:org/x\)"):
        RegisterNeurons.load("org/x")


def test_nothing_is_pushed_or_written_without_a_login(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="cannot push to org/x: log in"):
        NEURONS.push_to_hub("org/x")
    with pytest.raises(PermissionError, match="cannot push to org/x: log in"):
        testreg.save(testreg.patch(testreg.demo_model(32), NEURONS), tmp_path / "out", push_to_hub="org/x")
    assert not hub.files
    assert not (tmp_path / "out").exists()


def test_a_refused_push_is_one_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.read_only = True
    with pytest.raises(PermissionError, match=r"cannot push to org/x: the Hub refuses \(403\)"):
        NEURONS.push_to_hub("org/x")
    model = testreg.patch(testreg.demo_model(32), NEURONS)
    with pytest.raises(PermissionError, match="cannot push to org/x"):
        testreg.save(model, tmp_path / "out", push_to_hub="org/x")
    assert testreg.is_patched(testreg.load(tmp_path / "out")), "what was saved stays"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="cannot push to org/x: "):
        NEURONS.push_to_hub("org/x")


def test_the_command_line_takes_lists_of_the_hub(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    NEURONS.push_to_hub("org/neurons")
    output = str(tmp_path / "out")
    assert main(["apply", "demo", "--neurons", "hf:org/other", "-o", output]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "org/other: there is no such repository on the Hugging Face Hub" in error
    assert not (tmp_path / "out").exists()
    assert main(["apply", "demo", "--neurons", "hf:org/neurons", "-o", output]) == 0
    assert json.loads((tmp_path / "out" / "testreg.json").read_text())["neurons"] == NEURONS.truncate().to_json()
