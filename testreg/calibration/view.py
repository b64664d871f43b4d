"""Views of a calibration. A *view* is a model at one image size, with the images prepared for it.

Most calibrations have one view. There are several if the user gives one checkpoint at several image sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from testreg.calibration.options import Options
from testreg.families import Tower, compare_weights, find_tower, fingerprint
from testreg.io.images import Images, ImageStream
from testreg.io.preprocessing import OwnTransform
from testreg.neurons.notices import warn_of_activation
from testreg.register import is_patched


@dataclass(frozen=True, eq=False)
class View:
    """A model at one image size, and the stream of the images prepared for it. No image has been read yet."""

    model: nn.Module
    tower: Tower
    stream: ImageStream
    options: Options

    @property
    def dtype(self) -> str:
        """The dtype in which the model computes, e.g. "bfloat16"."""
        return str(self.options.amp or self.tower.dtype).removeprefix("torch.")


def views_of(model: nn.Module | Sequence[nn.Module], images: Images, options: Options) -> list[View]:
    """Make a view of each model, all with the same options.

    Raises:
        RuntimeError: a model is patched.
        ValueError: the models, transforms and images do not fit together.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    transform = options.transform
    transforms = list(transform) if isinstance(transform, Sequence) else [transform] * len(models)
    if not models or len(transforms) != len(models):
        raise ValueError(f"{len(models)} models and {len(transforms)} transforms: give one transform for each")
    towers = [find_tower(each) for each in models]
    if any(is_patched(each) for each in models):
        raise RuntimeError("the model is patched: calibrate it before, or after testreg.unpatch(model)")
    weights = fingerprint(towers[0])
    if any(compare_weights(weights, tower) == "other" for tower in towers[1:]):
        raise ValueError("several models must be one checkpoint at several image sizes, but their weights differ")
    if isinstance(images, Iterator) and (len(models) > 1 or options.resume is not None):
        raise ValueError("several models, and resumed runs, need images that can be read again: not an iterator")
    for one, tower in zip(models, towers, strict=True):
        warn_of_activation(one, tower)
    options = options.with_blocks_of(towers[0].depth)
    views = []
    for each, tower, given_transform in zip(models, towers, transforms, strict=True):
        stream = ImageStream(
            images,
            given_transform or OwnTransform(each),
            tower=tower,
            num_images=options.num_images,
            workers=options.workers,
            seed=options.seed,
        )
        views.append(View(each, tower, stream, options))
    return views


@contextmanager
def evaluating(views: Sequence[View]) -> Iterator[None]:
    """Within the context, all models are in eval mode, and run under autocast if the option `amp` is given."""
    with ExitStack() as stack:
        for view in views:
            stack.enter_context(view.tower.evaluating())
        if (amp := views[0].options.amp) is not None:
            stack.enter_context(torch.autocast(views[0].tower.device.type, amp))
        yield
