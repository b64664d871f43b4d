"""Writes arrays with one row for each image into a file: any row at any time, from any process.

The file is a safetensors file: a header, then the arrays one after the other. Its size and the offset of each row are
known before any row is written. Until all rows are written, the file has a temporary name; then it gets its final name,
or is converted to npz or parquet.
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
"""The name of the array (N,) that says which images have been read, and their rows written."""
_DTYPES = {"float32": "F32", "float16": "F16", "bool": "BOOL"}  # {NumPy's name: safetensors' name}
_CHUNK = 2**26  # bytes that are converted to parquet at a time


@dataclass(frozen=True)
class Rows:
    """Describes the file: the names, shapes and dtype of its arrays, and the images that the rows belong to."""

    images: Sequence[str]
    """The name of each row's image."""
    shapes: Mapping[str, tuple[int, ...]]
    """{name of an array: shape of one of its rows}."""
    dtype: str
    """The dtype of all arrays but `READ`: "float32" or "float16"."""
    facts: Mapping[str, Any]
    """How the arrays were computed, for the file's metadata."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def _columns(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{name of an array: (dtype, shape of a row)}, with `READ`."""
        return {READ: ("bool", ())} | {name: (self.dtype, shape) for name, shape in self.shapes.items()}

    @property
    def header(self) -> bytes:
        """The first bytes of the file: the length of a JSON in 8 bytes, then the JSON, padded to a multiple of 8."""
        entries: dict[str, Any] = {"__metadata__": self.metadata}
        offset_ = 0
        for name, (dtype, shape) in self._columns.items():
            size = len(self) * _bytes(dtype, shape)
            entries[name] = {
                "dtype": _DTYPES[dtype],
                "shape": [len(self), *shape],
                "data_offsets": [offset_, offset_ + size],
            }
            offset_ += size
        text = json.dumps(entries, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def metadata(self) -> dict[str, str]:
        """The file's metadata: the images and the facts, each as JSON."""
        return {"images": json.dumps(self.images), "testreg": json.dumps(self.facts)}

    def offset(self, name: str) -> int:
        """The byte of the file at which an array begins."""
        entries = json.loads(self.header[8:])
        return len(self.header) + entries[name]["data_offsets"][0]

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return len(self.header) + len(self) * sum(_bytes(*column) for column in self._columns.values())

    def mapped(self, file: Path) -> dict[str, Array]:
        """The arrays in a file that is described by this, mapped into memory: they are read only when they are used."""
        return {
            name: np.memmap(file, dtype, "r", self.offset(name), (len(self), *shape))
            for name, (dtype, shape) in self._columns.items()
        }


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    """The size of an array in bytes."""
    return np.dtype(dtype).itemsize * math.prod(shape)


def unfinished(output: Path) -> Path:
    """The temporary name of `output`, as long as rows are missing."""
    return output.with_name(output.name + UNFINISHED)


def begin(rows: Rows, output: Path) -> list[int]:
    """Create the unfinished file of `output` unless it exists, and return the indices of the rows that it lacks.

    Raises:
        ValueError: an unfinished file exists, but was begun with other images, another model or other options.
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
        """Write rows of all arrays. They are marked as read only once they are on disk.

        Args:
            numbers: the indices of the B rows.
            values: {name of an array: rows (B, ...)}.
        """
        for name, array in values.items():
            for number, row in zip(numbers, array, strict=True):
                self._put(name, number, np.ascontiguousarray(row, self.rows.dtype))
        os.fsync(self.file.fileno())
        for number in numbers:
            self._put(READ, number, np.array(True))

    def _put(self, name: str, number: int, row: Array) -> None:
        """Write one row of one array."""
        self.file.seek(self.offsets[name] + number * row.nbytes)
        self.file.write(row.tobytes())

    def close(self) -> None:
        self.file.close()


def finish(rows: Rows, output: Path) -> None:
    """Turn the unfinished file of `output` into `output`, in the format that its suffix says."""
    file = unfinished(output)
    if output.suffix == ".safetensors":
        os.replace(file, output)
        return
    with replacing(output) as temporary:
        arrays = rows.mapped(file)
        if output.suffix == ".npz":
            with temporary.open("wb") as opened:
                arrays_ = {"images": np.array(rows.images), "testreg": np.array(rows.metadata["testreg"]), **arrays}
                np.savez(opened, **arrays_)  # type: ignore[arg-type]
        else:
            _write_parquet(rows, arrays, temporary)
    file.unlink()


def _write_parquet(rows: Rows, arrays: Mapping[str, Array], path: Path) -> None:
    """Write a parquet file with a row for each image. An array is a column of lists; its shape is in the metadata."""
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
    """Yield slices of rows of about `_CHUNK` bytes."""
    step = max(_CHUNK // max(sum(_bytes(rows.dtype, shape) for shape in rows.shapes.values()), 1), 1)
    for first in range(0, len(rows), step):
        yield slice(first, first + step)


def parquet_library() -> Any:
    """The modules pyarrow and pyarrow.parquet. Raises ImportError, with the fix, if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('parquet is written by pyarrow, which is missing: pip install "testreg[data]"') from error
    return pyarrow, pyarrow.parquet
