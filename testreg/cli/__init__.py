"""The command line: testreg demo | list | diagnose | calibrate | apply | show | extract | evaluate.

`app` is the table of the commands, one file each; `invocation` is what all of them have in common. A command imports
what it needs when it runs, so that --help is there at once, and an interrupt at any time is one line.
"""

from testreg.cli.app import main as main
