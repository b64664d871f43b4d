"""The features of many images, written to one file: in one pass, by one process or several, resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from testreg.families import Tower, find_tower
from testreg.families.kernels import attention_kernel
from testreg.io.images import Images, ImageStream
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.processes import all_gather, rank, world_size
from testreg.io.progress import progress_bar
from testreg.io.rows import FORMATS, Rows, Writer, begin, finish, parquet_library
from testreg.io.sources import images_in, is_indexed, named_source, undecoded
from testreg.measure.attention import (
    UNSEEN,
    Recorder,
    attention_to_patches,
    default_query,
    pooling,
    queries_of,
    recorded_attention,
)
from testreg.measure.hooks import recorded_tokens
from testreg.neurons import describe_model
from testreg.patching.state import find_patch
from testreg.register import registers

What = Literal["patches", "cls", "attention", "registers"]


@dataclass(frozen=True)
class Extracted:
    """What `extract` has written."""

    path: Path
    arrays: dict[str, tuple[int, ...]]
    """The shape of each array, by name, such as "patches.11": the first number counts the images."""
    unreadable: list[str]
    """Images that could not be read: their rows are zeros."""


def extract(
    model: nn.Module,
    images: Images,
    output: str | os.PathLike[str],
    *,
    blocks: Sequence[int] = (-1,),
    what: Sequence[What] | None = None,
    norm: bool = False,
    half: bool = False,
    transform: Transform | None = None,
    batch_size: int = 16,
    workers: int = 0,
    progress: bool = True,
) -> Extracted:
    """Write the features of all `images` to one file, of a model that is patched or not.

    For each block i the file has the arrays that `what` names, with a row for each image: "patches.i" (N, C, h, w) as
    `testreg.features` gives them, "cls.i" (N, C), "attention.i" (N, heads, h, w) as `testreg.attention` gives it, and
    "registers.i" (N, R, C), the trained registers first, then those of a patch. "read" (N,) is False for images that
    could not be read, whose rows are zeros. The metadata hold the images' names ("images"), and the model, its register
    neurons and the options ("testreg").

    What was written before an interruption stays in a file beside `output`, whose name ends in .unfinished: the same
    call goes on from there. The processes of torch.distributed share the images, and write into the same file.

    Example:
        >>> with testreg.patched(model, {2: [5, 77]}):
        ...     done = testreg.extract(model, "photos/", "features.safetensors", blocks=[1, -1], progress=False)
        >>> done.arrays["patches.3"]
        (90, 48, 4, 4)
        >>> from safetensors.torch import load_file
        >>> load_file("features.safetensors")["cls.1"].shape
        torch.Size([90, 48])

    Args:
        model: a vision tower, or any model that contains one. It is run in eval mode.
        images: a folder, a list (.txt), or any other source whose images can be counted, in the order of their names.
        output: a name that ends in .safetensors, .npz or .parquet (which needs pyarrow; each array is a column of flat
            lists there). An existing file is replaced when all is done.
        blocks: 0-based; -1 is the last.
        what: among "patches", "cls", "attention" and "registers". None: patches, and CLS where there is one.
        norm: apply the tower's final norm to patches, CLS and registers.
        half: write float16 in place of float32.
        transform: PIL image -> tensor (3, h, w); None takes the preprocessing that the model's own library names.

    Raises:
        ValueError: an argument does not fit the model; no image could be read; images have different shapes as the
            model's input; values are too large for float16; or an unfinished file is of another run.
        ImportError: pyarrow is needed, and not installed.
    """
    path = Path(output)
    check_output(path)
    tower = find_tower(model)
    taker = _Taker(model, tower, _checked(tower, blocks), _known(model, tower, what), norm)
    if norm and tower.final_norm is None:
        raise ValueError(f"{type(tower.module).__name__} has no norm behind its last block: leave norm out")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    transform = transform or OwnTransform(model)
    items, names = _items(images)
    dtype = "float16" if half else "float32"
    with tower.evaluating():
        rows = all_gather(_first(taker, items, names, transform, dtype) if rank() == 0 else None)[0]
        assert rows is not None
        todo = all_gather(begin(rows, path) if rank() == 0 else None)[0]
        assert todo is not None
        stream = ImageStream(cast(Any, Subset(items, todo)), transform, workers=workers)
        numbered = ((todo[number], image) for number, image in stream.numbered(0, rank(), world_size()))
        writer, written = Writer(rows, path), list[int]()
        try:
            with progress_bar("extracting", len(todo), progress) as bar:
                for numbers, batch in _batches(numbered, batch_size, rows):
                    arrays = {name: _array(name, value, dtype) for name, value in taker.take(batch).items()}
                    writer.write(numbers, arrays)
                    written += numbers
                    bar.update(len(numbers))
        finally:
            writer.close()
    missing = sorted(set(todo).difference(*all_gather(written)))
    if rank() == 0:
        finish(rows, path)
    all_gather(None)  # nobody returns before the file is there
    shapes = {name: (len(rows), *shape) for name, shape in rows.shapes.items()}
    return Extracted(path, shapes, [names[number] for number in missing])


def check_output(path: Path) -> None:
    """Raise ValueError or ImportError at once if features cannot be written to a file of this name."""
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: name a {' or '.join(FORMATS)} file")
    if path.suffix == ".parquet":
        parquet_library()


@dataclass(frozen=True)
class _Taker:
    """Takes what is asked for from a forward."""

    model: nn.Module
    tower: Tower
    blocks: list[int]
    what: Sequence[What]
    norm: bool

    @torch.no_grad()
    def take(self, images: Tensor) -> dict[str, Tensor]:
        """The rows of images (B, 3, h, w), by the name of their array."""
        tower, recorder = self.tower, Recorder(queries_of(self.tower, images, default_query(self.tower)))
        pooled = self._is_pooled(images)
        watched = [block for block in self.blocks if "attention" in self.what and block not in pooled]
        with ExitStack() as stack:
            seen = [stack.enter_context(recorded_tokens(tower, images, block)) for block in self.blocks]
            added = stack.enter_context(registers(self.model)) if self._has_added else None
            drawn: list[list[Tensor]] = []
            if watched:
                stack.enter_context(attention_kernel(tower.module, "sdpa", instead_of=UNSEEN))
                drawn = stack.enter_context(recorded_attention(tower, watched, recorder))
            tower.run(images)
        if len(images) > 1 and any(len(tokens[0]) != len(images) for tokens in seen):  # packed in one sequence
            each = [self.take(image) for image in images.split(1)]
            return {name: torch.cat([rows[name] for rows in each]) for name in each[0]}
        patches, grid, made = tower.patches(images), tower.grid(images), dict[str, Tensor]()
        for block, (tokens,) in zip(self.blocks, seen, strict=True):
            tokens = tokens.reshape(len(images), -1, tokens.shape[-1])
            if "patches" in self.what:
                made[f"patches.{block}"] = self._normed(tokens[:, patches]).mT.unflatten(-1, grid)
            if "cls" in self.what:
                made[f"cls.{block}"] = self._normed(tokens[:, 0])
            if "registers" in self.what:
                held = tokens[:, tower.num_prefix - tower.num_trained_registers : tower.num_prefix]
                made[f"registers.{block}"] = self._normed(held if not added else torch.cat([held, added[block]], 1))
            if block in watched:
                made[f"attention.{block}"] = torch.cat(drawn[watched.index(block)], 1)[..., patches].unflatten(-1, grid)
            elif "attention" in self.what:
                weights = attention_to_patches(tower, images, block, "pool")
                made[f"attention.{block}"] = weights.unflatten(-1, grid)
        return made

    def _normed(self, tokens: Tensor) -> Tensor:
        return self.tower.final_norm(tokens) if self.norm and self.tower.final_norm is not None else tokens

    @property
    def _has_added(self) -> bool:
        return "registers" in self.what and find_patch(self.model) is not None

    def _is_pooled(self, images: Tensor) -> list[int]:
        """The last block, if its attention is that of a head which pools its tokens."""
        last = self.tower.depth - 1
        asked = "attention" in self.what and last in self.blocks and not self.tower.num_prefix
        return [last] if asked and pooling(self.tower, images[:1]) else []


def _checked(tower: Tower, blocks: Sequence[int]) -> list[int]:
    tower.check_runs()
    if not blocks or any(not -tower.depth <= block < tower.depth for block in blocks):
        raise ValueError(f"blocks={list(blocks)} do not fit: the model has {tower.depth} blocks")
    return list(dict.fromkeys(block % tower.depth for block in blocks))


def _known(model: nn.Module, tower: Tower, what: Sequence[What] | None) -> Sequence[What]:
    if not what:
        return ("patches", "cls") if tower.num_prefix else ("patches",)
    if unknown := [each for each in what if each not in get_args(What)]:
        raise ValueError(f"what is among {', '.join(get_args(What))}, got {unknown[0]!r}")
    name = type(tower.module).__name__
    if "cls" in what and not tower.num_prefix:
        raise ValueError(f"{name} has no CLS token: leave cls out")
    if "registers" in what and find_patch(model) is None and not tower.num_trained_registers:
        raise ValueError(f"{name} has no registers: call testreg.patch(model, ...) first, or leave registers out")
    return what


def _items(images: Images) -> tuple[Any, list[str]]:
    """The images, that can be indexed, and the name of each."""
    name = os.fspath(images) if isinstance(images, str | os.PathLike) else None
    items = undecoded(named_source(name) if name is not None else images_in(images))
    if not is_indexed(items):
        raise ValueError(
            f"the images of {name or type(images).__name__} are not counted before they are read: give "
            "a folder, a list (.txt), or a dataset with a length"
        )
    folder = Path(name or "")
    folder = folder if folder.is_dir() else folder.parent

    def name_of(number: int) -> str:
        item = items[number] if isinstance(items, list) else None
        if not isinstance(item, str | os.PathLike):
            return str(number)
        file = Path(item)
        return str(file.relative_to(folder) if name is not None and file.is_relative_to(folder) else file)

    return items, [name_of(number) for number in range(len(items))]


def _first(taker: _Taker, items: Any, names: list[str], transform: Transform, dtype: str) -> Rows:
    """What the file will hold: its shapes are those of the first image that can be read."""
    stream = ImageStream(items, transform)
    image = next((image for _, image in stream.numbered()), None)
    if image is None:
        raise stream.nothing_read()
    made = taker.take(image.unsqueeze(0))
    patch = find_patch(taker.model)
    facts = {
        "model": describe_model(taker.model, taker.tower),
        "neurons": None if patch is None else patch.neurons.by_block(),
        "num_registers": None if patch is None else patch.num_registers,
        "image_size": list(image.shape[-2:]),
        "norm": taker.norm,
    }
    return Rows(names, {name: tuple(value.shape[1:]) for name, value in made.items()}, dtype, facts)


def _batches(numbered: Iterator[tuple[int, Tensor]], batch_size: int, rows: Rows) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers and tensors (3, h, w) of images as batches (B, 3, h, w)."""
    size = rows.facts["image_size"]
    numbers, images = list[int](), list[Tensor]()
    for number, image in numbered:
        if list(image.shape[-2:]) != size:
            raise ValueError(
                f"{rows.images[number]} has {image.shape[-2]} x {image.shape[-1]} pixels as the model's input, and the "
                f"first image {size[0]} x {size[1]}: one file holds images of one size. Pass a transform that crops"
            )
        numbers.append(number)
        images.append(image)
        if len(images) == batch_size:
            yield numbers, torch.stack(images)
            numbers, images = [], []
    if images:
        yield numbers, torch.stack(images)


def _array(name: str, value: Tensor, dtype: str) -> Any:
    made = value.float().cpu()
    if dtype == "float16":
        made = made.half()
    if not made.isfinite().all():
        fix = "leave half out" if value.isfinite().all() else "run the model in float32 or bfloat16"
        raise ValueError(f"{name} has values that {dtype} cannot hold: {fix}")
    return made.numpy()
