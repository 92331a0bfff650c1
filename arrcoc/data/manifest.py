"""Manifests: JSON lines that name a picture, a text and where its answer is; indexed by byte offset, read on demand.

{"image": "a.jpg", "text": "a red cup", "mask": "a_cup.png"}
{"image": "b.jpg", "queries": [{"text": "dog", "boxes": [[10, 20, 64, 48]]}, {"text": "cat", "absent": true}]}
"""

from __future__ import annotations

import json
import os
import posixpath
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from arrcoc.data.pictures import PictureSource
from arrcoc.data.records import Record, RecordDataset
from arrcoc.data.regions import KINDS, Region
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.streams import Part, RecordStream, take_part

QUERY_KEYS = ("text", "absent", *KINDS)
_LINE_KEYS = ("image", "name", "queries", "meta")

Queries = dict[str, tuple[Region, ...] | None]


def parse_queries(entry: Mapping[str, Any], open_mask: Callable[[Any], PictureSource]) -> Queries:
    """The texts and regions of a manifest line, or of anything that is written like one.

    Args:
        entry: has "text", or "queries" with a list of {"text": ...}, or neither. Beside a text stand any of "mask",
            "boxes", "polygons" and "rle", whose union is the answer; or "absent": true; or nothing, if the text can
            only be scored.
        open_mask: what "mask" holds -> the mask picture.

    Returns:
        as the ``queries`` of a `Record`.

    Raises:
        ItemError: if a key is unknown, a text is empty or stands twice, or a value has the wrong type.
    """
    queries: Queries = {}
    if entry.get("queries") is None:
        parts = [entry] if any(entry.get(key) is not None for key in QUERY_KEYS) else []
    else:
        parts = entry["queries"]
        beside = [key for key in QUERY_KEYS if entry.get(key) is not None]
        if beside:
            raise ItemError(f'"{beside[0]}" must stand inside "queries", not beside it.', reason="bad key")
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise ItemError(f'"queries" must be a list of {{"text": ...}}, got {parts!r}.', reason="bad value")
        for part in parts:
            check_keys(part, QUERY_KEYS)
    for part in parts:
        text = part.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ItemError(f'"text" must be a text that is not empty, got {text!r}.', reason="no text")
        add_queries(queries, {text.strip(): _regions(part, open_mask)})
    return queries


def parse_object(text: str, what: str, *, reason: str) -> dict[str, Any]:
    """A JSON object whose keys all differ.

    Args:
        text: the JSON.
        what: the message calls it.
        reason: of the error.

    Raises:
        ItemError: if it is no such object.
    """
    try:
        entry = json.loads(text, object_pairs_hook=_object)
    except ItemError:
        raise
    except json.JSONDecodeError as error:
        raise ItemError(f"{what} is not JSON: {error.msg} at character {error.pos + 1}.", reason=reason) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise ItemError(f"{what} cannot be read: {error}.", reason=reason) from error
    if not isinstance(entry, dict):
        raise ItemError(f"{what} must be a JSON object, got {entry!r}.", reason=reason)
    return entry


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = ", ".join(key for key, _ in pairs)
        raise ItemError(f"each key must stand there once, got {keys}.", reason="bad key")
    return entry


def add_queries(queries: Queries, more: Queries) -> None:
    """Put further texts of the same picture to the others; a text may stand once."""
    for text, regions in more.items():
        if text in queries:
            message = f"{text!r} is asked for twice; give all its regions in one place."
            raise ItemError(message, reason="query twice")
        queries[text] = regions


def check_keys(entry: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that nobody reads, and say which one may have been meant."""
    for key in entry:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known keys are {', '.join(known)}."
            raise ItemError(f"unknown key {key!r}; {hint}", reason="bad key")


def _regions(part: Mapping[str, Any], open_mask: Callable[[Any], PictureSource]) -> tuple[Region, ...] | None:
    regions = []
    for kind in KINDS:
        value = part.get(kind)
        if value is None:
            continue
        if kind == "mask":
            regions.append(Region(kind=kind, value=open_mask(value)))
            continue
        if not isinstance(value, list | Mapping) or not value:
            hint = 'for a text that names nothing in the picture write "absent": true'
            raise ItemError(f'"{kind}" must not be empty, got {value!r}; {hint}.', reason="region broken")
        several = kind == "rle" and isinstance(value, list)
        regions += [Region(kind=kind, value=one) for one in (value if several else [value])]
    absent = part.get("absent")
    if absent not in (None, True, False):
        raise ItemError(f'"absent" must be true or false, got {absent!r}.', reason="bad value")
    if absent and regions:
        raise ItemError(f'"absent": true and "{regions[0].kind}" exclude each other.', reason="bad value")
    return tuple(regions) if regions or absent else None


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
        offsets, lines, owners = array("q"), array("q"), array("q")
        numbers: dict[str, int] = {}
        broken: set[int] = set()
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    owner = -1
                    try:
                        entry = _parse(line, number)
                        owner = numbers.setdefault(_path(entry), len(numbers))
                        self._queries(entry)
                    except ItemError as error:
                        skips.add_broken(self._name(number), error)
                        broken.add(owner)
                    else:
                        owners.append(owner)
                        offsets.append(offset)
                        lines.append(number)
                offset += len(line)
        sound = np.flatnonzero(~np.isin(np.asarray(owners), list(broken)))
        order = sound[np.argsort(np.asarray(owners)[sound], kind="stable")]
        self._offsets = np.asarray(offsets)[order]
        self._lines = np.asarray(lines)[order]
        first = np.flatnonzero(np.diff(np.asarray(owners)[order], prepend=-1))
        self._starts = np.append(first, len(order))

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
        check_keys(entry, (*_LINE_KEYS, *QUERY_KEYS))
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


def _each(records: Sequence[Record], skips: Skips) -> Iterator[Record]:
    for number in range(len(records)):
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
        return take_part(read_manifest(path, skips=skips), part)

    return RecordStream(read, selection, vocabulary=vocabulary, shuffle=shuffle, seed=seed)
