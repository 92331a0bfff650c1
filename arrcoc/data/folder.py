"""A folder of pictures and a folder of masks for each query.

images/kitchen.jpg
masks/red_cup/kitchen.png       the mask of "red cup" in images/kitchen.jpg: what is not zero is inside
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from arrcoc.data.entries import Queries, add_queries
from arrcoc.data.pictures import SUFFIXES
from arrcoc.data.records import Record, RecordDataset
from arrcoc.data.regions import Region
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips


class FolderDataset(RecordDataset):
    """Pictures in ``images/`` with masks in ``masks/QUERY/``, each named like its picture and ending with .png.

    A query is its folder's name with underscores as spaces. Pictures may lie in folders of ``images/``; their masks
    then lie in the same folders of ``masks/QUERY/``. Hidden files do not count.

    Args:
        path: the folder.
        selection: which pictures and queries.
        vocabulary: names that absent queries are drawn from; None for the queries of the folder. They are right only
            where every picture was searched for all of them.

    Attributes:
        skips: what was not used, and why: among it pictures without a mask, and files that are no pictures.

    Raises:
        FileNotFoundError: if the folder, ``images/`` or ``masks/`` is missing.
        ValueError: if an item is broken, e.g. a mask has no picture or another size.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        selection: Selection | None = None,
        *,
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        selection = selection or Selection()
        self.path = Path(path)
        for name in ("images", "masks"):
            if not (self.path / name).is_dir():
                raise FileNotFoundError(
                    f"path must be a folder with images/ and masks/ in it, {name}/ is missing in {str(self.path)!r}."
                )
        skips = Skips(selection.on_error)
        super().__init__(_find_records(self.path, skips), selection, vocabulary=vocabulary, skips=skips)


def _find_records(folder: Path, skips: Skips) -> list[Record]:
    pictures: dict[Path, Path] = {}  # relative path without its ending -> file
    for file in _files(folder / "images"):
        name = file.relative_to(folder / "images")
        if file.suffix.lower() not in SUFFIXES:
            skips.add_left_out(name.as_posix(), "no picture file", f"ends with {file.suffix!r}")
        elif name.with_suffix("") in pictures:
            message = f"{pictures[name.with_suffix('')].name} has the same name: whose masks are they?"
            skips.add_broken(name.as_posix(), ItemError(message, reason="picture twice"))
        else:
            pictures[name.with_suffix("")] = file
    queries: dict[Path, Queries] = {name: {} for name in pictures}
    for query in sorted((folder / "masks").iterdir()):
        if query.name.startswith("."):
            continue
        text = query.name.replace("_", " ").strip()
        for file in _files(query) if query.is_dir() else [query]:
            try:
                if not query.is_dir() or file.suffix.lower() != ".png":
                    raise ItemError("a mask must be masks/QUERY/NAME.png.", reason="mask misplaced")
                if not text:
                    raise ItemError("the name of the folder is an empty query.", reason="no text")
                place = file.relative_to(query).with_suffix("")
                if place not in pictures:
                    raise ItemError("the mask has no picture of its name in images/.", reason="mask without a picture")
                add_queries(queries[place], {text: (Region(kind="mask", value=file),)})
            except ItemError as error:
                skips.add_broken(file.relative_to(folder).as_posix(), error)
    return [
        Record(name=file.relative_to(folder / "images").as_posix(), image=file, queries=queries[name])
        for name, file in pictures.items()
    ]


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders, but hidden ones, in order."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
