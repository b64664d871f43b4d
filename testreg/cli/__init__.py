"""The command line: testreg demo | list | diagnose | calibrate | apply | show | extract | evaluate.

`app` lists the commands, each of which has a file; `invocation` runs them. A command imports what it needs inside its
function, so that --help is fast, and an interrupt at any time prints one line instead of a traceback.
"""

from testreg.cli.app import main as main
