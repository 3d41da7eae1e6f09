import pytest
from tests.storage.test_simulator import *  # noqa
from tests.storage.test_simulator import every_failure_is_retried, sqlite


def test_find(sqlite, monkeypatch):
    every_failure_is_retried(monkeypatch)
    for seed in range(0, 1500):
        if run_seed(sqlite, seed, ("retry", "lost answer"))[0]:
            print("FOUND", seed)
            open("/tmp/probe/found", "a").write(f"{seed}\n")
