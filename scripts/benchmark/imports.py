"""How long the package takes to import."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmark.measuring import Row

STATEMENTS = {  # what is measured -> what comes before it, and what is measured
    "import torch": ("", "import torch"),
    "import testreg": ("", "import testreg"),
    "import testreg, after torch": ("import torch", "import testreg"),
    "testreg.patch, after torch": ("import torch", "import testreg; testreg.patch"),
    "testreg.calibrate, after torch": ("import torch", "import testreg; testreg.calibrate"),
    "testreg --help": ("", "from testreg.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"),
}
MEASURED = """
import json, sys, time
before, statement = sys.argv[1:]
exec(before)
wall, cpu = time.perf_counter(), time.process_time()
exec(statement)
print()
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, "torch" in sys.modules]))
"""


def imports(args: argparse.Namespace) -> Iterator[Row]:
    """Medians over fresh processes, the interpreter's own start left out."""
    for name, (before, statement) in STATEMENTS.items():
        seen = []
        for _ in range(5):
            command = [sys.executable, "-c", MEASURED, before, statement]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seen.append(json.loads(output.splitlines()[-1]))
        wall, cpu, has_torch = zip(*seen, strict=True)
        yield {
            "what": f"{name:30}",
            "wall_s": round(statistics.median(wall), 3),
            "cpu_s": round(statistics.median(cpu), 3),
            "has_torch": any(has_torch),
        }
