"""What other processes can read of this one's environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpo.credentials import secret_files, take_from_environment


def test_values_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2 Ă")
    monkeypatch.setenv("AN_EMPTY_ONE", "")
    names = ("A_SECRET", "AN_EMPTY_ONE", "ONE_THAT_IS_NOT_SET")
    assert take_from_environment(names) == {"A_SECRET": "hunter2 Ă"}
    assert take_from_environment(names) == {}


def test_files_with_secrets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HPO_STORAGE_FILE", "RAY_AUTH_TOKEN_PATH", "PGPASSFILE"):
        monkeypatch.setenv(name, f"/secret/{name}")
    found = {str(path) for path in secret_files()}
    assert {"/secret/HPO_STORAGE_FILE", "/secret/RAY_AUTH_TOKEN_PATH", "/secret/PGPASSFILE"} <= found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_process_started_later_finds_no_secret_in_proc() -> None:
    code = (
        "import subprocess; from hpo.credentials import take_from_environment\n"
        "look = ['sh', '-c', 'cat /proc/$PPID/environ; env']\n"
        "assert b'hunter2' in subprocess.check_output(look)\n"
        "assert take_from_environment(['A_SECRET']) == {'A_SECRET': 'hunter2'}\n"
        "seen = subprocess.check_output(look); assert b'OTHER=kept' in seen; assert b'hunter2' not in seen, seen\n"
    )
    environment = {"A_SECRET": "hunter2", "OTHER": "kept", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
