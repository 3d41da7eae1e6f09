"""Whether the WAL next to a SQLite file belongs to the file as it is.

A killed process leaves its WAL: the last version of each page that it changed. SQLite copies these pages into the file from
time to time (a checkpoint), and the next program that opens the file uses the rest. If the file was replaced by a copy
meanwhile, it would mix the two. SQLite does not notice: a WAL does not say which file it is of.

The format of both files is fixed: https://www.sqlite.org/fileformat2.html.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

_SQLITE = b"SQLite format 3\0"
_MAGIC = (0x377F0682, 0x377F0683)
_VERSION = 3007000
_WAL_HEADER = struct.Struct(">8I")  # magic, version, bytes of a page, number of checkpoints, two salts, two checksums
_FRAME_HEADER = struct.Struct(">6I")  # page, pages of the file if it ends a transaction, two salts, two checksums
# In the first page of the file:
_COUNTER = slice(24, 28)  # at most one more after each transaction; low in a copy that `.backup` made
_COOKIE = slice(40, 44)  # a new value after each change of the schema
_STAMP = slice(60, 64)  # `PRAGMA user_version`
STAMPS = 2**31  # numbers of transactions, see `belongs`


def belongs(path: Path) -> bool:
    """Return whether the WAL next to a file belongs to it, given that the file changed after the WAL did.

    Nobody may have the file open: not even this process, whose locks on the file would end.

    If it belongs, SQLite changed the file last, in a checkpoint. This copies the last version of pages from the WAL, in the
    order of their numbers. So what it copies first is the file's first page, unless a reader needed an older one: then the
    first page is still as it was when the WAL began, and others were copied. Our transactions number themselves in the
    first page (`database.Database.transaction`). So the WAL tells all versions of that page since it began, and the number
    of the version before; a copy has an older one, or one that the command `.backup` changed.

    Args:
        path: the file, without links. Next to it is a WAL.

    Raises:
        OSError: one of the files cannot be read.
    """
    wal, file = -1, -1
    try:
        wal, file = os.open(f"{path}-wal", os.O_RDONLY), os.open(path, os.O_RDONLY)
        return _belongs(file, wal)
    finally:
        for descriptor in (wal, file):
            with suppress(OSError):
                os.close(descriptor)


def _belongs(file: int, wal: int) -> bool:
    page_bytes, versions = _committed(wal)
    header = os.pread(file, 100, 0)
    if not versions or (header and not header.startswith(_SQLITE)):
        return True  # SQLite will not use such a WAL, or the file
    if int.from_bytes(header[16:18], "big") != (1 if page_bytes == 65536 else page_bytes):
        return False

    def in_file(page: int) -> bytes:
        return os.pread(file, page_bytes, (page - 1) * page_bytes)

    def in_wal(offset: int) -> bytes:
        return os.pread(wal, page_bytes, offset)

    first = in_file(1)
    if 1 in versions:
        if any(in_wal(offset) == first for offset in reversed(versions[1])):
            return True
        if not _may_precede(first, in_wal(versions[1][0])):
            return False
    return any(in_file(page) == in_wal(offsets[-1]) for page, offsets in versions.items())


def _may_precede(page: bytes, next_version: bytes) -> bool:
    """Return whether the first page of a file may have become the other by one transaction."""
    (counter, cookie, number), (next_counter, next_cookie, next_number) = (
        [int.from_bytes(each[field], "big") for field in (_COUNTER, _COOKIE, _STAMP)] for each in (page, next_version)
    )
    # The same number: the transaction is of a program that does not number them.
    has_number = next_number in {number, (number + 1) % STAMPS}
    # Tables are created, and migrated, before there are numbers.
    has_cookie = cookie == next_cookie or (number == 0 and cookie < next_cookie)
    return has_number and has_cookie and next_counter - counter in {0, 1}


def _committed(wal: int) -> tuple[int, dict[int, list[int]]]:
    """Return the size of a page, and for each page where the WAL has its versions, oldest first.

    Frames of an earlier use of the WAL have other salts. Checksums are not compared: they differ only after a power cut, in
    frames that no checkpoint has copied.
    """
    versions: dict[int, list[int]] = {}
    header = os.pread(wal, _WAL_HEADER.size, 0)
    if len(header) < _WAL_HEADER.size:
        return 0, versions
    magic, version, page_bytes, _, *salts, _, _ = _WAL_HEADER.unpack(header)
    if magic not in _MAGIC or version != _VERSION or page_bytes < 512:
        return 0, versions
    wal_bytes, offset = os.fstat(wal).st_size, _WAL_HEADER.size
    transaction: list[tuple[int, int]] = []
    while offset + _FRAME_HEADER.size + page_bytes <= wal_bytes:
        page, pages_after, *frame_salts, _, _ = _FRAME_HEADER.unpack(os.pread(wal, _FRAME_HEADER.size, offset))
        if frame_salts != salts or page == 0:
            break
        transaction.append((page, offset + _FRAME_HEADER.size))
        if pages_after:
            for changed, where in transaction:
                versions.setdefault(changed, []).append(where)
            transaction = []
        offset += _FRAME_HEADER.size + page_bytes
    return page_bytes, versions
