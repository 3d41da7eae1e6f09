"""`python -m hpo.dashboard` is `hpo dashboard`."""

import runpy
import sys

# Started as a program, not imported: imports run one way, from the command line to this package.
sys.argv.insert(1, "dashboard")
runpy.run_module("hpo", run_name="__main__")
