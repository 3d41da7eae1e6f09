"""SQLite on a network file system: refused where it can be noticed, before anything is created."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from storage.database import open_database, open_for_reading
from storage.errors import StorageError
from storage.mounts import network_file_system

Mounts = Callable[[dict[Path, str]], None]


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    """Make the operating system list these mounts: {folder: kind}."""

    def replace(kinds: dict[Path, str]) -> None:
        found = [SimpleNamespace(mountpoint=str(folder), fstype=kind) for folder, kind in kinds.items()]
        monkeypatch.setattr(psutil, "disk_partitions", lambda *, all: found)

    return replace


def test_the_nearest_mount_counts(tmp_path: Path, mounts: Mounts) -> None:
    mounts({Path("/"): "ext4", tmp_path: "nfs4", tmp_path / "scratch": "xfs"})
    assert network_file_system(tmp_path / "runs" / "hpo.db") == "nfs4"
    assert network_file_system(tmp_path / "scratch" / "runs" / "hpo.db") == ""
    assert network_file_system(tmp_path.parent / "hpo.db") == ""
    assert network_file_system(tmp_path.with_name(f"{tmp_path.name}-2") / "hpo.db") == ""  # not below it: a longer name


def test_a_link_to_a_network_file_system_is_followed(tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "shared")
    mounts({Path("/"): "ext4", tmp_path / "shared": "lustre"})
    assert network_file_system(tmp_path / "runs" / "hpo.db") == "lustre"


def test_without_a_list_of_mounts_a_disk_counts_as_local(tmp_path: Path, mounts: Mounts) -> None:
    mounts({})
    assert network_file_system(tmp_path / "hpo.db") == ""


def test_a_sqlite_file_on_it_is_refused_before_anything_is_created(tmp_path: Path, mounts: Mounts) -> None:
    mounts({Path("/"): "ext4", tmp_path: "NFS"})
    with pytest.raises(StorageError, match=r"network file system \(nfs\).*local disk.*PostgreSQL"):
        open_database(f"sqlite:///{tmp_path}/runs/hpo.db")
    assert not list(tmp_path.iterdir())


def test_one_that_is_there_can_still_be_read(tmp_path: Path, mounts: Mounts) -> None:
    url = f"sqlite:///{tmp_path}/hpo.db"
    open_database(url).close()
    mounts({Path("/"): "ext4", tmp_path: "cifs"})
    database = open_for_reading(url)
    assert database is not None
    database.close()
    with pytest.raises(StorageError, match="cifs"):
        open_database(url)
