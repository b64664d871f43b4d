"""Measure what testreg costs: patched forwards against plain ones, calibration against plain forwards, and more.

    python scripts/benchmark                      # forward, training, calibration, memory: an hour on one CPU core
    python scripts/benchmark --quick              # a first look: batch 1, eager, few repeats
    python scripts/benchmark --only forward --device cuda --json numbers.json
    python scripts/benchmark --only search --pretrained hf:FOLDER --images PHOTOS
    python scripts/benchmark --only budget --model vit_large_patch14_dinov2 --budget 600 --threads 2
    python scripts/benchmark --only against --against CHECKOUT

The parts:

- `forward`, `training`: a forward, and a forward with backward, of the patched model. `one_more_token` is the plain
  model with one more token, the least that any register costs.
- `operations`: the operations that a patched forward has more than a plain one, from a profile.
- `calibration`: only diagnosis and ranking. `search`: all of `calibrate` with its defaults, over plain forwards of the
  images that it reads, for a pretrained network without outliers into which a mechanism is planted.
- `budget`: all of `calibrate`, limited to a number of seconds.
- `memory`, `scale`: peak memory, and the time of up to 4096 images with a small planted model.
- `processes`, `killed`: a calibration by several processes, and how they end if one of them is killed.
- `import`: the time of `import testreg` and of `testreg --help`.
- `against`: hooks that keep all activations, and a checkout of the paper's released code.
- `merging`: token merging, another method that changes the number of tokens, for comparison.

Weights are random, since speed does not depend on them. The sides of a comparison run in turns, in one process and with
the same weights, so that disturbances meet all of them. A ratio is the median over the turns. `noise` is the ratio of
the first side to itself, measured as if it were another side: ratios are uncertain by as much as it differs from 1.
With one CPU thread, times are CPU time.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark.against import against
from benchmark.calibration import budget, calibration, memory, scale, search
from benchmark.forward import DTYPES, forward, training
from benchmark.imports import imports
from benchmark.measuring import Row, printed
from benchmark.merging import merging
from benchmark.operations import operations
from benchmark.processes import killed, processes
from testreg.files import replacing

PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "forward": forward,
    "operations": operations,
    "training": training,
    "calibration": calibration,
    "memory": memory,
    "search": search,
    "budget": budget,
    "scale": scale,
    "processes": processes,
    "killed": killed,
    "import": imports,
    "against": against,
    "merging": merging,
}
USUAL = ("forward", "training", "calibration", "memory")  # the parts that run by default


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"environment": environment(args)}
    print(" · ".join(f"{key} {value}" for key, value in results["environment"].items()))
    for part in args.only:
        print(f"\n{part}")
        results[part] = list(printed(PARTS[part](args)))
    if args.json is not None:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm VisionTransformer of 9 blocks or more")
    parser.add_argument("--repeats", type=int, help="turns of each comparison (30, with --quick 6)")
    parser.add_argument("--quick", action="store_true", help="batch 1, eager, few repeats and images")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=USUAL, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--pretrained", help="for search: the name of a network of 12 blocks or more, without outliers")
    parser.add_argument("--images", help="for search: a folder of photographs")
    parser.add_argument("--mechanisms", nargs="+", default=["triggers", "spread"], metavar="MECHANISM")
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="for budget (%(default)s)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="for against: a checkout of the released code")
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes of the forward (1 8)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="(fp32 bf16)")
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"), help="(eager compiled)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args(arguments)
    if "search" in args.only and not (args.pretrained and args.images):
        parser.error("search needs --pretrained and --images")
    if args.against is not None and "against" not in args.only:
        parser.error("--against is for --only against")
    args.repeats = args.repeats or (6 if args.quick else 30)
    args.batch = args.batch or ([1] if args.quick else [1, 8])
    args.dtype = args.dtype or list(DTYPES)
    args.mode = args.mode or (["eager"] if args.quick else ["eager", "compiled"])
    return args


def environment(args: argparse.Namespace) -> dict[str, str | int]:
    """What was measured, and on what."""
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


if __name__ == "__main__":
    main()
