"""What is scored: picture files, folders, manifests and shards as one stream of pictures, in an order that stays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from arrcoc.data.manifest import read_manifest
from arrcoc.data.pictures import SUFFIXES
from arrcoc.data.records import Record
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.webdataset import iterate_shards

_KINDS = {".jsonl": "manifest", ".ndjson": "manifest", ".tar": "shard"}

Input: TypeAlias = str | os.PathLike[str] | Record


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class BrokenInput:
    """What a reader could not make a picture of, e.g. a line of a manifest."""

    name: str
    error: ItemError


class _Collect(Skips):
    """Keeps broken items for the stream instead of counting them."""

    def __init__(self, on_error: str) -> None:
        super().__init__(on_error)
        self.pending: list[BrokenInput] = []

    def add_broken(self, name: str, error: ItemError) -> None:
        if self.on_error == "raise":
            super().add_broken(name, error)
        self.pending.append(BrokenInput(name=error.name or name, error=error))

    def take(self) -> list[BrokenInput]:
        taken, self.pending = self.pending, []
        return taken


def kind_of(name: str | os.PathLike[str]) -> str:
    """What an input is taken for: "folder", "manifest", "shard" or, if nothing else, "picture"."""
    path = Path(name)
    if path.is_dir():
        return "folder"
    return _KINDS.get(path.suffix.lower(), "picture")


def read_inputs(
    inputs: Input | Iterable[Input], *, on_error: str = "raise", shard_texts: str = "json"
) -> Iterator[Record | BrokenInput]:
    """The pictures that inputs name, one after the other, none decoded yet.

    Args:
        inputs: one or several of

            - a folder: the pictures in it and in its folders, by name, in the order of their paths. A picture is a file
              with a known suffix; names that start with a dot and links to folders are passed over;
            - a manifest, ``.jsonl`` or ``.ndjson``, as ``arrcoc.data.manifest`` reads it;
            - a WebDataset shard, ``.tar``, or several as ``{000..011}.tar``, as ``arrcoc.data.webdataset`` reads them;
            - any other path: a picture;
            - a ``Record``, e.g. with a picture in memory.
        on_error: "raise" stops at the first broken line or entry, "skip" hands it out as a `BrokenInput`.
        shard_texts: where the queries of a shard are: "json", "txt" or "none"; see ``iterate_shards``.

    Raises:
        FileNotFoundError: if a manifest or shard is missing.
        ValueError: if a folder holds no picture, or an item is broken and on_error is "raise".
    """
    several = [inputs] if isinstance(inputs, str | os.PathLike | Record) else inputs
    for entry in several:
        if isinstance(entry, Record):
            yield entry
            continue
        path, kind = Path(entry), kind_of(entry)
        if kind == "folder":
            yield from _read_folder(path)
        elif kind == "picture":
            yield Record(name=os.fspath(entry), image=path, queries={})
        else:
            skips = _Collect(on_error)
            records = (
                read_manifest(path, skips=skips)
                if kind == "manifest"
                else iterate_shards(path, skips=skips, texts=shard_texts)
            )
            for record in records:
                yield from skips.take()
                yield record
            yield from skips.take()


def _read_folder(folder: Path) -> Iterator[Record]:
    empty = True
    for path in _walk(folder):
        empty = False
        yield Record(name=str(path), image=path, queries={})
    if empty:
        raise ValueError(f"folder {str(folder)!r} holds no picture ({', '.join(sorted(SUFFIXES))}).")


def _walk(folder: Path) -> Iterator[Path]:
    """Picture files under a folder, lazily: a folder's names are held, not those of the whole tree."""
    with os.scandir(folder) as entries:
        named = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in named:
        if name.startswith("."):
            continue
        if is_folder:
            yield from _walk(folder / name)
        elif Path(name).suffix.lower() in SUFFIXES:
            yield folder / name
