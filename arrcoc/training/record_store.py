"""Records of one size by key, on disk: safe against interruption, damage and several writers.

    000001.records    what one writer wrote, record after record
    000001.index      one line a record: key, number of the record, checksum

A record is written before its line; a writer that is interrupted leaves at most a record without a line or a torn line,
and both are passed over. Every writer has a part of its own, and readers see all of them. A checksum is verified before
a record is first used; a damaged one counts as missing.
"""

from __future__ import annotations

import mmap
import re
import zlib
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

_LINE = re.compile(r"([0-9a-f]+) (\d+) ([0-9a-f]{8})\n")


@dataclass(frozen=True)
class Record:
    """Where a record lies."""

    part: Path
    row: int
    checksum: int


class MappedPart:
    """A part, mapped and not read.

    Args:
        path: the part.
        record_bytes: size of a record.

    Attributes:
        records: uint8 tensor [rows, record_bytes], all that are whole; not to be written to.
    """

    def __init__(self, path: Path, record_bytes: int) -> None:
        with path.open("rb") as file:
            # A private copy of every page that is written to, which none is: torch has no read-only tensors.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        num_rows = len(self._map) // record_bytes
        everything = torch.frombuffer(self._map, dtype=torch.uint8, count=num_rows * record_bytes)
        self.records = everything.view(num_rows, record_bytes)

    def release(self) -> None:
        """Give the pages that were read back to the system: this process does not grow with what it reads."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class RecordStore:
    """A folder of parts.

    Args:
        folder: must exist.
        record_bytes: size of every record, > 0.

    Attributes:
        damaged: keys whose every record was found to be damaged.
    """

    def __init__(self, folder: Path, record_bytes: int) -> None:
        self.folder, self.record_bytes = folder, record_bytes
        self.damaged: set[str] = set()
        self._found: dict[str, list[Record]] = {}
        self._whole: dict[str, Record] = {}
        self._writer: tuple[Path, FileIO, FileIO] | None = None
        self._num_written = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again for what other processes have written meanwhile."""
        self._found = {}
        for index in sorted(self.folder.glob("*.index")):
            part = index.with_suffix(".records")
            num_rows = part.stat().st_size // self.record_bytes if part.is_file() else 0
            for line in index.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
                if (match := _LINE.fullmatch(line)) and int(match[2]) < num_rows:
                    record = Record(part, int(match[2]), int(match[3], 16))
                    self._found.setdefault(match[1], []).append(record)

    def keys(self) -> frozenset[str]:
        """All keys that have a record, verified or not."""
        return frozenset(self._found)

    def find(self, key: str) -> Record | None:
        """The first record of a key that is whole; each is verified once."""
        if key not in self._whole and key in self._found:
            for record in self._found[key]:
                data = MappedPart(record.part, self.record_bytes).records[record.row].numpy().data
                if _checksum(key, data) == record.checksum:
                    self._whole[key] = record
                    break
            else:
                self.damaged.add(key)
                del self._found[key]
        return self._whole.get(key)

    def put(self, key: str, data: bytes) -> None:
        """Write a record of ``record_bytes`` under a key of hex digits.

        Raises:
            OSError: if it cannot be written; what was written before stays.
        """
        assert len(data) == self.record_bytes
        part, records, index = self._writer or self._open_part()
        record = Record(part, self._num_written, _checksum(key, data))
        try:
            _write(records, data)
            _write(index, f"{key} {record.row} {record.checksum:08x}\n".encode())
        except BaseException as error:
            self.close()  # whatever stands at the end of this part, nothing follows it
            if isinstance(error, OSError):
                error.filename = str(part)  # writing to an open file leaves it out
            raise
        self._num_written += 1
        self._found.setdefault(key, []).append(record)
        self._whole[key] = record

    def close(self) -> None:
        """Close this writer's part; the next `put` begins another one."""
        if self._writer is not None:
            for file in self._writer[1:]:
                file.close()
        self._writer, self._num_written = None, 0

    def __del__(self) -> None:
        if getattr(self, "_writer", None) is not None:
            self.close()

    def _open_part(self) -> tuple[Path, FileIO, FileIO]:
        """A new part with the next free number; two processes never get the same one."""
        numbers = (int(path.stem) for path in self.folder.iterdir() if path.stem.isdecimal())
        number = 1 + max(numbers, default=0)
        while True:
            part = self.folder / f"{number:06d}.records"
            try:
                records = part.open("xb", buffering=0)
            except FileExistsError:
                number += 1
                continue
            self._writer = (part, records, part.with_suffix(".index").open("xb", buffering=0))
            return self._writer


def _checksum(key: str, data: bytes | memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(key.encode()))


def _write(file: FileIO, data: bytes) -> None:
    """Write all of it: an unbuffered file may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
