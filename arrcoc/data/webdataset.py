"""WebDataset shards: tar files in which the members of one picture stand together, named alike up to the first dot.

    0001.jpg    0001.json    0001.cup.png           0001.json: {"text": "a red cup", "mask": "cup.png"}
    0002.jpg    0002.red_cup.mask.png               the mask of "red cup"

Python's own ``tarfile`` opens them, and every member is decoded here: nothing in a shard is ever run or unpickled.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch

from arrcoc.data.entries import QUERY_KEYS, Queries, add_queries, check_keys, parse_object, parse_queries
from arrcoc.data.pictures import SUFFIXES
from arrcoc.data.records import Record
from arrcoc.data.regions import Region
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.streams import Part, RecordStream, take_part

TEXTS = ("json", "txt", "none")
_MASK = ".mask.png"
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

Pattern = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find_shards(pattern: Pattern) -> list[Path]:
    """The files that a pattern names, in order.

    Args:
        pattern: path, or several, with ``{000..011}`` for a range of numbers, ``{a,b}`` for a choice, and ``*``, ``?``
            in the file's name for whatever is there.

    Raises:
        FileNotFoundError: if a file is missing or nothing fits.
    """
    patterns = [pattern] if isinstance(pattern, str | os.PathLike) else list(pattern)
    shards: list[Path] = []
    for text in (text for part in patterns for text in _expand(os.fspath(part))):
        path = Path(text)
        found = sorted(path.parent.glob(path.name)) if set("*?") & set(path.name) else [path]
        missing = [path for path in found or [path] if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"there is no shard {str(missing[0])!r}.")
        shards += found
    if not shards:
        raise FileNotFoundError(f"there is no shard {pattern!r}.")
    return shards


def iterate_shards(
    pattern: Pattern,
    *,
    skips: Skips | None = None,
    part: Part = (0, 1),
    generator: torch.Generator | None = None,
    texts: str = "json",
) -> Iterator[Record]:
    """The pictures of shards in a row, not yet decoded; one picture and its masks are in memory at a time.

    Args:
        pattern: of the shards, as in `find_shards`.
        skips: says whether broken items raise, and counts them; None raises. Of a broken shard the rest is lost.
        part: (i, n): every n-th shard from number i on; every n-th picture if there are fewer than n shards.
        generator: shuffles the order of the shards; None keeps it.
        texts: where the queries are: "json" in NAME.json, which is a manifest line without "image" whose masks are
            members, and in the names of NAME.QUERY.mask.png; "txt" for the text in NAME.txt, to score only; "none" for
            pictures alone. Other members are not looked at.

    Raises:
        FileNotFoundError: if there is no shard.
        ValueError: if an item is broken and broken items are not skipped.
    """
    if texts not in TEXTS:
        raise ValueError(f'texts must be "json", "txt" or "none", got {texts!r}.')
    shards = find_shards(pattern)
    if generator is not None:
        shards = [shards[place] for place in torch.randperm(len(shards), generator=generator).tolist()]
    skips = skips or Skips()
    if len(shards) >= part[1]:
        return _read(list(take_part(shards, part)), skips, texts)
    # Every part looks at every picture; the first one counts.
    return take_part(_read(shards, skips if part[0] == 0 else Skips(skips.on_error), texts), part)


def stream_shards(
    pattern: Pattern,
    selection: Selection | None = None,
    *,
    vocabulary: Sequence[str] | None = None,
    shuffle: int = 0,
    seed: int = 0,
) -> RecordStream:
    """The pictures of shards as samples in a row; with ``shuffle`` the order of the shards changes as well.

    Args:
        pattern: of the shards, as in `find_shards`.
        selection, vocabulary, shuffle, seed: as in `RecordStream`.
    """
    shards = find_shards(pattern)

    def read(skips: Skips, part: Part, generator: torch.Generator | None) -> Iterator[Record]:
        return iterate_shards(shards, skips=skips, part=part, generator=generator)

    return RecordStream(read, selection, vocabulary=vocabulary, shuffle=shuffle, seed=seed)


def _read(shards: Sequence[Path], skips: Skips, texts: str) -> Iterator[Record]:
    for shard in shards:
        for key, members in _groups(shard, skips):
            try:
                yield _record(key, members, texts)
            except ItemError as error:
                skips.add_broken(f"{shard.name}/{key}", error)


class _Header(tarfile.TarInfo):
    """A header that is refused if it is damaged: ``tarfile`` would take it for the end of the archive, silently."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):
                raise  # a block of zeros: the end
            raise tarfile.ReadError(str(error) if buf else "it was cut between two members") from error


