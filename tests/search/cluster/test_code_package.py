"""What is sent of the folder that a search is started from."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from hpo.errors import SettingError
from hpo.search.cluster import code_package
from hpo.search.cluster.code_package import CODE_DIR, pack
from tests.factories import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a trainable and a file that it reads."""
    write(tmp_path / "project", "mine.py", "lib/part.py", "lib/data/words.txt")
    return tmp_path / "project"


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def sent(folder: Path, *left_out: Path) -> set[str]:
    """The files of the package, relative to the folder of the code."""
    with ZipFile(io.BytesIO(pack(folder, left_out))) as package:
        names = package.namelist()
    assert all(name.startswith(f"{CODE_DIR}/") for name in names)
    return {name.removeprefix(f"{CODE_DIR}/") for name in names} - {""}


CODE = {"mine.py", "lib/part.py", "lib/data/words.txt"}


def test_code_and_what_it_reads_are_sent(folder: Path) -> None:
    assert sent(folder) == CODE


def test_an_empty_folder_can_be_sent(tmp_path: Path) -> None:
    assert sent(tmp_path) == set()


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        ".venv/lib/site.py",
        ".env",
        "lib/.hidden",
        "lib/__pycache__/part.cpython-311.pyc",
        "mine.egg-info/PKG-INFO",
        "results.db",
        "results.db-wal",
        "lib/other.sqlite3",
        "weights.pt",
        "lib/model.safetensors",
        "key.pem",
    ],
)
def test_what_no_search_needs_is_left_out(folder: Path, name: str) -> None:
    write(folder, name)
    assert sent(folder) == CODE


def test_results_data_sets_and_passwords_are_left_out_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    write(folder, "runs/a", "sets/b", "lib/password", "runs.py")
    (tmp_path / "link").symlink_to(folder / "sets")
    assert sent(folder, folder / "runs", tmp_path / "link", folder / "lib" / "password") == CODE | {"runs.py"}
    assert "mine.py" in sent(folder, tmp_path, folder), "the data sets may be in the same folder or above it"


def test_a_virtual_environment_of_any_name_is_left_out(folder: Path) -> None:
    write(folder, "env/pyvenv.cfg", "env/lib/site.py")
    assert sent(folder) == CODE


def test_hpo_itself_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "hpo").symlink_to(ROOT / "hpo")
    (tmp_path / "storage").symlink_to(ROOT / "storage")
    write(tmp_path, "mine.py")
    assert sent(tmp_path) == {"mine.py"}


def test_what_gitignore_names_is_left_out_as_git_does(folder: Path) -> None:
    write(folder, "build/a.py", "big.csv", "keep.csv", "lib/big.csv", "lib/build", "lib/notes.md", "deep/b/notes.md")
    (folder / ".gitignore").write_text("/build/\n*.csv\n!keep.csv\n")
    (folder / "lib" / ".gitignore").write_text("notes.md\n!big.csv\n")
    assert sent(folder) == CODE | {"keep.csv", "lib/big.csv", "lib/build", "deep/b/notes.md"}


def test_rayignore_decides_over_gitignore_and_brings_back_what_is_left_out_by_default(folder: Path) -> None:
    write(folder, "vocabulary.json", "weights.pt", "paper.pdf")
    (folder / ".gitignore").write_text("vocabulary.json\n")
    (folder / ".rayignore").write_text("!vocabulary.json\n!weights.pt\n*.pdf\n")
    assert sent(folder) == CODE | {"vocabulary.json", "weights.pt"}


def test_links_are_followed_and_a_loop_of_them_ends(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "shared", "tool.py")
    (folder / "tools").symlink_to(tmp_path / "shared")
    (folder / "one.py").symlink_to(folder / "mine.py")
    (folder / "lib" / "up").symlink_to(folder)
    (folder / "itself").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe")
    assert sent(folder) == CODE | {"tools/tool.py", "one.py"}


def test_the_same_files_are_the_same_package_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "mine.py", (0, 0))
    package = pack(folder)
    assert pack(tmp_path / "copy") == package
    (folder / "mine.py").write_text("changed")
    assert pack(folder) != package


def test_a_script_stays_executable(folder: Path) -> None:
    (folder / "mine.py").chmod(0o750)
    with ZipFile(io.BytesIO(pack(folder))) as package:
        assert package.getinfo(f"{CODE_DIR}/mine.py").external_attr >> 16 & 0o777 == 0o750


def test_too_much_is_one_error_with_the_largest_files_and_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / "images.npy").open("wb") as file:
        file.truncate(90 * 2**20)  # takes no room on the disk
    with (folder / "lib" / "more.npy").open("wb") as file:
        file.truncate(11 * 2**20)
    with pytest.raises(SettingError) as caught:
        pack(folder)
    text = str(caught.value)
    assert f"{folder} has 101 MiB in 5 files: at most 100 MiB can be sent" in text
    assert "The largest: images.npy (90.0 MiB), lib/more.npy (11.0 MiB), " in text
    for remedy in (".gitignore", ".rayignore", "--data-dir"):
        assert remedy in text
    monkeypatch.setattr(code_package, "MAX_FILES", 2)
    with pytest.raises(SettingError, match="more than 2 files: at most 2 can be sent"):
        pack(folder)


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are Unicode")
def test_a_file_that_cannot_be_sent_is_named_with_the_remedy(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff.txt")).write_text("x")
    with pytest.raises(SettingError, match=r"\\xff\.txt cannot be: its name is not UTF-8\. Name it in a \.rayignore"):
        pack(folder)


def test_a_file_in_a_folder_that_cannot_be_entered_is_named_unless_it_is_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be missing on the nodes, without a word. For root, no folder is closed, so the error is played."""

    class Closed:
        name, path = "closed.txt", str(folder / "closed.txt")

        def stat(self) -> os.stat_result:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("hpo.search.cluster.code_package.os.scandir", lambda _: [Closed()])
    with pytest.raises(SettingError, match=r"closed\.txt cannot be: Permission denied\. Name it in a \.rayignore"):
        pack(folder)
    (folder / ".rayignore").write_text("closed.txt")
    pack(folder)
