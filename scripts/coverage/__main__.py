"""Check every Vision Transformer that the libraries can build, and count those that testreg supports.

    python scripts/coverage                        # all: some minutes on two cores, nothing is downloaded
    python scripts/coverage --library timm --match dinov2

check.py says what supported, refused, absent and failed mean.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # set before the libraries are imported, which read it
sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

from coverage.check import Verdict, check_named, start_worker
from coverage.registry import registry

LIBRARIES = ("timm", "open_clip", "transformers", "torchvision", "hub")
WORDS = ("supported", "refused", "FAILED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--match", default="", metavar="REGEX", help="only names in which it is found")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--brief", action="store_true", help="leave out the rows of what is supported")
    args = parser.parse_args()
    chosen = [
        (library, name)
        for library, name in registry()
        if args.library in (None, library) and re.search(args.match, name)
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers, initializer=start_worker) as pool:
        verdicts = list(tqdm(pool.imap(check_named, chosen, chunksize=4), total=len(chosen), disable=None))
    for each in verdicts:
        if not args.brief or each.word != "supported":
            print(f"{each.library:12} {each.name:60} {each.word}{': ' if each.reason else ''}{each.reason}")
    _print_table(verdicts)
    return int(any(each.word == "FAILED" for each in verdicts))


def _print_table(verdicts: Sequence[Verdict]) -> None:
    counts = Counter((each.library, each.word) for each in verdicts)
    totals = Counter(each.word for each in verdicts)
    print("\n| library | supported | refused | failed |\n|---|---|---|---|")
    for library in LIBRARIES:
        print(f"| {library} | {' | '.join(str(counts[library, word]) for word in WORDS)} |")
    if totals["absent"]:
        print(f"\n{totals['absent']} absent from the installed releases")
    print("\n" + ", ".join(f"{totals[word]} {word.lower()}" for word in WORDS))


if __name__ == "__main__":
    raise SystemExit(main())
