"""Whether a machine can run the trials of another machine's driver."""

from __future__ import annotations

import errno
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from hpo.search.cluster.versions import (
    describe_versions,
    find_problem,
    hash_source,
    list_differences,
    smallest_gpu_bytes,
)
from tests.factories import ROOT


@pytest.fixture(autouse=True)
def uncached() -> None:
    describe_versions.cache_clear()


def test_two_machines_with_the_same_versions_have_no_difference() -> None:
    here = describe_versions()
    assert set(here) == {"python", "ray", "torch", "hpo"}
    assert all(here.values())
    assert list_differences(here, dict(here)) == ""


def test_a_difference_names_the_package_and_both_versions() -> None:
    here = describe_versions()
    there = here | {"torch": "1.0.0", "ray": ""}
    assert list_differences(here, there) == f"ray is not installed; torch is 1.0.0 and {here['torch']} here"


def test_what_a_machine_does_not_say_is_not_compared() -> None:
    assert list_differences({"hpo": "1", "torch": "2"}, {"hpo": "1"}) == ""


def test_builds_of_one_torch_for_different_devices_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.15.0+cu130")
    assert describe_versions()["torch"] == "2.15.0"


def test_a_package_that_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", find)
    found = describe_versions()
    assert (found["ray"], found["torch"]) == ("", "")
    assert found["hpo"].startswith("not installed, source ")


def test_two_checkouts_of_one_version_differ_if_their_source_does(tmp_path: Path) -> None:
    for package in ("hpo", "storage"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert hash_source(tmp_path) == hash_source()
    (tmp_path / "notes.py").write_text("not a part of hpo")
    hash_source.cache_clear()
    assert hash_source(tmp_path) == hash_source()
    with (tmp_path / "storage" / "errors.py").open("a") as file:
        file.write("#")
    hash_source.cache_clear()
    assert hash_source(tmp_path) != hash_source()


def test_a_folder_that_cannot_be_created_is_a_problem_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_problem(describe_versions(), str(tmp_path / "runs" / "checkpoints")) is None
    assert (tmp_path / "runs" / "checkpoints").is_dir()
    (tmp_path / "file").write_text("")
    problem = find_problem(describe_versions(), str(tmp_path / "file" / "checkpoints"))
    assert problem is not None
    assert problem.reason == f"it cannot write to {tmp_path}/file/checkpoints: {os.strerror(errno.ENOTDIR)}"
    assert "--checkpoints" in problem.remedy
    monkeypatch.setattr(os, "access", lambda *_: False)
    problem = find_problem(describe_versions(), str(tmp_path))
    assert problem is not None
    assert problem.reason == f"it cannot write to {tmp_path}: Permission denied"


def test_other_versions_are_a_problem_before_the_disk_is_touched(tmp_path: Path) -> None:
    problem = find_problem(describe_versions() | {"torch": "0.1"}, str(tmp_path / "runs"))
    assert problem is not None
    assert problem.reason == f"torch is {describe_versions()['torch']} and 0.1 here"
    assert "uv sync" in problem.remedy
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("prints", "gib"),
    [("echo 81559; echo 15360", 15), ("echo '[N/A]'", 0), ("exit 9", 0), ("", 0), (None, 0)],
    ids=["two GPUs", "unknown", "no driver", "no GPU", "no nvidia-smi"],
)
def test_the_smallest_gpu_is_asked_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str | None, gib: int
) -> None:
    if prints is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{prints}\n")
        program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu_bytes() == gib * 2**30
