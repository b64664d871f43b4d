"""Extract the features of many images in one pass, and write them to one file.

Several processes can share the images, and an interrupted run can be resumed. *Prefix tokens* are those in front of the
patches, such as CLS. *Registers* are extra tokens: trained ones, and those that a patched model adds.
"""

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
    AttentionRecorder,
    attention_to_patches,
    default_query,
    pooling_attention,
    queries_of,
    recorded_attention,
)
from testreg.measure.hooks import recorded_tokens
from testreg.neurons import describe_model
from testreg.patching.state import find_patch
from testreg.register import registers

What = Literal["patches", "cls", "attention", "registers"]
"""What can be extracted of a block, see `extract`."""


@dataclass(frozen=True)
class Extracted:
    """What `extract` has written."""

    path: Path
    arrays: dict[str, tuple[int, ...]]
    """The shape of each array, by its name, such as "patches.11". The first dimension is the images."""
    unreadable: list[str]
    """The names of images that could not be read; their rows are zeros."""


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
    """Write the features of all `images` to one file. The model may be patched or not.

    The file has these arrays for each block i, as far as `what` names them, with a row for each of the N images:

    - "patches.i" (N, C, h, w), as `testreg.features` returns them;
    - "cls.i" (N, C);
    - "attention.i" (N, heads, h, w), as `testreg.attention` returns it;
    - "registers.i" (N, R, C): first the trained registers, then those that a patched model adds.

    The array "read" (N,) is False for images that could not be read; their rows are zeros. The metadata have the names
    of the images ("images"), and the model, its register neurons and the options ("testreg").

    If a run is interrupted, what it has written stays in a file beside `output` whose name ends in .unfinished. The
    same call then goes on from there. The processes of torch.distributed share the images, and write into one file.

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
        images: a folder, a list of paths (.txt), or any other source whose images can be counted. Rows are in the order
            of the source; that of a folder is the order of names.
        output: the path of the file, which ends in .safetensors, .npz or .parquet (which needs pyarrow; each array is
            a column of flat lists there). An existing file is replaced when the new one is complete.
        blocks: the indices of the blocks, 0-based; -1 is the last.
        what: some of "patches", "cls", "attention" and "registers". None takes the patches, and CLS if there is one.
        norm: apply the tower's final norm to patches, CLS and registers.
        half: write float16 in place of float32.
        transform: a function PIL image -> tensor (3, h, w); None takes the preprocessing that the model's library
            names.
        batch_size: how many images are run at once.
        workers: how many processes decode images; with 0, this process decodes them.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an argument does not fit the model; no image could be read; the transform gives images of
            different shapes; values are too large for float16; or an unfinished file is of another run.
        ImportError: pyarrow is needed, and not installed.
    """
    path = Path(output)
    check_output(path)
    tower = find_tower(model)
    numbers = _checked_blocks(tower, blocks)
    extractor = _Extractor(model, tower, numbers, _checked_what(model, tower, numbers, what), norm)
    if norm and tower.final_norm is None:
        raise ValueError(f"{type(tower.module).__name__} has no norm behind its last block: leave norm out")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    transform = transform or OwnTransform(model)
    items, names = _items_and_names(images)
    dtype = "float16" if half else "float32"
    with tower.evaluating():
        rows = all_gather(_rows(extractor, items, names, transform, dtype) if rank() == 0 else None)[0]
        assert rows is not None
        missing = all_gather(begin(rows, path) if rank() == 0 else None)[0]
        assert missing is not None
        stream = ImageStream(cast(Any, Subset(items, missing)), transform, workers=workers)
        numbered = ((missing[number], image) for number, image in stream.numbered(0, rank(), world_size()))
        writer, written = Writer(rows, path), list[int]()
        try:
            with progress_bar("extracting", len(missing), progress) as bar:
                for numbers, batch in _batches(numbered, batch_size, rows):
                    arrays = {name: _array(name, value, dtype) for name, value in extractor.extract(batch).items()}
                    writer.write(numbers, arrays)
                    written += numbers
                    bar.update(len(numbers))
        finally:
            writer.close()
    unreadable = sorted(set(missing).difference(*all_gather(written)))
    if rank() == 0:
        finish(rows, path)
    all_gather(None)  # no process returns before the first one has finished the file
    shapes = {name: (len(rows), *shape) for name, shape in rows.shapes.items()}
    return Extracted(path, shapes, [names[number] for number in unreadable])


def check_output(path: Path) -> None:
    """Raise ValueError or ImportError at once if features cannot be written to a file of this name."""
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: name a {' or '.join(FORMATS)} file")
    if path.suffix == ".parquet":
        parquet_library()


