"""Measures how long the package takes to import."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmark.measuring import Row

STATEMENTS = (  # a new process runs the statements of a line one after the other, and measures each
    ("import torch", "import testreg", "testreg.patch"),
    ("from testreg.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",),
)
SCRIPT = """
import json, sys, time
seen = []
for statement in sys.argv[1:]:
    wall, cpu = time.perf_counter(), time.process_time()
    exec(statement)
    seen.append([time.perf_counter() - wall, time.process_time() - cpu, "torch" in sys.modules])
print()
print(json.dumps(seen))
"""


def imports(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the medians over five new processes, without the start of the interpreter."""
    for statements in STATEMENTS:
        times_of_runs = []
        for _ in range(5):
            command = [sys.executable, "-c", SCRIPT, *statements]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            times_of_runs.append(json.loads(output.splitlines()[-1]))
        for statement, measured in zip(statements, zip(*times_of_runs, strict=True), strict=True):
            wall, cpu, has_torch = zip(*measured, strict=True)
            yield {
                "statement": f"{'testreg --help' if 'main' in statement else statement:14}",
                "wall_s": round(statistics.median(wall), 3),
                "cpu_s": round(statistics.median(cpu), 3),
                "torch": any(has_torch),
            }
