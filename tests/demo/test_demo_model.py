"""The trained model that comes with the package, on the photographs that come with it."""

import pytest
import timm
from marks import slow_except
from torch import Tensor, nn

import testreg
from testreg.calibration.split import MIN_VERIFYING, NUM_CHOOSING
from testreg.demo import run as demo
from testreg.demo.run import planted_neurons
from testreg.families import find_tower
from testreg.io.loading import DEMO
from testreg.measure.outliers import OutlierRule, token_norms

SIZES = (96, 128)


@pytest.fixture(scope="module")
def neurons() -> dict[int, list[int]]:
    return planted_neurons()


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model(f"local-dir:{DEMO}", pretrained=True).eval()


@pytest.fixture(scope="module", params=slow_except(SIZES, 96))
def photographs(request: pytest.FixtureRequest) -> Tensor:
    return demo.photographs(request.param)


def patch_norms(model: nn.Module, images: Tensor) -> Tensor:
    """(L, B, N)"""
    tower = find_tower(model)
    return token_norms(tower, images)[:, :, tower.num_prefix :]


def test_it_is_small(model: nn.Module) -> None:
    assert sum(weight.numel() for weight in model.parameters()) < 2_000_000
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 4_000_000


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


def test_the_planted_neurons_write_most(model: nn.Module, neurons: dict[int, list[int]], photographs: Tensor) -> None:
    (units,) = neurons.values()
    found = testreg.calibrate(model, photographs, score="contribution", top_k=len(units), progress=False)
    assert {block: sorted(units) for block, units in found.by_block().items()} == neurons


def test_the_demo_has_images_enough_to_verify_what_it_finds() -> None:
    images = demo.crops(demo.photographs(2 * demo.CROP_SIZE), demo.CROP_SIZE, demo.STRIDE)
    assert len(images) // 2 >= NUM_CHOOSING + MIN_VERIFYING


def test_diagnosis(model: nn.Module, neurons: dict[int, list[int]], photographs: Tensor) -> None:
    diagnosis = testreg.diagnose(model, photographs, progress=False)
    assert diagnosis.kind == "movable"
    assert diagnosis.outliers is not None
    assert diagnosis.outliers.origin == f"block {min(neurons)} (MLP)"
    assert diagnosis.outliers.fade_block is None
