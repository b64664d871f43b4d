"""The libraries that evaluation needs beyond those of the package."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str) -> Any:
    """A module of the extra `evaluate`, e.g. "sklearn.metrics".

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'evaluation needs {name.partition(".")[0]}, which is missing: pip install "testreg[evaluate]"'
        ) from error
