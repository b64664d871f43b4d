"""What a patched model costs against the plain one, and calibration against a plain forward.

    python scripts/benchmark.py                      # everything: half an hour on one CPU core
    python scripts/benchmark.py --quick              # a first look: batch 1, eager, few repeats
    python scripts/benchmark.py --only forward --device cuda --json numbers.json
    python scripts/benchmark.py --only search --pretrained hf:FOLDER --images PHOTOS

`search` is the whole of `calibrate` with its defaults, as CPU time, over that of plain forwards of the images it reads:
of a pretrained network without outliers, into which a mechanism is planted.

Weights are random: speed does not depend on them. The sides of a comparison run in turns, in one process and on the
same weights, so that a drifting clock or a busy neighbour meets all of them; a ratio is the median over the turns.
`noise` is the ratio of a third side, which is the first one again: as far as it is from 1, so far is no ratio certain.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from planting import plant, plant_into
from torch import Tensor, nn

import testreg
from testreg.families import find_tower
from testreg.io.images import ImageStream
from testreg.io.loading import load_model
from testreg.io.preprocessing import OwnTransform

NUM_NEURONS, BLOCKS = 50, (3, 4, 5, 6, 7, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("forward", "calibration", "memory", "search")
Row = dict[str, Any]
Run = Callable[[], Any]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print(json.dumps(measure_memory(args)))
        return
    results: dict[str, Any] = {"environment": environment(args)}
    print(" · ".join(f"{key} {value}" for key, value in results["environment"].items()))
    measures = {"forward": forward, "calibration": calibration, "memory": memory, "search": search}
    for part in args.only:
        print(f"\n{part}")
        results[part] = list(printed(measures[part](args)))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm VisionTransformer of 9 blocks or more")
    parser.add_argument("--repeats", type=int, help="turns of each comparison (30, with --quick 6)")
    parser.add_argument("--quick", action="store_true", help="batch 1, eager, few repeats and images")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:3], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--pretrained", help="for search: the name of a network of 12 blocks or more, without outliers")
    parser.add_argument("--images", help="for search: a folder of photographs")
    parser.add_argument("--mechanisms", nargs="+", default=["triggers", "spread"], metavar="MECHANISM")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes of the forward (1 8)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(fp32 bf16)")
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"), help="(eager compiled)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--memory-of", type=int, metavar="IMAGES", help=argparse.SUPPRESS)  # the measured subprocess
    args = parser.parse_args()
    if "search" in args.only and not (args.pretrained and args.images):
        parser.error("search needs --pretrained and --images")
    args.repeats = args.repeats or (6 if args.quick else 30)
    args.batch = args.batch or ([1] if args.quick else [1, 8])
    args.dtype = args.dtype or list(DTYPES)
    args.mode = args.mode or (["eager"] if args.quick else ["eager", "compiled"])
    return args


def environment(args: argparse.Namespace) -> dict[str, str | int]:
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    on_cpu = torch.device(args.device).type != "cuda"
    return {
        "model": args.model,
        "on": processor if on_cpu else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


# ---- the measurements -----------------------------------------------------------------------------------------------


def forward(args: argparse.Namespace) -> Iterator[Row]:
    """A patched forward against a plain one."""
    for dtype in args.dtype:
        plain = build(args, DTYPES[dtype])
        models = {"plain": plain, "patched": testreg.patch(twin(plain), neurons(plain)), "noise": twin(plain)}
        for mode in args.mode:
            torch.compiler.reset()
            forwards = {side: torch.compile(model) if mode == "compiled" else model for side, model in models.items()}
            for batch in args.batch:
                images = random_images(batch, plain)
                sides = {side: functools.partial(run, images) for side, run in forwards.items()}
                with torch.inference_mode():
                    times = in_turns(sides, args.device, args.repeats)
                yield {"dtype": dtype, "mode": mode, "batch": batch, **compared(times)}


def calibration(args: argparse.Namespace) -> Iterator[Row]:
    """A calibration pass against plain forwards of the same preprocessed images in the same batches."""
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
            "calibration": functools.partial(calibrate, model, batches, batch_size),
            "noise": plain_pass,
        }
        times = in_turns(sides, args.device, turns)
        yield {"dtype": dtype, "images": num_images, "batch": batch_size, **compared(times)}


def memory(args: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of calibration, each in a process of its own."""
    for num_images in (16, 160):
        command = [sys.executable, __file__, "--memory-of", str(num_images), "--device", args.device]
        command += ["--threads", str(args.threads), "--model", args.model]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        yield json.loads(output.splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> Row:
    model, batch_size = build(args, torch.float32, with_outliers=True), 16
    with torch.inference_mode():
        model(random_images(batch_size, model))
    plain = peak_memory(args.device)
    # made one batch at a time, so that the images themselves do not count
    calibrate(model, (random_images(batch_size, model) for _ in range(args.memory_of // batch_size)), batch_size)
    peak = peak_memory(args.device)
    return {"images": args.memory_of, "batch": batch_size, "plain_MiB": round(plain), "calibration_MiB": round(peak)}


class Counted(torch.utils.data.Dataset):
    """Images (3, h, w), and how many of them were read."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.read = images, set[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        self.read.add(index)
        return self.images[index]


def search(args: argparse.Namespace) -> Iterator[Row]:
    """The whole of a calibration with its defaults against plain forwards of the images it reads, in CPU time."""
    untouched = load_model(args.pretrained).model.eval().to(args.device)
    images = torch.stack([image for _, image in ImageStream(args.images, OwnTransform(untouched)).numbered()])

    def plain_pass(model: nn.Module) -> float:
        start = time.process_time()
        with torch.inference_mode():
            for batch in images[:64].split(16):
                model(batch.to(args.device))
        return (time.process_time() - start) / 64

    for mechanism in args.mechanisms:
        model, counted = copy.deepcopy(untouched), Counted(images)
        plant_into(model, images[:64], mechanism=mechanism)
        plain_pass(model)  # warms up
        before, start = plain_pass(model), time.process_time()
        found = testreg.calibrate(model, counted, progress=False)
        seconds, after = time.process_time() - start, plain_pass(model)
        plain = (before + after) / 2 * len(counted.read)
        yield {
            "mechanism": mechanism,
            "images": len(counted.read),
            "plain_s": round(plain, 1),
            "calibrate_s": round(seconds, 1),
            "ratio": round(seconds / plain, 2),
            "noise": round(after / before, 3),
            "neurons": found.top_k,
            "met": found.calibration["target_met"],
        }


# ---- their parts ----------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, dtype: torch.dtype, *, with_outliers: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=False)
    if with_outliers:
        plant(model, random_images(8, model))
    return model.to(args.device, dtype).eval()


def twin(model: nn.Module) -> nn.Module:
    """Another model with the very same weights: copies would lie elsewhere in memory, which shows in the times."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def neurons(model: nn.Module) -> dict[int, list[int]]:
    generator, width = torch.Generator().manual_seed(0), find_tower(model).mlp_width
    units: dict[int, list[int]] = {block: [] for block in BLOCKS}
    for i, unit in enumerate(torch.randperm(width, generator=generator)[:NUM_NEURONS].tolist()):
        units[BLOCKS[i % len(BLOCKS)]].append(unit)
    return units


def random_images(count: int, model: nn.Module) -> Tensor:
    weight = next(model.parameters())
    return torch.rand(count, *model.default_cfg["input_size"]).to(weight.device, weight.dtype)


def calibrate(model: nn.Module, batches: Any, batch_size: int) -> None:
    from testreg.calibration.calibrate import calibrate

    # Diagnosis and ranking; choosing neurons is forwards of the patched model, whose cost is measured above.
    calibrate(model, batches, top_k=NUM_NEURONS, held_out=0, batch_size=batch_size, progress=False)


def in_turns(sides: dict[str, Run], device: str, turns: int) -> dict[str, list[float]]:
    """Seconds of each side in each turn; who begins a turn rotates."""
    on_gpu = torch.device(device).type == "cuda"

    def seconds(run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    once = 0.0
    for run in [*sides.values()] * 2:  # warm-up: compilation, caches, clocks
        once = seconds(run, 1)
    calls = max(1, min(100, round(0.1 / once)))  # a short call is repeated, so that the clock's grain does not show
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(sides[name], calls))
    return times


def compared(times: dict[str, list[float]]) -> Row:
    """Median times of the first two sides, and the ratios to the first."""
    base, other, noise = times
    ratios = sorted(b / a for a, b in zip(times[base], times[other], strict=True))
    quarter = len(ratios) // 4
    return {
        f"{base}_ms": round(1e3 * statistics.median(times[base]), 3),
        f"{other}_ms": round(1e3 * statistics.median(times[other]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "middle_half": f"{ratios[quarter]:.3f}-{ratios[-1 - quarter]:.3f}",
        "noise": round(statistics.median(b / a for a, b in zip(times[base], times[noise], strict=True)), 4),
        "turns": len(ratios),
    }


def peak_memory(device: str) -> float:
    """MiB"""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not ru_maxrss where it can be helped: Linux hands the parent's peak down to a child.
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def printed(rows: Iterator[Row]) -> Iterator[Row]:
    """Passes the rows on, and prints them as they come."""
    widths: list[int] = []
    for row in rows:
        if not widths:
            widths = [max(len(key), 8) for key in row]
            print("  ".join(f"{key:>{width}}" for key, width in zip(row, widths, strict=True)))
        print("  ".join(f"{value:>{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)
        yield row


if __name__ == "__main__":
    main()
