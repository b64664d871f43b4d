"""The trained model that comes with the package, on the photographs that come with it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg.data import image_paths, open_image
from testreg.families import find_tower
from testreg.outliers import OutlierRule, token_norms

PACKAGE = Path(testreg.__file__).parent
FOLDER = PACKAGE / "demo_model"
SIZES = (128, 224)


@pytest.fixture(scope="module")
def neurons() -> dict[int, list[int]]:
    planted = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["testreg"]
    return {planted["block"]: planted["units"]}


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()


@pytest.fixture(scope="module", params=SIZES)
def photographs(request: pytest.FixtureRequest) -> Tensor:
    images = [tv.pil_to_tensor(open_image(path)) for path in image_paths(PACKAGE / "photographs")]
    size = request.param
    images = [tv.center_crop(tv.resize(image, size, antialias=True), [size, size]) for image in images]
    return torch.stack(images).float() / 127.5 - 1


def patch_norms(model: nn.Module, images: Tensor) -> Tensor:
    """(L, B, N)"""
    tower = find_tower(model)
    return token_norms(tower, images)[:, :, tower.num_prefix :]


def test_it_is_small(model: nn.Module) -> None:
    assert sum(weight.numel() for weight in model.parameters()) < 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000


def test_every_photograph_has_outliers_from_the_planted_block_to_the_last(
    model: nn.Module, neurons: dict[int, list[int]], photographs: Tensor
) -> None:
    norms = patch_norms(model, photographs)[min(neurons) :]
    assert ((norms.amax(2) / norms.median(2).values).mean(1) > 8).all()
    outlier = norms > OutlierRule().limit(norms)
    assert outlier.any(2).all()
    fraction = outlier.float().mean((1, 2))
    assert (fraction > 0.005).all()
    assert (fraction < 0.05).all()


def test_patching_removes_them(model: nn.Module, neurons: dict[int, list[int]], photographs: Tensor) -> None:
    before = patch_norms(model, photographs)[min(neurons) :]
    testreg.patch(model, neurons)
    after = patch_norms(model, photographs)[min(neurons) :]
    limit = OutlierRule().limit(before)
    assert ((after > limit).sum((1, 2)) <= 0.05 * (before > limit).sum((1, 2))).all()


def test_calibration_finds_the_planted_neurons(
    model: nn.Module, neurons: dict[int, list[int]], photographs: Tensor
) -> None:
    (units,) = neurons.values()
    found = testreg.calibrate(model, photographs, top_k=len(units), progress=False)
    assert {layer: sorted(units) for layer, units in found.by_layer().items()} == neurons


def test_diagnosis(model: nn.Module, neurons: dict[int, list[int]], photographs: Tensor) -> None:
    diagnosis = testreg.diagnose(model, photographs, progress=False)
    assert diagnosis.kind == "movable"
    assert diagnosis.outliers is not None
    assert diagnosis.outliers.origin == f"block {min(neurons)} (MLP)"
    assert diagnosis.outliers.fade_block is None
