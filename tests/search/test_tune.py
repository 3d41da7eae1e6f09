"""The parts of Ray Tune's driver and workers that can be checked without starting Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_workers_import_no_database() -> None:
    code = "import sys, hpo.search.tune; print(*[m for m in ('optuna', 'sqlalchemy', 'storage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_drivers_import_no_torch() -> None:
    code = (
        "import sys, hpo.run, hpo.api, hpo.search.tune, hpo.search.estimate, hpo.train.params, hpo.dashboard.publishing\n"
        "import storage.run; from hpo.report.page import preload; preload(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
