"""What Ray Tune's driver does around a search, without starting Ray."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock, create_autospec

import pytest

from hpo.search.coordinator import TrialCoordinator
from hpo.search.stop import StopCause

pytestmark = pytest.mark.slow  # importing ray takes seconds


def test_workers_import_no_database() -> None:
    code = "import sys, hpo.search.tune; print(*[m for m in ('optuna', 'sqlalchemy', 'storage') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_drivers_import_no_torch() -> None:
    code = (
        "import sys, hpo.run, hpo.api, hpo.search.tune, hpo.search.estimate, hpo.train.params, hpo.dashboard.publishing\n"
        "import storage.run; from hpo.report.page import preload; preload(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("was_stopping", "code"), [(True, 130), (False, 1)])
def test_when_ray_has_died_trials_are_released_and_the_user_is_notified(was_stopping: bool, code: int) -> None:
    from hpo.search import tune

    coordinator: Mock = create_autospec(TrialCoordinator, instance=True, is_interrupted=was_stopping)
    listener = Mock()
    assert tune._give_up(coordinator, listener, "the head has ended") == code
    coordinator.stop.assert_called_once_with(StopCause.INTERRUPTED)
    coordinator.release_all.assert_called_once_with()
    text = "the head has ended: the search ends. It is resumable: the same command continues it"
    listener.search_lost.assert_called_once_with(text, code)
