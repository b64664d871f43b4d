"""A patched model against the plain one: its forward, and a training step."""

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
    """A patched forward against a plain one."""
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
    """Forward and backward of a patched model against those of a plain one, without an optimizer."""

    def step(model: nn.Module, images: Tensor) -> None:
        torch.autograd.grad(model(images).sum(), tuple(model.parameters()))

    for dtype in args.dtype:
        models = sides_of(build(args, DTYPES[dtype]))
        images = random_images(TRAINING_BATCH, models["plain"])
        sides = {side: functools.partial(step, model.train(), images) for side, model in models.items()}
        times = in_turns(sides, args.device, max(3, args.repeats // 3))
        yield {"dtype": dtype, "mode": "eager", "batch": len(images), **compared(times)}


def sides_of(plain: nn.Module) -> dict[str, nn.Module]:
    return {
        "plain": plain,
        "patched": testreg.patch(twin(plain), neurons(plain)),
        "one_more_token": one_more_token(twin(plain)),
        "noise": twin(plain),
    }
