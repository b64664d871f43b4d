"""Tests run offline on one thread: nothing is downloaded, and results do not depend on the machine's cores."""

import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and timm are imported
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # whose coverage is tested too

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """The libraries made a million objects when they were imported: collections of garbage need not search those."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skips a test of an architecture that the installed release of its library does not have."""
    from coverage.registry import Absent

    try:
        yield
    except Absent as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """45 crops of 64 pixels."""
    from tiny import photograph_crops

    return photograph_crops()
