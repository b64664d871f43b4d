"""Compares calibration with plain forwards: the time of ranking and of everything, its memory, and many images."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import operator
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from planting import plant_into
from torch import Tensor, nn

import testreg
from benchmark.forward import DTYPES
from benchmark.measuring import Row, compared, count_operations, cpu_seconds, in_own_process, in_turns, peak_memory
from benchmark.models import NUM_NEURONS, MadeImages, build, random_images, small_planted
from testreg.io.images import ImageStream
from testreg.io.loading import load_model
from testreg.io.preprocessing import OwnTransform


def calibration(args: argparse.Namespace) -> Iterator[Row]:
    """Compare diagnosis and ranking with plain forwards of the same images in the same batches."""
    num_images, batch_size, turns = (16, 8, 3) if args.quick else (32, 16, max(3, args.repeats // 3))
    for dtype in args.dtype[:1] if args.quick else args.dtype:
        model = build(args, DTYPES[dtype], with_outliers=True)
        batches = random_images(num_images, model).split(batch_size)

        def plain_pass(model: nn.Module = model, batches: tuple[Tensor, ...] = batches) -> None:
            with torch.inference_mode():
                for images in batches:
                    model(images)

        sides = {
            "plain": plain_pass,
            "calibration": functools.partial(rank, model, batches, batch_size=batch_size),
            "noise": plain_pass,
        }
        times = in_turns(sides, args.device, turns)
        yield {"dtype": dtype, "images": num_images, "batch": batch_size, **compared(times)}


def rank(model: nn.Module, images: Any, **options: Any) -> testreg.RegisterNeurons:
    """Calibrate without choosing neurons: only diagnosis and ranking."""
    return testreg.calibrate(model, images, top_k=NUM_NEURONS, held_out=0, stability=None, progress=False, **options)


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Measure the peak memory of calibration, each time in a new process."""
    for num_images in (16, 160):
        yield in_own_process(measure_memory, args, num_images)


def measure_memory(args: argparse.Namespace, num_images: int) -> Row:
    """The peak memory of plain forwards, and of a calibration after them."""
    model, batch_size = build(args, torch.float32, with_outliers=True), 16
    with torch.inference_mode():
        model(random_images(batch_size, model))
    plain = peak_memory(args.device)
    # a generator, so that the memory of the images does not count
    images = (random_images(batch_size, model) for _ in range(num_images // batch_size))
    rank(model, images, batch_size=batch_size)
    peak = peak_memory(args.device)
    return {"images": num_images, "batch": batch_size, "plain_MiB": round(plain), "calibration_MiB": round(peak)}


class CountingImages(torch.utils.data.Dataset[Tensor]):
    """A data set of images (3, h, w) that records which of them were read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.read = images, set[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.read.add(index)
        return self.images[index]


def search(args: argparse.Namespace) -> Iterator[Row]:
    """Compare all of a calibration, with its defaults, with plain forwards of the images that it reads.

    It is compared by the number of operations, which does not depend on the machine, and by CPU time; plain forwards
    are timed before and after each calibration.
    """
    untouched = load_model(args.pretrained).model.eval().to(args.device)
    images = torch.stack([image for _, image in ImageStream(args.images, OwnTransform(untouched)).numbered()])
    some = images[:64]

    def plain_pass(model: nn.Module) -> None:
        with torch.inference_mode():
            for batch in some.split(16):
                model(batch.to(args.device))

    calibrate = functools.partial(testreg.calibrate, progress=False)
    for mechanism in args.mechanisms:
        model, counted = copy.deepcopy(untouched), CountingImages(images)
        plant_into(model, some, mechanism=mechanism)
        neurons, operations = count_operations(calibrate, model, counted)
        parts = len(counted.read) / len(some)
        operations /= count_operations(plain_pass, model)[1] * parts
        times = [cpu_seconds(plain_pass, model)]
        for _ in range(max(1, args.repeats // 10)):
            times += [cpu_seconds(calibrate, model, counted), cpu_seconds(plain_pass, model)]
        plain, whole = [parts * seconds for seconds in times[::2]], times[1::2]
        around = [(before + after) / 2 for before, after in itertools.pairwise(plain)]
        yield {
            "mechanism": mechanism,
            "images": len(counted.read),
            "operations": round(operations, 2),
            "plain_s": round(statistics.median(plain), 1),
            "calibrate_s": round(statistics.median(whole), 1),
            "ratio": round(statistics.median(map(operator.truediv, whole, around)), 2),
            "noise": f"{min(plain) / max(plain):.2f}",
            "turns": len(whole),
            "neurons": neurons.top_k,
            "met": neurons.calibration.target_met,
        }


def budget(args: argparse.Namespace) -> Iterator[Row]:
    """Measure how long a calibration with a budget takes, and what it did in that time."""
    model = build(args, torch.float32, with_outliers=True)
    images = (random_images(1, model)[0] for _ in range(200))
    start = time.perf_counter()
    neurons = testreg.calibrate(model, images, budget=args.budget, progress=False)
    seconds, facts = time.perf_counter() - start, neurons.calibration
    yield {
        "budget_s": args.budget,
        "wall_s": round(seconds),
        "ranked": facts.images,
        "held_out": facts.held_out,
        "sets": len(facts.curve),
        "neurons": neurons.top_k,
        "met": facts.target_met,
        "cut": " and ".join(facts.out_of_time) or "nothing",
    }


def scale(args: argparse.Namespace) -> Iterator[Row]:
    """Measure CPU time and peak memory of calibrating a small model on more and more images, each in a new process."""
    for settings in ("all ranked", "defaults"):
        for num_images in (16, 64) if args.quick else (16, 64, 256, 1024, 4096):
            yield {"settings": settings, **in_own_process(measure_scale, settings, num_images)}


def measure_scale(settings: str, num_images: int) -> Row:
    """The CPU time and peak memory of calibrating a small model on so many images."""
    model, images = small_planted(), MadeImages(num_images)
    rank(model, MadeImages(8))  # warms up
    run = rank if settings == "all ranked" else functools.partial(testreg.calibrate, progress=False)
    seconds = cpu_seconds(run, model, images)
    return {
        "images": num_images,
        "read": len(images.read),
        "cpu_s": round(seconds, 2),
        "ms_an_image": round(1e3 * seconds / len(images.read), 2),
        "peak_MiB": round(peak_memory("cpu")),
    }
