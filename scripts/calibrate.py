"""The same as `testreg calibrate`: find the register neurons of a model and write them as JSON."""

import sys

from testreg.cli import main

raise SystemExit(main(["calibrate", *sys.argv[1:]]))
