"""The examples in the docstrings of public functions and classes run, and give what they say."""

import copy
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from planting import plant
from tiny import TIMM, TIMM_RECORDS, photograph_crops
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg.families import FAMILIES

# An older timm does not record what `save` needs to build a timm model again.
WITHOUT = set() if TIMM_RECORDS else {"load", "save"}
WITHOUT |= {name for name in testreg.__all__ if name.endswith(("Error", "Warning"))}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with photographs in `photos/`, and what an example has: a tiny planted `model`, its register `neurons`
    and `images` for it. docs/api.md says so too."""
    folder = tmp_path_factory.mktemp("examples")
    images = photograph_crops()
    (folder / "photos").mkdir()
    for i, image in enumerate(torch.cat([images, images.flip(-1)])):
        tv.to_pil_image((image + 1) / 2).save(folder / "photos" / f"{i:02}.png")
    overlay = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 64, 64), "crop_pct": 1.0}
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_clip_224", num_classes=0, pretrained_cfg_overlay=overlay, **TIMM).eval()
    planted = plant(model, images, num_neurons=4).neurons
    values = {"model": model, "images": images, "neurons": planted, "testreg": testreg, "torch": torch}
    return folder, {**values, "planted": planted}


@pytest.mark.parametrize("name", sorted(set(testreg.__all__) - WITHOUT))
def test_the_example_runs(
    name: str, scene: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, values = scene
    monkeypatch.chdir(folder)
    text = inspect.getdoc(getattr(testreg, name)) or ""
    examples = doctest.DocTestParser().get_doctest(
        text, {**values, "model": copy.deepcopy(values["model"])}, name, None, 0
    )
    assert examples.examples, f"testreg.{name} has no example"
    known = list(FAMILIES)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples)
    FAMILIES[:] = known  # without the one of `add_family`
    assert result.failed == 0, capsys.readouterr().out
