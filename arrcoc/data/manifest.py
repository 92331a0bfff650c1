"""Manifests: JSON lines that name a picture, a text and where its answer is; indexed by byte offset, read on demand.

{"image": "a.jpg", "text": "a red cup", "mask": "a_cup.png"}
{"image": "b.jpg", "queries": [{"text": "dog", "boxes": [[10, 20, 64, 48]]}, {"text": "cat", "absent": true}]}
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from arrcoc.data.entries import QUERY_KEYS, Queries, add_queries, check_keys, parse_object, parse_queries
from arrcoc.data.records import Record, RecordDataset
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.streams import Part, RecordStream, take_part

_LINE_KEYS = ("image", "name", "queries", "meta", *QUERY_KEYS)


class ManifestRecords(Sequence[Record]):
    """The pictures of a manifest in the order of their first lines; the lines of one picture are united.

    One pass over the file checks every line and keeps 24 bytes of each; records are read again when asked for. If a
    line is broken, the other lines of its picture do not count either.

    Args:
        path: the manifest, UTF-8; paths in it are relative to its folder. Empty lines do not count.
        skips: where broken lines are counted.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is broken and broken items are not skipped.
    """

    def __init__(self, path: str | os.PathLike[str], skips: Skips) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no manifest {str(self.path)!r}.")
        pictures, offsets, lines = array("Q"), array("q"), array("q")
        broken: set[int] = set()
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        entry = _parse(line, number)
                        picture = _picture_key(entry)
                        try:
                            self._queries(entry)
                        except ItemError:
                            broken.add(picture)
                            raise
                    except ItemError as error:
                        skips.add_broken(self._name(number), error)
                    else:
                        pictures.append(picture)
                        offsets.append(offset)
                        lines.append(number)
                offset += len(line)
        keys = np.asarray(pictures)
        sound = np.flatnonzero(~np.isin(keys, np.array(list(broken), dtype=keys.dtype)))
        _, first, inverse = np.unique(keys[sound], return_index=True, return_inverse=True)
        owner = first[inverse]  # of each line, the first line of its picture
        by_picture = np.argsort(owner, kind="stable")
        self._offsets = np.asarray(offsets)[sound[by_picture]]
        self._lines = np.asarray(lines)[sound[by_picture]]
        self._starts = np.append(np.flatnonzero(np.diff(owner[by_picture], prepend=-1)), len(owner))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        queries: Queries = {}
        entry: dict[str, Any] = {}
        name = None
        with self.path.open("rb") as file:
            for place in range(self._starts[index], self._starts[index + 1]):
                file.seek(self._offsets[place])
                entry = _parse(file.readline(), self._lines[place])
                if name not in (None, entry.get("name", name)):
                    message = f'"name" must be the same on all lines of {entry["image"]!r}, got {entry["name"]!r}.'
                    raise ItemError(message, reason="bad value", name=self._name(self._lines[place]))
                name = entry.get("name", name)
                try:
                    add_queries(queries, self._queries(entry))
                except ItemError as error:
                    error.name = self._name(self._lines[place])
                    raise
        return Record(name=name or _path(entry), image=self.path.parent / entry["image"], queries=queries)

    def _queries(self, entry: dict[str, Any]) -> Queries:
        check_keys(entry, _LINE_KEYS)
        _check_text(entry, "name", "any")
        return parse_queries(entry, self._open_mask)

    def _name(self, line: int) -> str:
        return f"{self.path.name}, line {line}"

    def _open_mask(self, value: object) -> Path:
        if not isinstance(value, str) or not value:
            raise ItemError(f'"mask" must be the path of a picture, got {value!r}.', reason="bad value")
        return self.path.parent / value


def _parse(line: bytes, number: int) -> dict[str, Any]:
    """A line that says at least which picture it is about."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ItemError(f"the line is not UTF-8: {error}.", reason="line unreadable") from error
    entry = parse_object(text, "the line", reason="line unreadable")
    _check_text(entry, "image", None)
    return entry


def _check_text(entry: dict[str, Any], key: str, default: str | None) -> None:
    value = entry.get(key, default)
    if not isinstance(value, str) or not value:
        raise ItemError(f'"{key}" must be a text that is not empty, got {value!r}.', reason="bad value")


def _path(entry: dict[str, Any]) -> str:
    """Of a picture, written one way: ./a.jpg is a.jpg."""
    return posixpath.normpath(str(entry["image"]))


def _picture_key(entry: dict[str, Any]) -> int:
    """64 bits in place of the path, so that ten million pictures are told apart in 80 MB."""
    return int.from_bytes(hashlib.sha256(_path(entry).encode(errors="surrogatepass")).digest()[:8], "big")


def read_manifest(path: str | os.PathLike[str], *, skips: Skips | None = None) -> Iterator[Record]:
    """The pictures of a manifest, one after the other, in flat memory: 24 bytes a line.

    Args:
        path: the manifest; see `ManifestRecords`.
        skips: says whether broken items raise, and counts them; None raises.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is broken and broken items are not skipped.
    """
    skips = Skips() if skips is None else skips
    return _each(ManifestRecords(path, skips), skips)


def _each(records: Sequence[Record], skips: Skips, part: Part = (0, 1)) -> Iterator[Record]:
    for number in take_part(range(len(records)), part):
        try:
            yield records[number]
        except ItemError as error:
            skips.add_broken(f"picture {number}", error)


class ManifestDataset(RecordDataset):
    """The pictures of a manifest as samples by number; arguments as in `ManifestRecords` and `RecordDataset`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        selection: Selection | None = None,
        *,
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        selection = selection or Selection()
        skips = Skips(selection.on_error)
        super().__init__(ManifestRecords(path, skips), selection, vocabulary=vocabulary, skips=skips)


def stream_manifest(
    path: str | os.PathLike[str],
    selection: Selection | None = None,
    *,
    vocabulary: Sequence[str] | None = None,
    shuffle: int = 0,
    seed: int = 0,
) -> RecordStream:
    """The pictures of a manifest in a row, without looking at them first; arguments as in `RecordStream`."""

    def read(skips: Skips, part: Part, generator: torch.Generator | None) -> Iterator[Record]:
        # Every part looks at every line; the first one counts.
        return _each(ManifestRecords(path, skips if part[0] == 0 else Skips(skips.on_error)), skips, part)

    return RecordStream(read, selection, vocabulary=vocabulary, shuffle=shuffle, seed=seed)
