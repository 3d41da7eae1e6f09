"""The other databases that may need the files of a study: copies of this one, or those that it is a copy of."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hpo.errors import SettingError
from hpo.paths import DATABASES_FILE, study_id_of
from hpo.studies.folders import entries

if TYPE_CHECKING:
    from storage.database import Database

_MIGRATED = re.compile(r"\.version-\d+$")  # see `storage.migrations.back_up`
_SQLITE = b"SQLite format 3\0"  # a file starts with it


class OtherDatabases:
    """The other databases that may have studies of this one: copies of it, or those that it is a copy of.

    They are found next to the database, in the folder to clean, and in what each run notes in its study's folder.

    Args:
        database: this one.
        root: the folder to clean.

    Raises:
        SettingError: a folder cannot be read.
    """

    def __init__(self, database: Database, root: Path) -> None:
        self._own = database.file
        self._names = _names_of(database)
        self._ids: dict[Path, set[str] | None] = {}  # None: the file cannot be read
        folders = {root.resolve(), *([] if database.file is None else [database.file.parent])}
        problems: list[str] = []
        found = [path for folder in sorted(folders) for path in entries(folder, problems)]
        if problems:  # a copy that is not found would lose its files
            raise SettingError(
                f"{problems[0]}: copies of the database may be there, which need the files of deleted studies"
            )
        # Without the database itself, under any name: to open and close its file here would end SQLite's locks on it.
        self._files = [path for path in found if not self._is_own(path) and _is_sqlite(path)]

    def has(self, identity: str) -> str:
        """Return which database file may need the files of the study with this `hpo:id`; empty if none does."""
        return next((str(path) for path in self._files if self._may_have(path, identity)), "")

    def find(self, folder: Path) -> str:
        """Return which database may need the files of a study's folder; empty if none does."""
        identity = study_id_of(folder.name)
        for name in _noted_databases(folder):
            if "://" in name:
                if name not in self._names and _without_aliases(name) not in self._names:
                    return name
            elif self._may_have(Path(name), identity):
                return name
        return self.has(identity)

    def _may_have(self, path: Path, identity: str) -> bool:
        from storage.errors import StorageError
        from storage.parents import needed_ids

        if not path.exists() or self._is_own(path):
            return False
        if path not in self._ids:
            self._ids[path] = None
            with suppress(StorageError):
                self._ids[path] = needed_ids(path)
        ids = self._ids[path]
        return ids is None or identity in ids

    def _is_own(self, path: Path) -> bool:
        """Return whether a path leads to this database, also by a link."""
        with suppress(OSError):
            return self._own is not None and path.samefile(self._own)
        return False


def note_database(folder: Path, database: Database) -> None:
    """Note in the folder of a study that this database needs it. It is a hint only: errors of the disk are ignored."""
    from storage.database import identify

    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        name, noted = identify(database), list[str]()
        with suppress(OSError):
            noted = _noted_databases(folder)
        if name not in noted:
            # A path may contain bytes that are no characters.
            with (folder / DATABASES_FILE).open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{name}\n")


def _noted_databases(folder: Path) -> list[str]:
    """Return the databases that need the files of a study's folder. OSError if this cannot be read: any may need them."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return (folder / DATABASES_FILE).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []


def _names_of(database: Database) -> set[str]:
    """Return the names of a database that a note may have. Older versions of hpo note the URL."""
    from storage.database import identify

    return {identify(database)} | (set() if database.file else {database.url, _without_aliases(database.url)})


def _without_aliases(url: str) -> str:
    """Return the URL of a PostgreSQL database in the same form for all names of this machine, and for all users."""
    with suppress(ValueError):
        parts = urlsplit(url)
        host = "localhost" if parts.hostname in {None, "127.0.0.1", "::1"} else parts.hostname
        return f"postgresql://{host}:{parts.port or 5432}{parts.path}?{parts.query}"
    return url


def _is_sqlite(path: Path) -> bool:
    if _MIGRATED.search(path.name):  # a copy that a migration made: only as old as the version that could use it
        return False
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(_SQLITE)) == _SQLITE
    return False