def _groups(shard: Path, skips: Skips) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Members that follow each other under one name: the name, and their (ending, content)."""
    key, members = "", list[tuple[str, bytes]]()
    try:
        with tarfile.open(shard, mode="r|*", tarinfo=_Header) as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep the headers of all members
                if info.issym() or info.islnk():
                    error = ItemError(f"a link to {info.linkname!r} is not followed.", reason="member is a link")
                    skips.add_broken(f"{shard.name}/{info.name}", error)
                folder, _, file = info.name.rpartition("/")
                stem, dot, ending = file.partition(".")
                if not info.isreg() or not stem or not dot:
                    continue
                name = f"{folder}/{stem}" if folder else stem
                if name != key and members:
                    yield key, members
                    members = []
                content = tar.extractfile(info)
                assert content is not None  # a regular file
                key = name
                members.append((ending, content.read()))
            assert tar.fileobj is not None
            while rest := tar.fileobj.read(tarfile.RECORDSIZE):
                if any(rest):
                    raise tarfile.ReadError("it goes on behind its end")
    except (tarfile.TarError, OSError, EOFError) as error:
        skips.add_broken(str(shard), ItemError(f"the shard is damaged: {error}.", reason="shard broken"))
        return  # the members at hand may be incomplete
    if members:
        yield key, members


def _record(key: str, contents: list[tuple[str, bytes]], texts: str) -> Record:
    members = dict(contents)
    if len(members) < len(contents):
        endings = ", ".join(ending for ending, _ in contents)
        raise ItemError(f"each member must stand there once, got {endings}.", reason="member twice")
    images = [ending for ending in members if f".{ending.lower()}" in SUFFIXES]
    if len(images) != 1:
        raise ItemError(f"there must be one picture, got {', '.join(members)}.", reason="picture missing")
    entry: dict[str, Any] = {}
    queries: Queries = {}
    if texts == "txt":
        text = _text(members, "txt").strip()
        if not text:
            raise ItemError("the text is empty.", reason="no text")
        queries[text] = None
    elif texts == "json":
        if "json" in members:
            entry = _json(members)
            queries = parse_queries(entry, lambda value: _member(value, key, members))
        for ending, content in members.items():
            if ending.endswith(_MASK):
                text = ending.removesuffix(_MASK).replace("_", " ").strip()
                if not text:
                    raise ItemError(f"the query in the name of {ending!r} is empty.", reason="no text")
                add_queries(queries, {text: (Region(kind="mask", value=content),)})
    return Record(name=entry.get("name") or f"{key}.{images[0]}", image=members[images[0]], queries=queries)


def _json(members: dict[str, bytes]) -> dict[str, Any]:
    entry = parse_object(_text(members, "json"), "the member json", reason="json unreadable")
    check_keys(entry, ("name", "queries", "meta", *QUERY_KEYS))
    if not isinstance(entry.get("name", ""), str):
        raise ItemError(f'"name" must be a text, got {entry["name"]!r}.', reason="bad value")
    return entry


def _text(members: dict[str, bytes], ending: str) -> str:
    if ending not in members:
        raise ItemError(f"there is no member {ending!r}, only {', '.join(members)}.", reason="no text")
    try:
        return members[ending].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ItemError(f"the member {ending!r} is not UTF-8: {error}.", reason=f"{ending} unreadable") from error


def _member(value: object, key: str, members: dict[str, bytes]) -> bytes:
    ending = str(value).rpartition("/")[2].removeprefix(f"{key.rpartition('/')[2]}.")
    if ending not in members:
        raise ItemError(f'"mask" must name a member, got {value!r} among {", ".join(members)}.', reason="mask missing")
    return members[ending]


def _expand(pattern: str) -> Iterator[str]:
    """All texts of a pattern with braces."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    for choice in product(*(_choices(piece) if place % 2 else [piece] for place, piece in enumerate(pieces))):
        yield "".join(choice)


def _choices(inside: str) -> list[str]:
    if not (match := _RANGE.fullmatch(inside)):
        return inside.split(",")
    first, last = match.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
