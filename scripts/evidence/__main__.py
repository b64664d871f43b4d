"""Measure what registers do for a real network that has outliers (patches of huge norm), and what they do not.

    python scripts/evidence MODEL --images PHOTOS --data DATASETS --note NOTE -o JSON [--neurons FILE]

The results are a table. Its columns (columns.py) are the network as it is, the network with testreg's neurons moved to
registers, other ways to choose or move neurons, and controls. Its rows (rows.py) are `shows`, which measures outliers
and what they do to attention and embeddings, and the tasks of `testreg evaluate` on small samples. Data, probes and
seeds are the same for all columns. Each value comes with its difference from the plain network, and its 95 % interval
by the paired bootstrap over images.

DATASETS is a folder with coco256, livingroom-rgbd, and CIFAR-10 as parquet files. PHOTOS is a folder of other images,
on which the paper's score ranks neurons and static registers are averaged; nothing is evaluated on them.

Features are cached in `--work`, and results that the JSON already has for the same neurons are kept. So an interrupted
run can be continued, and rows and columns can be computed in several runs.
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
    warnings.simplefilter("ignore", UnverifiedNeuronsWarning)  # this script measures what the neurons do
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
    results: dict[str, Any] = {
        "format": "testreg-evidence",
        "model": args.model,
        "note": args.note,
        "limit": args.limit,
        "bfloat16": args.bfloat16,
        "columns": {name: columns.facts(name) for name in COLUMNS},
        "tasks": {},
    }
    results["tasks"] = unchanged_results(args.output, results)
    for name in args.rows:
        row, task = ROWS[name], limited(ROWS[name], args.limit)
        dtype = "bfloat16" if args.bfloat16 and not row.exact else "float32"
        result = results["tasks"].setdefault(name, {})
        wanted = [each for each in args.columns or row.columns if each not in result.get("metrics", {})]
        with in_bfloat16(loaded.model) if dtype == "bfloat16" else nullcontext():
            for moved, other in pairs(columns, wanted):
                by_neurons = {} if moved is None else {moved: columns.moved(moved)}
                others = {} if other is None else {other: columns.network_of(other)}
                cache = args.work / f"features-{dtype}"
                add(result, evaluated(task, columns.network, by_neurons, others, args.data, cache=cache), dtype)
                results["tasks"] = {each: results["tasks"][each] for each in ROWS if results["tasks"].get(each)}
                write(args.output, results)
        print(tables.of_intervals({**results, "tasks": {name: result}}), flush=True)
    print(tables.of_times(results))


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


def unchanged_results(file: Path, results: dict[str, Any]) -> dict[str, Any]:
    """The tasks in an earlier file of results, with those of their columns that have not changed since."""
    if not file.is_file():
        return {}
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if any(earlier.get(key) != results[key] for key in ("format", "model", "limit", "bfloat16")):
        return {}
    same = {PLAIN} | {name for name, facts in earlier["columns"].items() if facts == results["columns"].get(name)}
    by_column = ("metrics", "difference", "cpu_seconds")
    return {
        task: result | {key: {name: each for name, each in result[key].items() if name in same} for key in by_column}
        for task, result in earlier["tasks"].items()
        if task in ROWS and len(same & set(result["metrics"])) > 1
    }


def add(result: dict[str, Any], task_result: dict[str, Any], dtype: str) -> None:
    """Add to the result of a task its values for more columns. Their time is divided equally among them."""
    seconds = {
        name: round(task_result["cpu_seconds"] / len(task_result["difference"])) for name in task_result["difference"]
    }
    for key in ("metrics", "difference"):
        result.setdefault(key, {}).update(task_result[key])
    result.setdefault("cpu_seconds", {}).update(seconds)
    result |= {
        "data": task_result["data"],
        "protocol": {**task_result["protocol"], "dtype": dtype},
        "baselines": task_result["baselines"],
    }


if __name__ == "__main__":
    main()
