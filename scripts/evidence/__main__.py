"""What registers do for a real network whose outliers emerged by themselves, and what they do not.

    python scripts/evidence MODEL --images PHOTOS --data DATASETS --note NOTE -o JSON [--neurons FILE]

Columns are the network as it is, testreg's neurons, other ways to choose neurons or to move them, and controls:
columns.py says which. Rows are what the network shows of its outliers (shows.py), and the tasks of `testreg evaluate`
on samples that two cores manage: rows.py says on which, and for which columns. The data and the probes, and their
seeds, are the same for all columns. Each value has its difference from the plain network, with a 95 % interval by the
paired bootstrap over images.

DATASETS holds coco256, livingroom-rgbd and CIFAR-10 as parquet files; PHOTOS are others, on which nothing is evaluated:
the paper's score and static registers are made on these.

What the network gives for images is kept in `--work`, and what the JSON has already is not computed anew, if it is of
the same neurons: so a run that was interrupted goes on, and rows and columns can be done one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from restoration.tables import write
from restoration.tasks import evaluated

from evidence import tables
from evidence.columns import COLUMNS, PLAIN, Columns, in_bfloat16, pairs
from evidence.rows import ROWS, limited
from testreg.evaluation.features import cache_folder
from testreg.io.loading import LoadedModel, load_model
from testreg.neurons import UnverifiedNeuronsWarning, resolve

PUBLISHED = "openai-clip-vitb16-jroth-224"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    warnings.simplefilter("ignore", UnverifiedNeuronsWarning)  # here they are measured
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model, any_size=True)
    columns = Columns(
        LoadedModel(loaded.model, loaded.transform, PLAIN),
        chosen=resolve(args.neurons, loaded.model).truncate(),
        published=resolve(args.published, loaded.model).truncate(),
        images=args.images,
        kept=args.work,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {
        "format": "testreg-evidence",
        "model": args.model,
        "note": args.note,
        "limit": args.limit,
        "bfloat16": args.bfloat16,
        "columns": {name: columns.facts(name) for name in COLUMNS},
        "tasks": {},
    }
    made["tasks"] = done_before(args.output, made)
    for name in args.rows:
        row, task = ROWS[name], limited(ROWS[name], args.limit)
        dtype = "bfloat16" if args.bfloat16 and not row.exact else "float32"
        result = made["tasks"].setdefault(name, {})
        wanted = [each for each in args.columns or row.columns if each not in result.get("metrics", {})]
        with in_bfloat16(loaded.model) if dtype == "bfloat16" else nullcontext():
            for moved, other in pairs(columns, wanted):
                by_neurons = {} if moved is None else {moved: columns.moved(moved)}
                others = {} if other is None else {other: columns.network_of(other)}
                cache = args.work / f"features-{dtype}"
                add(result, evaluated(task, columns.network, by_neurons, others, args.data, cache=cache), dtype)
                made["tasks"] = {each: made["tasks"][each] for each in ROWS if made["tasks"].get(each)}
                write(args.output, made)
        print(tables.of_intervals({**made, "tasks": {name: result}}), flush=True)
    print(tables.of_times(made))


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a network with outliers, as `testreg.load_model` takes it")
    parser.add_argument("--neurons", help="testreg's list (default: the bundled one of the checkpoint)")
    parser.add_argument("--published", default=PUBLISHED, help="the list that others published (default: %(default)s)")
    parser.add_argument("--images", required=True, help="folder of photographs on which nothing is evaluated")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--note", required=True, help="which weights these are: shown with every table")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--columns", nargs="+", choices=list(COLUMNS), help="(default: as rows.py says)", metavar="COLUMN"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N images of each split, and N steps of a fit")
    parser.add_argument("--bfloat16", action="store_true", help="tasks under bfloat16 autocast: all rows but shows")
    parser.add_argument("--work", type=Path, default=cache_folder().parent / "evidence", help="what is kept")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON for the results")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def done_before(file: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The tasks that a file of results has, with those of its columns that are still what they were."""
    if not file.is_file():
        return {}
    before = json.loads(file.read_text(encoding="utf-8"))
    if any(before.get(key) != made[key] for key in ("format", "model", "limit", "bfloat16")):
        return {}
    same = {PLAIN} | {name for name, facts in before["columns"].items() if facts == made["columns"].get(name)}
    by_column = ("metrics", "difference", "cpu_seconds")
    return {
        task: result | {key: {name: each for name, each in result[key].items() if name in same} for key in by_column}
        for task, result in before["tasks"].items()
        if task in ROWS and len(same & set(result["metrics"])) > 1
    }


def add(result: dict[str, Any], found: dict[str, Any], dtype: str) -> None:
    """Add what a task says of some more columns, whose time is shared out among them."""
    seconds = {name: round(found["cpu_seconds"] / len(found["difference"])) for name in found["difference"]}
    for key in ("metrics", "difference"):
        result.setdefault(key, {}).update(found[key])
    result.setdefault("cpu_seconds", {}).update(seconds)
    result |= {
        "data": found["data"],
        "protocol": {**found["protocol"], "dtype": dtype},
        "baselines": found["baselines"],
    }


if __name__ == "__main__":
    main()
