"""The command `testreg show`, which draws a model's maps of images before and after it is patched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from testreg.cli.invocation import Invocation
from testreg.cli.models import load, patch
from testreg.cli.options import Loading, Model, Patching
from testreg.cli.outputs import PICTURES, check_file, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor

    from testreg.io.loading import LoadedModel

MAX_SHOWN = 64  # images in one picture, which has a row for each


def show(
    invocation: Invocation,
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="images, folders or lists of them", show_default=False)
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="picture to write")],
    patching: Patching,
    block: Annotated[
        int | None, typer.Option(help="block whose norms are drawn (default: where calibration saw outliers)")
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(
            metavar="BOX",
            help="LEFT,TOP,RIGHT,BOTTOM in fractions of the picture that the model sees (it is drawn): outliers are "
            "moved onto the patches that this box touches, in place of the register",
        ),
    ] = None,
    pca: Annotated[
        bool, typer.Option("--pca", help="draw features alone: three principal components, the same for all images")
    ] = False,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="with --pca: blacken the background, which the first component tells")
    ] = False,
    loading: Loading,
) -> None:
    """Picture of a model before and after."""
    check_file(output, *PICTURES)
    if foreground and not pca:
        raise ValueError("--foreground belongs to --pca: give both")
    box = None if steer is None else _box(steer)

    from contextlib import nullcontext

    import torch

    from testreg.extensions.steering import steered
    from testreg.families import find_tower
    from testreg.report.map_figures import figure, figures_of, maps_before_and_after, table

    photographs = _photographs(images)
    loaded = load(invocation, model, loading)
    neurons = patch(loaded, patching)
    tower = find_tower(loaded.model)
    detected = neurons.calibration.detection_block
    block_drawn = block if block is not None else -1 if pca or detected is None else detected
    if not -tower.depth <= block_drawn < tower.depth:
        raise ValueError(f"--block {block_drawn} is out of range: {loaded.name} has {tower.depth} blocks")
    batch = torch.stack([loaded.transform(photo) for photo in photographs])
    steering = (
        nullcontext() if box is None else steered(loaded.model, _touched_patches(box, tower.rows_and_columns(batch)))
    )
    steering_in_words = "" if steer is None else f", steered onto {steer}"
    with invocation.phase(f"measuring {len(photographs)} images"), steering:
        if pca:
            picture, facts = _features_figure(loaded, batch, block_drawn, steering_in_words, foreground), {}
        else:
            before, after = maps_before_and_after(loaded.model, batch, block_drawn)
            invocation.say(table(before, after))
            picture = figure(batch, before, after, f"{loaded.name}, norms after block {block_drawn}{steering_in_words}")
            facts = {"before": figures_of(before), "after": figures_of(after)}
    save_picture(picture, output)
    invocation.answer(f"picture:    {output}")
    invocation.write(
        {
            "picture": str(output),
            "model": loaded.name,
            "neurons": neurons.by_block(),
            "block": block_drawn,
            "steered_onto": box,
            **facts,
        }
    )


def _features_figure(
    loaded: LoadedModel, images: Tensor, block: int, steering_in_words: str, foreground: bool
) -> Figure:
    """A picture of the features of images (B, 3, h, w) as colours, without and with registers."""
    from testreg.families import find_tower
    from testreg.measure.maps import features
    from testreg.register import disabled
    from testreg.report.map_figures import principal_figure

    def current_features() -> Tensor:
        """(B, rows, columns, C), of the model in its current state."""
        return features(loaded.model, images, block).permute(0, 2, 3, 1)

    with disabled(loaded.model):
        before = current_features()
    last = block % find_tower(loaded.model).depth
    title = f"{loaded.name}, principal components of the patches after block {last}{steering_in_words}"
    return principal_figure(images, {"before": before, "after": current_features()}, title, foreground=foreground)


def _box(text: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the box in --steer, as fractions of the image's width and height."""
    parts = text.split(",")
    try:
        left, top, right, bottom = (float(part) for part in parts)
    except ValueError:
        raise ValueError(f"--steer takes LEFT,TOP,RIGHT,BOTTOM, such as 0,0,0.5,0.5, got {text!r}") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"--steer takes fractions of the picture, 0 to 1, left before right and top before bottom, got {text}"
        )
    return left, top, right, bottom


def _touched_patches(box: tuple[float, float, float, float], grid: tuple[int, int]) -> Tensor:
    """Which patches a box touches, (1, rows, columns)."""
    import torch

    (left, top, right, bottom), (rows, columns) = box, grid
    target = torch.zeros(1, rows, columns, dtype=torch.bool)
    target[0, int(top * rows) : math.ceil(bottom * rows), int(left * columns) : math.ceil(right * columns)] = True
    return target


def _photographs(paths: Sequence[Path]) -> list[Image]:
    """Read the images that the paths of files, folders and lists stand for."""
    from testreg.io.decoding import open_image
    from testreg.io.sources import image_paths

    files = [
        file
        for path in paths
        for file in (image_paths(path) if path.is_dir() or path.suffix.lower() == ".txt" else [path])
    ]
    if len(files) > MAX_SHOWN:
        raise ValueError(f"{len(files)} images are too many for one picture, at most {MAX_SHOWN}: name fewer")
    return [open_image(file) for file in files]
