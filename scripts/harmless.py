"""Measure what a patch changes in a network without outliers, where it should change nothing.

    python scripts/harmless.py MODEL --data DATASETS --random 10 -o docs/evaluations/harmless.json

All tasks of `scripts/restoration` are done with the network as it is and patched. `--random N` moves N random neurons
to a register; `--neurons` moves those of a list.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from restoration.tables import write
from restoration.tasks import TASKS

import testreg
from testreg.evaluation.evaluation import Settings
from testreg.families import Tower, find_tower
from testreg.io.loading import load_model


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model)
    neurons = args.neurons or random_neurons(find_tower(loaded.model), args.random, Settings().seed)
    results: dict[str, Any] = {"format": "testreg-harmless", "model": args.model, "tasks": {}}
    for name in args.tasks:
        task, start = TASKS[name], time.process_time()
        size_option = {"size": args.size} if args.size is not None else {}
        result = task.evaluate(
            args.model, args.data / task.data, neurons=neurons, cache=args.cache, **{**task.options, **size_option}
        )
        print(result, flush=True)
        results["tasks"][name] = result.to_json() | {"cpu_seconds": round(time.process_time() - start)}
        write(args.output, results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a name, as `testreg.load_model` takes it")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' data sets")
    moved = parser.add_mutually_exclusive_group(required=True)
    moved.add_argument("--neurons", help="a list, as `testreg.patch` takes it")
    moved.add_argument("--random", type=int, metavar="N", help="as many random neurons, of any block but the last")
    parser.add_argument("--size", type=int, help="side of all images, instead of what the tasks say")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--cache", type=Path, help="where features are kept (default: as testreg evaluate)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON for the results")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def random_neurons(tower: Tower, count: int, seed: int) -> testreg.RegisterNeurons:
    """`count` random neurons of all blocks but the last, where moving neurons can no longer change patches."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm((tower.depth - 1) * tower.mlp_width, generator=generator)[:count].tolist()
    blocks: dict[int, list[int]] = {}
    for index in indices:
        blocks.setdefault(index // tower.mlp_width, []).append(index % tower.mlp_width)
    return testreg.RegisterNeurons.from_blocks(blocks)


if __name__ == "__main__":
    main()
