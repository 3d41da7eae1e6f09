"""The folder that a search is started from, as a package for the nodes of a Ray cluster. Does not import ray.

    pack(Path.cwd()) -> a zip file -> Ray's runtime environment unpacks it on each node -> Path.cwd() / CODE_DIR in a worker

Ray puts the folder that it unpacks first on the path of its workers, where a file such as pandas.py would replace a package.
So the package has all files in one folder below, whose name Python cannot import; `load_trainable` puts that one last.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from pathspec import GitIgnoreSpec

from hpo.errors import SettingError
from hpo.paths import PACKAGE_DIR

CODE_DIR = "code-of-the-search"  # in the folder that Ray unpacks; the hyphens keep Python from importing it
MAX_BYTES = 100 * 2**20  # of all files: the head of the cluster holds the package in its memory
MAX_FILES = 20_000
IGNORE_FILES = (".gitignore", ".rayignore")  # the second one decides
# In the syntax of .gitignore. A line such as !weights.pt in .rayignore brings a file back.
LEFT_OUT = (
    ".*",
    "__pycache__/",
    "*.egg-info/",
    "*.db",
    "*.db-*",
    "*.sqlite",
    "*.sqlite3",
    "*.sqlite-*",
    "*.sqlite3-*",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.safetensors",
    "*.pem",
    "*.key",
)
LISTED = 5  # the largest files that the error names

# Never the same folder twice: the same files have the same package, which each node has once.
_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class _File:
    name: str  # relative to the folder, with slashes
    path: Path
    bytes: int
    mode: int


def pack(folder: Path, left_out: Iterable[Path] = ()) -> bytes:
    """Return a zip file with what a search may need of the folder that it is started from.

    Left out are `LEFT_OUT`, what .gitignore and .rayignore in the folder and below it name, virtual environments, hpo
    itself, and `left_out`. Links are followed. The same files give the same bytes.

    Args:
        folder: with the trainable, or the script, and what they import and read.
        left_out: other files and folders, such as `runs`, the data sets and files with passwords. One that contains the
            folder itself does not count.

    Raises:
        SettingError: the files are too many or too large, or one cannot be read.
    """
    folder = Path(os.path.realpath(folder))
    files: list[_File] = []
    for file in _walk(folder, {Path(os.path.realpath(path)) for path in left_out}):
        files.append(file)
        if len(files) > MAX_FILES:
            raise _too_large(folder, files, f"more than {MAX_FILES:,} files", f"{MAX_FILES:,}")
    size = sum(file.bytes for file in files)
    if size > MAX_BYTES:
        limit = f"{MAX_BYTES / 2**20:,.0f} MiB"
        raise _too_large(folder, files, f"{size / 2**20:,.0f} MiB in {len(files):,} files", limit)
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as package:
        package.writestr(ZipInfo(f"{CODE_DIR}/", _TIME), b"")  # the scripts run there, even if it is empty
        for file in sorted(files, key=lambda each: each.name):
            info = ZipInfo(f"{CODE_DIR}/{file.name}", _TIME)
            info.external_attr = (stat.S_IFREG | file.mode) << 16
            info.compress_type = ZIP_DEFLATED
            try:
                package.writestr(info, file.path.read_bytes())
            except (OSError, UnicodeEncodeError) as error:
                raise _unreadable(file.path, error) from None
    return buffer.getvalue()


def _walk(
    folder: Path, left_out: set[Path], prefix: str = "", specs: Sequence[tuple[str, GitIgnoreSpec]] = ()
) -> Iterator[_File]:
    """Yield the files of a folder that are sent.

    Args:
        folder: a real path.
        left_out: real paths.
        prefix: the folder's name, relative to the first one, with a slash at its end; empty for the first one.
        specs: [(prefix, what is left out below it)] of the folders above, the first one first.
    """
    lines = [*(LEFT_OUT if not prefix else ()), *_read_ignore_files(folder)]
    specs = (*specs, (prefix, GitIgnoreSpec.from_lines(lines)))
    try:
        entries = sorted(os.scandir(folder), key=lambda each: each.name)
    except OSError as error:
        raise _unreadable(folder, error) from None
    for entry in entries:
        real, name = Path(os.path.realpath(entry.path)), f"{prefix}{entry.name}"
        try:
            status = entry.stat()
        except PermissionError as error:
            if _is_ignored(name, specs) or _is_ignored(f"{name}/", specs):
                continue
            raise _unreadable(Path(entry.path), error) from None
        except OSError:  # a link to nothing
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        if real in left_out or _is_ignored(name + "/" * is_folder, specs):
            continue
        if stat.S_ISREG(status.st_mode):
            yield _File(name, Path(entry.path), status.st_size, stat.S_IMODE(status.st_mode) | stat.S_IRUSR)
        elif is_folder and not _is_environment(real) and real not in _OURS and real != folder:
            # The folder itself is left out below: a link may lead back to it.
            yield from _walk(real, left_out | {folder}, f"{name}/", specs)


_OURS = {PACKAGE_DIR, PACKAGE_DIR.parent / "storage"}  # each node has them installed


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists()


def _read_ignore_files(folder: Path) -> list[str]:
    lines: list[str] = []
    for name in IGNORE_FILES:
        path = folder / name
        if path.is_file():
            try:
                lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError as error:
                raise _unreadable(path, error) from None
    return lines


def _is_ignored(name: str, specs: Sequence[tuple[str, GitIgnoreSpec]]) -> bool:
    """Return whether a file is left out: the deepest folder that says something about it decides, as in git."""
    for prefix, spec in reversed(specs):
        include = spec.check_file(name.removeprefix(prefix)).include
        if include is not None:
            return include
    return False


def _too_large(folder: Path, files: Sequence[_File], found: str, limit: str) -> SettingError:
    largest = sorted(files, key=lambda each: -each.bytes)[:LISTED]
    listed = ", ".join(f"{each.name} ({each.bytes / 2**20:,.1f} MiB)" for each in largest)
    return SettingError(
        f"the code of a search is sent to the nodes of the Ray cluster, and {folder} has {found}: at most {limit} can be "
        f"sent. The largest: {listed}. Name what the search does not need in a .gitignore or .rayignore there, or start it "
        "from a folder with its code only. Data sets belong into the folder that --data-dir names, which is not sent"
    )


def _unreadable(path: Path, error: OSError | UnicodeEncodeError) -> SettingError:
    reason = error.strerror if isinstance(error, OSError) else "its name is not UTF-8"
    shown = os.fsencode(path).decode(errors="backslashreplace")
    return SettingError(
        f"the code of a search is sent to the nodes of the Ray cluster, but {shown} cannot be: {reason}. "
        "Name it in a .rayignore in its folder if the search does not need it"
    )
