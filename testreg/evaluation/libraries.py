"""Imports the optional libraries that evaluation needs: those of the extra `testreg[evaluate]`."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str) -> Any:
    """Import and return a module of an optional library, e.g. "sklearn.metrics".

    Raises:
        ImportError: the library is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'evaluation needs {name.partition(".")[0]}, which is missing: pip install "testreg[evaluate]"'
        ) from error