@dataclass(frozen=True)
class _Extractor:
    """Runs images, and extracts what is asked for of some blocks."""

    model: nn.Module
    tower: Tower
    blocks: list[int]
    what: Sequence[What]
    norm: bool

    @torch.no_grad()
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """The rows (B, ...) of images (B, 3, h, w) in each array, by the name of the array."""
        tower, recorder = self.tower, AttentionRecorder(queries_of(self.tower, images, default_query(self.tower)))
        pooled = self._pooled_blocks(images)
        observed = [block for block in self.blocks if "attention" in self.what and block not in pooled]
        with ExitStack() as stack:
            recorded = [stack.enter_context(recorded_tokens(tower, images, block)) for block in self.blocks]
            added = stack.enter_context(registers(self.model)) if self._has_added_registers else None
            attention: list[list[Tensor]] = []  # the weights (B, heads, T) of each attention in each observed block
            if observed:
                stack.enter_context(attention_kernel(tower.module, "sdpa", instead_of=UNSEEN))
                attention = stack.enter_context(recorded_attention(tower, observed, recorder))
            tower.run(images)
        # Some towers pack the images of a batch in one sequence. They run the images again, one by one.
        if len(images) > 1 and any(len(tokens[0]) != len(images) for tokens in recorded):
            of_images = [self.extract(image) for image in images.split(1)]
            return {name: torch.cat([each[name] for each in of_images]) for name in of_images[0]}
        patches, grid, rows = tower.patches(images), tower.grid(images), dict[str, Tensor]()
        for block, (tokens,) in zip(self.blocks, recorded, strict=True):
            tokens = tokens.reshape(len(images), -1, tokens.shape[-1])
            if "patches" in self.what:
                rows[f"patches.{block}"] = self._normed(tokens[:, patches]).mT.unflatten(-1, grid)
            if "cls" in self.what:
                rows[f"cls.{block}"] = self._normed(tokens[:, 0])
            if "registers" in self.what:
                trained = tokens[:, tower.num_prefix - tower.num_trained_registers : tower.num_prefix]
                all_registers = torch.cat([trained, added[block]], 1) if added else trained
                rows[f"registers.{block}"] = self._normed(all_registers)
            if block in observed:
                weights = torch.cat(attention[observed.index(block)], 1)[..., patches]
                rows[f"attention.{block}"] = weights.unflatten(-1, grid)
            elif "attention" in self.what:
                weights = attention_to_patches(tower, images, block, "pool")
                rows[f"attention.{block}"] = weights.unflatten(-1, grid)
        return rows

    def _normed(self, tokens: Tensor) -> Tensor:
        """The tokens, with the final norm applied if `norm` is true."""
        return self.tower.final_norm(tokens) if self.norm and self.tower.final_norm is not None else tokens

    @property
    def _has_added_registers(self) -> bool:
        """Whether registers are extracted, and the model is patched, so that it adds some."""
        return "registers" in self.what and find_patch(self.model) is not None

    def _pooled_blocks(self, images: Tensor) -> list[int]:
        """The blocks for which the attention of a pooling head is extracted in place of their own.

        This is the last block, if the tower has no prefix tokens, and a head that pools the patches by attention.
        """
        last = self.tower.depth - 1
        may_be_pooled = "attention" in self.what and last in self.blocks and not self.tower.num_prefix
        return [last] if may_be_pooled and pooling_attention(self.tower, images[:1]) else []


def _checked_blocks(tower: Tower, blocks: Sequence[int]) -> list[int]:
    """The indices of the blocks, counted from the front, without duplicates."""
    tower.check_runs()
    if not blocks or any(not -tower.depth <= block < tower.depth for block in blocks):
        raise ValueError(f"blocks={list(blocks)} do not fit: the model has {tower.depth} blocks")
    return list(dict.fromkeys(block % tower.depth for block in blocks))


def _checked_what(model: nn.Module, tower: Tower, blocks: Sequence[int], what: Sequence[What] | None) -> Sequence[What]:
    """What is to be extracted, after a check that the blocks of the model have it."""
    if not what:
        return ("patches", "cls") if tower.num_prefix else ("patches",)
    if unknown := [each for each in what if each not in get_args(What)]:
        raise ValueError(f"what is among {', '.join(get_args(What))}, got {unknown[0]!r}")
    name = type(tower.module).__name__
    if "cls" in what and not tower.num_prefix:
        raise ValueError(f"{name} has no CLS token: leave cls out")
    if "registers" in what and not tower.num_trained_registers:
        patch = find_patch(model)
        if patch is None:
            raise ValueError(f"{name} has no registers: call testreg.patch(model, ...) first, or leave registers out")
        if min(blocks) < patch.entry_block:
            raise ValueError(f"registers enter block {patch.entry_block} of {name}: leave them or earlier blocks out")
    return what


def _items_and_names(images: Images) -> tuple[Any, list[str]]:
    """The images as a sequence that can be indexed, and the name of each image."""
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


def _rows(extractor: _Extractor, items: Any, names: list[str], transform: Transform, dtype: str) -> Rows:
    """The description of the file's rows. The first image that can be read is run, to know the shapes."""
    stream = ImageStream(items, transform)
    image = next((image for _, image in stream.numbered()), None)
    if image is None:
        raise stream.nothing_read()
    extracted = extractor.extract(image.unsqueeze(0))
    patch = find_patch(extractor.model)
    facts = {
        "model": describe_model(extractor.model, extractor.tower),
        "neurons": None if patch is None else patch.neurons.by_block(),
        "num_registers": None if patch is None else patch.num_registers,
        "image_size": list(image.shape[-2:]),
        "norm": extractor.norm,
    }
    return Rows(names, {name: tuple(value.shape[1:]) for name, value in extracted.items()}, dtype, facts)


def _batches(numbered: Iterator[tuple[int, Tensor]], batch_size: int, rows: Rows) -> Iterator[tuple[list[int], Tensor]]:
    """Collect numbered images (3, h, w) in batches: their numbers, and a tensor (B, 3, h, w)."""
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
    """The values of an array in numpy, in the dtype of the file; `name` is the array's, for errors."""
    array = value.float().cpu()
    if dtype == "float16":
        array = array.half()
    if not array.isfinite().all():
        fix = "leave half out" if value.isfinite().all() else "run the model in float32 or bfloat16"
        raise ValueError(f"{name} has values that {dtype} cannot hold: {fix}")
    return array.numpy()
