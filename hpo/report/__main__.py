"""`python -m hpo.report` is `hpo report`."""

import runpy
import sys

# Run as a program, because packages must not import the command line.
sys.argv.insert(1, "report")
runpy.run_module("hpo", run_name="__main__")
