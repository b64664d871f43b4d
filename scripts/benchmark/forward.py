"""Compares forwards and training steps of a patched model with those of the plain model."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import testreg
from benchmark.measuring import Row, compared, in_turns
from benchmark.models import build, neurons, one_more_token, random_images, twin

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINING_BATCH = 8


def forward(args: argparse.Namespace) -> Iterator[Row]:
    """Compare a forward of the patched model with one of the plain model."""
    for dtype in args.dtype:
        models = sides_of(build(args, DTYPES[dtype]))
        for mode in args.mode:
            torch.compiler.reset()
            forwards = {side: torch.compile(model) if mode == "compiled" else model for side, model in models.items()}
            for batch in args.batch:
                images = random_images(batch, models["plain"])
                sides = {side: functools.partial(run, images) for side, run in forwards.items()}
                with torch.inference_mode():
                    times = in_turns(sides, args.device, args.repeats)
                yield {"dtype": dtype, "mode": mode, "batch": batch, **compared(times)}


def training(args: argparse.Namespace) -> Iterator[Row]:
    """Compare a forward with backward, without an optimizer, of the patched and of the plain model."""

    def step(model: nn.Module, images: Tensor) -> None:
        torch.autograd.grad(model(images).sum(), tuple(model.parameters()))

    for dtype in args.dtype:
        models = sides_of(build(args, DTYPES[dtype]))
        images = random_images(TRAINING_BATCH, models["plain"])
        sides = {side: functools.partial(step, model.train(), images) for side, model in models.items()}
        times = in_turns(sides, args.device, max(3, args.repeats // 3))
        yield {"dtype": dtype, "mode": "eager", "batch": len(images), **compared(times)}


def sides_of(plain: nn.Module) -> dict[str, nn.Module]:
    """The models that are compared, which share the plain model's weights."""
    return {
        "plain": plain,
        "patched": testreg.patch(twin(plain), neurons(plain)),
        "one_more_token": one_more_token(twin(plain)),
        "noise": twin(plain),
    }
