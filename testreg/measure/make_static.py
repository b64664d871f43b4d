"""Make static registers: constants that replace the registers a patched model computes.

A patched model has *registers*, extra tokens onto which the activations of register neurons are moved. The means of
their states over images can take their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import find_tower
from testreg.io.images import Images, ImageStream, batched
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.processes import add, all_reduce_sum, rank, world_size
from testreg.io.progress import progress_bar
from testreg.measure.hooks import recording_inputs
from testreg.neurons import AnyNeurons, describe_model
from testreg.patching.block import RegisterBlock
from testreg.patching.state import Patch, patch_of
from testreg.register import is_patched, patched, registers
from testreg.static import Form, StaticRegisters


@torch.no_grad()
def make_static(
    model: nn.Module,
    images: Images,
    neurons: AnyNeurons = None,
    *,
    form: Form = "token",
    transform: Transform | None = None,
    batch_size: int = 16,
    num_images: int | None = None,
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> StaticRegisters:
    """Average the states of the registers over `images`, at each block, to use them as constants.

    This is A.2 of arXiv 2506.08010.

    A model that is patched with these constants computes no registers: the register neurons are silenced at the
    patches, and the constants stand for what they used to write. This function leaves the model as it was. The
    processes of torch.distributed share the images: all must call this function, and all get the same result.

    Example:
        >>> static = testreg.make_static(model, "photos/", neurons, progress=False)
        >>> outputs = testreg.patch(model, neurons, static=static)(images)

    Args:
        model: a vision tower, or any model that contains one. If it is patched already, leave `neurons` out.
        images: as in `testreg.diagnose`; the paper takes about 1000.
        neurons: as in `testreg.patch`.
        form: "token" makes constant tokens, which every family can take. "bias" makes a key and a value in each
            attention in place of a token, which needs nn.MultiheadAttention (open_clip, OpenAI CLIP, torchvision).
            The patches come out the same with both.
        transform, batch_size, num_images, workers, seed, progress: as in `testreg.diagnose`.
        options: `top_k`, `num_registers`, `split_neurons`, `max_over`, `zero` and `start`, as in `testreg.patch`. With
            the form "bias" there is one register, unless `num_registers` is given.

    Raises:
        ValueError: an argument does not fit the model, or its registers are constants already; no image could be read.
    """
    was_patched = is_patched(model)
    if form == "bias" and not was_patched:
        options = {"num_registers": 1, **options}
    if was_patched and (neurons is not None or options):
        raise ValueError("the model is patched already: leave neurons and options out, or call testreg.unpatch first")
    if was_patched and (patch_of(model).static is not None or not patch_of(model).mode_for_new_forward.has_registers):
        raise ValueError("the model computes no registers: patch it without static and target, and not disabled")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    stream = ImageStream(images, transform or OwnTransform(model), num_images=num_images, workers=workers, seed=seed)
    batches = batched((image for _, image in stream.numbered(0, rank(), world_size())), batch_size)
    tower = find_tower(model)
    sums: dict[str, Tensor] = {}
    image_size: list[int] = []
    with (
        nullcontext() if was_patched else patched(model, neurons, **options),
        tower.evaluating(),
        progress_bar("averaging registers", stream.length, progress) as bar,
    ):
        patch = patch_of(model)
        for batch in batches:
            with _entering(patch) as entering, registers(model) as after_block:
                tower.run(batch)
            absent = [torch.zeros_like(entering[0])] * patch.entry_block
            in_front = [*absent, *entering, *after_block[patch.entry_block : -1]]  # of each block
            states = torch.stack(in_front)  # (L, B, R, C)
            add(sums, {"states": states.double().sum(1), "images": torch.tensor(len(batch))})
            image_size = image_size or list(batch.shape[-2:])
            bar.update(len(batch))
    sums = all_reduce_sum(sums)
    if not sums:
        raise stream.nothing_read()
    num_images_read = int(sums["images"])
    return StaticRegisters(
        states=(sums["states"] / num_images_read).float(),
        neurons=patch.neurons.by_block(),
        form=form,
        model=describe_model(model, tower),
        images={"number": num_images_read, "source": stream.source, "image_size": image_size},
        start=patch.start,
    )


@contextmanager
def _entering(patch: Patch) -> Iterator[list[Tensor]]:
    """Within the `with` block, the list gets the registers (B, R, C) that enter the entry block."""
    first = next(part for part in patch.overrides if isinstance(part, RegisterBlock))
    entering: list[Tensor] = []

    def record(index: int, tokens: Tensor) -> None:
        entering[:] = [first.first_registers(tokens, first.default_layout)]

    with recording_inputs([first.module], record):
        yield entering
