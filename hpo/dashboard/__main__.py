"""`python -m hpo.dashboard` runs `hpo dashboard`."""

import runpy
import sys

# Run as a program and not imported: the command line imports this package, not the other way round.
sys.argv.insert(1, "dashboard")
runpy.run_module("hpo", run_name="__main__")
