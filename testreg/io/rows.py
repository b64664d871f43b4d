"""Arrays with a row for each image in one file, of which any row can be written at any time, by any process.

The file is in the format of safetensors, which is a header and the arrays one after the other: so its size, and the
place of each row, are known before the first is written. It has a name of its own until all rows are there; npz and
parquet files are made of it then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from testreg.files import UNFINISHED, replacing

Array = npt.NDArray[Any]

FORMATS = (".safetensors", ".npz", ".parquet")
READ = "read"
"""The array (N,) that says of which images the rows are there."""
_DTYPES = {"float32": "F32", "float16": "F16", "bool": "BOOL"}  # names of safetensors
_CHUNK = 2**26  # bytes of the rows that are converted at once


@dataclass(frozen=True)
class Rows:
    """The arrays: their shapes without the rows and their dtypes, by name; and what the rows are of."""

    images: Sequence[str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    """"float32" or "float16", of all arrays but `READ`."""
    facts: Mapping[str, Any]
    """How they were made, for the file's metadata."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def _columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {READ: ("bool", ())} | {name: (self.dtype, shape) for name, shape in self.shapes.items()}

    @property
    def header(self) -> bytes:
        """What the file begins with: the length of its JSON in 8 bytes, and the JSON, filled up to 8 bytes."""
        described: dict[str, Any] = {"__metadata__": self.metadata}
        at = 0
        for name, (dtype, shape) in self._columns.items():
            size = len(self) * _bytes(dtype, shape)
            described[name] = {"dtype": _DTYPES[dtype], "shape": [len(self), *shape], "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(described, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def metadata(self) -> dict[str, str]:
        return {"images": json.dumps(self.images), "testreg": json.dumps(self.facts)}

    def offset(self, name: str) -> int:
        """Where in the file an array begins."""
        described = json.loads(self.header[8:])
        return len(self.header) + described[name]["data_offsets"][0]

    @property
    def size(self) -> int:
        return len(self.header) + len(self) * sum(_bytes(*column) for column in self._columns.values())

    def mapped(self, file: Path) -> dict[str, Array]:
        """The arrays of a file that has them, not read before they are looked at."""
        return {
            name: np.memmap(file, dtype, "r", self.offset(name), (len(self), *shape))
            for name, (dtype, shape) in self._columns.items()
        }


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def unfinished(output: Path) -> Path:
    """The file that is written until all rows are there."""
    return output.with_name(output.name + UNFINISHED)


def begin(rows: Rows, output: Path) -> list[int]:
    """Make the unfinished file of `output`, or go on with the one that is there; returns the rows that it lacks.

    Raises:
        ValueError: the file that is there was begun with other images, another model or other options.
    """
    file, header = unfinished(output), rows.header
    if not file.exists():
        with replacing(file) as temporary, temporary.open("wb") as made:
            made.write(header)
            made.truncate(rows.size)
        return list(range(len(rows)))
    with file.open("rb") as opened:
        if opened.read(len(header)) != header or file.stat().st_size != rows.size:
            raise ValueError(
                f"{file} was begun with other images, another model or other options: delete it to begin anew, or "
                "name another output"
            )
    return np.flatnonzero(~rows.mapped(file)[READ]).tolist()


class Writer:
    """Writes rows into the unfinished file of `output`."""

    def __init__(self, rows: Rows, output: Path) -> None:
        self.rows = rows
        self.file = unfinished(output).open("r+b", buffering=0)
        self.offsets = {name: rows.offset(name) for name in (READ, *rows.shapes)}

    def write(self, numbers: Sequence[int], values: Mapping[str, Array]) -> None:
        """Write the rows of these numbers, arrays (B, ...) by name. They count as written once the disk has them."""
        for name, array in values.items():
            for number, row in zip(numbers, array, strict=True):
                self._put(name, number, np.ascontiguousarray(row, self.rows.dtype))
        os.fsync(self.file.fileno())
        for number in numbers:
            self._put(READ, number, np.array(True))

    def _put(self, name: str, number: int, row: Array) -> None:
        self.file.seek(self.offsets[name] + number * row.nbytes)
        self.file.write(row.tobytes())

    def close(self) -> None:
        self.file.close()


def finish(rows: Rows, output: Path) -> None:
    """Make `output` of its unfinished file, in the format that its name says."""
    file = unfinished(output)
    if output.suffix == ".safetensors":
        os.replace(file, output)
        return
    with replacing(output) as temporary:
        arrays = rows.mapped(file)
        if output.suffix == ".npz":
            with temporary.open("wb") as opened:
                named = {"images": np.array(rows.images), "testreg": np.array(rows.metadata["testreg"]), **arrays}
                np.savez(opened, **named)  # type: ignore[arg-type]
        else:
            _write_parquet(rows, arrays, temporary)
    file.unlink()


def _write_parquet(rows: Rows, arrays: Mapping[str, Array], path: Path) -> None:
    """A line for each image: each array as a list of fixed size, whose shape is in the field's metadata."""
    pa, parquet = parquet_library()

    def listed(array: Array) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), math.prod(array.shape[1:]))

    fields = [pa.field("image", pa.string()), pa.field(READ, pa.bool_())]
    for name, shape in rows.shapes.items():
        kind = pa.list_(pa.from_numpy_dtype(np.dtype(rows.dtype)), math.prod(shape))
        fields.append(pa.field(name, kind, metadata={"shape": json.dumps(shape)}))
    schema = pa.schema(fields, metadata={"testreg": rows.metadata["testreg"]})
    with parquet.ParquetWriter(path, schema) as writer:
        for part in _parts(rows):
            columns = [pa.array(rows.images[part], pa.string()), pa.array(arrays[READ][part])]
            columns += [listed(arrays[name][part]) for name in rows.shapes]
            writer.write_table(pa.table(columns, schema))


def _parts(rows: Rows) -> Iterator[slice]:
    step = max(_CHUNK // max(sum(_bytes(rows.dtype, shape) for shape in rows.shapes.values()), 1), 1)
    for first in range(0, len(rows), step):
        yield slice(first, first + step)


def parquet_library() -> Any:
    """pyarrow and its parquet. Raises ImportError, with the fix, if it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('parquet is written by pyarrow, which is missing: pip install "testreg[data]"') from error
    return pyarrow, pyarrow.parquet
