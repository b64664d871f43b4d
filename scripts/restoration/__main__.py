"""Measure what registers restore in a real pretrained network into which register neurons were planted.

The network has no outliers (patches of huge norm) by itself. A mechanism that makes outliers is planted into it
(`scripts/planting`), and `testreg.calibrate`, which is told nothing, looks for its neurons. The untouched network is
the truth.

    python scripts/restoration MODEL --images PHOTOS --test OTHERS -o JSON [--tasks all --data DATASETS] [--picture PNG]

Ways to remove the outliers: `testreg` moves the neurons that calibration chooses; `paper` moves those that the paper's
score (mean |activation|) ranks first, as many as were planted; `random` moves random neurons of the same blocks, as
many as testreg chose; `zeroing` sets testreg's neurons to zero at all tokens; `planted neurons` moves all that were
planted. `--scores` adds those that other scores rank first, as many as were planted. The first table says for each way
how many outliers are left, and how near CLS and patches are to those of the untouched network, on images that neither
planting nor calibration has seen.

With `--tasks`, these networks also do tasks of `testreg evaluate`, see tasks.py. DATASETS is a folder with the data
sets that it names, and with CIFAR-10 as parquet files. Planted networks, neurons and features are kept in `--work`, so
that an interrupted run can be continued. The results do not say how often real networks have such neurons.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from planting import Mechanism

import testreg
from restoration import closeness, picture, tables, tasks
from restoration.networks import Networks, zeroed_copy
from restoration.tables import write
from testreg.evaluation.features import cache_folder
from testreg.io.images import ImageStream
from testreg.io.loading import LoadedModel, load_model
from testreg.io.preprocessing import OwnTransform
from testreg.measure.score import Score


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    untouched = load_model(args.model).model.eval()
    work = args.work / f"{args.mechanism}-{args.seed}"
    work.mkdir(parents=True, exist_ok=True)
    networks = Networks(
        args.model, untouched, preprocessed_images(untouched, args.images), args.mechanism, args.seed, work
    )
    results: dict[str, Any] = {
        "format": "testreg-restoration",
        "model": args.model,
        "mechanism": args.mechanism,
        "seed": args.seed,
        "calibrated_on": len(networks.photographs),
        "compared_on": args.num_test,
        "ways": ways(networks, preprocessed_images(untouched, args.test)[: args.num_test], args.scores),
        "tasks": {},
    }
    write(args.output, results)
    print(tables.of_ways(results), flush=True)
    if args.picture:
        picture.save(networks, args.picture)
    others = {"untouched": untouched}
    if args.tasks:
        others["zeroing"] = zeroed_copy(networks.planted, networks.chosen)
    models = {name: LoadedModel(model, OwnTransform(model), name) for name, model in others.items()}
    planted = LoadedModel(networks.planted, OwnTransform(networks.planted), "planted")
    moved, settings = networks.moved(["activation"]), {"cache": args.work / "features"}
    if args.num_images is not None:
        settings["num_images"] = args.num_images
    for name in args.tasks:
        results["tasks"][name] = tasks.evaluated(tasks.TASKS[name], planted, moved, models, args.data, **settings)
        write(args.output, results)
        print(tables.of_tasks(results), flush=True)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a network without outliers, of 12 blocks or more, such as hf:FOLDER")
    parser.add_argument("--images", required=True, help="folder of photographs: plant and calibrate")
    parser.add_argument("--test", required=True, help="folder of others: compare with the untouched network")
    parser.add_argument("--num-test", type=int, default=48)
    parser.add_argument("--mechanism", choices=get_args(Mechanism), default="spread")
    parser.add_argument("--seed", type=int, default=0, help="of what is planted")
    parser.add_argument("--scores", nargs="*", choices=get_args(Score), default=["activation"], metavar="SCORE")
    parser.add_argument("--tasks", nargs="+", choices=["all", *tasks.TASKS], default=[], metavar="TASK")
    parser.add_argument("--data", type=Path, help="folder of the tasks' data sets")
    parser.add_argument("--num-images", type=int, help="at most so many of each split, for a quick look at the tasks")
    parser.add_argument("--picture", type=Path, help="file for a picture of the three networks")
    parser.add_argument("--work", type=Path, default=cache_folder().parent / "restoration", help="what is kept")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON for the results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    if "all" in args.tasks:
        args.tasks = list(tasks.TASKS)
    if args.tasks and args.data is None:
        parser.error("--tasks needs --data, the folder of their data sets")
    return args


def preprocessed_images(model: nn.Module, folder: str) -> Tensor:
    """The images of a folder, preprocessed as the model's library does, (n, 3, h, w)."""
    return torch.stack([image for _, image in ImageStream(folder, OwnTransform(model)).numbered()])


def ways(networks: Networks, unseen: Tensor, scores: list[Score]) -> dict[str, Any]:
    """{way: numbers of neurons, and how near its network is to the untouched one on unseen images}."""
    model, planted = networks.planted, networks.planted_neurons
    untouched, before = closeness.observe(networks.untouched, unseen), closeness.observe(model, unseen)
    results = {
        "nothing moved": closeness.counts({}, planted) | closeness.figures(before, before, untouched),
        "untouched network": closeness.counts({}, planted) | closeness.figures(before, untouched, untouched),
    }
    for way, neurons in {**networks.moved(scores), "planted neurons": planted}.items():
        with testreg.patched(model, neurons):
            after = closeness.observe(model, unseen)
        results[way] = closeness.counts(neurons, planted) | closeness.figures(before, after, untouched)
    with networks.zeroed():
        after = closeness.observe(model, unseen)
    results["zeroing"] = closeness.counts(networks.chosen, planted) | closeness.figures(before, after, untouched)
    return results


if __name__ == "__main__":
    main()
