"""Find the register neurons of a model and write them as JSON. This is the same as `testreg calibrate`."""

import sys

from testreg.cli import main

raise SystemExit(main(["calibrate", *sys.argv[1:]]))
