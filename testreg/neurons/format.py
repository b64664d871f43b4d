"""The neuron JSON, which holds a list of register neurons: reading, checking and writing it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from testreg.files import check_format, plain, read_text
from testreg.records.record import INDEX, TEXT

FORMAT = "testreg-neurons"
VERSION = 2  # of the JSON that is written
_OLDEST = 2  # the oldest version that can be read
_KEYS = {
    *("format", "version", "model", "calibration", "provenance", "verified"),
    *("top_k", "num_registers", "start", "neurons"),
}
_MODEL = {  # the entries of "model" that testreg uses
    "name": TEXT,
    "names": TEXT.listed(),
    "default_for": TEXT.listed(),
    "depth": INDEX,
    "mlp_width": INDEX,
    "activation": TEXT,
    "fingerprint": TEXT,
}


def read_json(path: str | os.PathLike[str], source: str) -> Any:
    """Read a file, and parse its JSON.

    Args:
        source: what the file is called in errors.

    Raises:
        OSError: there is no such file, or it is not a regular file.
        ValueError: the file is not valid JSON, or has a number that is not finite or has too many digits.
    """
    try:
        return json.loads(
            read_text(path), parse_constant=_reject_constant, parse_int=_parse_int, parse_float=_parse_float
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not valid JSON (truncated?): {error}") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply for a neuron JSON") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def checked(data: object, source: str) -> dict[str, Any]:
    """Check the format, the version and the types of entries of a parsed neuron JSON, and return it.

    Args:
        source: what the file is called in errors.

    Raises:
        ValueError: one of these is wrong.
    """
    data = check_format(data, FORMAT, VERSION, _KEYS, source=source, expected="a register neuron JSON")
    if data["version"] < _OLDEST:
        raise ValueError(f"{source} was made by an older testreg (version {data['version']}): calibrate again")
    rows = data.get("neurons")
    if not isinstance(rows, list) or any(not isinstance(row, list) or len(row) != 3 for row in rows):
        raise ValueError(f'{source}: "neurons" must be a list of [block, unit, score or null]')
    for key in ("model", "calibration", "provenance"):
        if not isinstance(data.get(key, {}), dict):
            raise ValueError(f'{source}: "{key}" must be an object')
    if not isinstance(data.get("verified", False), bool):
        raise ValueError(f'{source}: "verified" must be true or false')
    return data


def check_model(model: Mapping[str, Any]) -> None:
    """Raise ValueError if an entry of a list's `model` has the wrong type; entries that testreg does not use may have
    any type."""
    for key, kind in _MODEL.items():
        if key in model:
            kind.checked(model[key], key, "the model")


def text_of(data: Mapping[str, Any], neurons: Iterable[object]) -> str:
    """The text of the JSON object `data`, with one neuron on each line, so that lists are easy to read and compare."""
    head = json.dumps({**data, "neurons": []}, indent=1, allow_nan=False).removesuffix("[]\n}")
    rows = ",\n".join("  " + json.dumps(neuron) for neuron in neurons)
    return f"{head}[\n{rows}\n ]\n}}\n"


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _parse_int(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError(f"{plain(digits, 20)} is too large a number")
    return int(digits)


def _parse_float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{plain(digits, 20)} is not a finite number")
    return value
