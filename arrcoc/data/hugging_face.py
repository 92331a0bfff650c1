"""Data sets of the library ``datasets``: each row is read as a manifest line whose keys are columns.

Pictures are never decoded by the library: their bytes go the same way as those of every other reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image

from arrcoc.data.entries import QUERY_KEYS, parse_queries
from arrcoc.data.pictures import PictureSource
from arrcoc.data.records import Record, RecordDataset
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.streams import Part, RecordStream, take_part

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

COLUMNS = ("image", "name", "queries", *QUERY_KEYS)


class HuggingFaceDataset(RecordDataset):
    """A ``datasets.Dataset`` as samples by number.

    Args:
        dataset: its rows are pictures.
        selection: which rows, and which of their queries.
        columns: what the columns are called: "image" (picture, bytes or path), "name", "text" or "queries", "absent",
            "mask", "boxes", "polygons", "rle", as in a manifest -> name of the column. Columns of these very names need
            no entry; others are not looked at. A row without "name" is called by its number.
        vocabulary: as in `RecordDataset`.

    Raises:
        ImportError: if the library is missing.
        ValueError: if a column is missing, or an item is broken.
    """

    def __init__(
        self,
        dataset: Dataset,
        selection: Selection | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        super().__init__(_Rows(dataset, columns or {}), selection, vocabulary=vocabulary)


def stream_hugging_face(
    dataset: Dataset | IterableDataset,
    selection: Selection | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    vocabulary: Sequence[str] | None = None,
    shuffle: int = 0,
    seed: int = 0,
) -> RecordStream:
    """A ``datasets.IterableDataset`` (or ``Dataset``) as samples in a row.

    Args:
        dataset, columns: as in `HuggingFaceDataset`.
        selection, vocabulary, shuffle, seed: as in `RecordStream`.
    """
    prepared, names = _prepare(dataset, columns or {})

    def read(skips: Skips, part: Part, generator: torch.Generator | None) -> Iterator[Record]:
        for number, row in take_part(enumerate(prepared), part):
            try:
                yield _record(row, names, number)
            except ItemError as error:
                skips.add_broken(f"row {number}", error)

    return RecordStream(read, selection, vocabulary=vocabulary, shuffle=shuffle, seed=seed)


def open_hugging_face(place: str, split: str, *, stream: bool = False) -> Dataset | IterableDataset:
    """A folder written by ``save_to_disk``, or whatever ``datasets.load_dataset`` finds.

    Args:
        place: folder or name.
        split: of the data set's own splits.
        stream: open it in a row, without downloading it first.

    Raises:
        ImportError: if the library is missing.
        ValueError: if a folder has no such split.
    """
    datasets = _library()
    if not any((Path(place) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        found: Dataset | IterableDataset = datasets.load_dataset(place, split=split, streaming=stream)
        return found
    stored = datasets.load_from_disk(place)
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise ValueError(f"{place} must have the split {split!r}, got {', '.join(stored)}.")
        stored = stored[split]
    return stored.to_iterable_dataset() if stream else stored


class _Rows(Sequence[Record]):
    def __init__(self, dataset: Dataset, columns: Mapping[str, str]) -> None:
        self._rows, self._names = _prepare(dataset, columns)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        try:
            return _record(self._rows[index], self._names, index)
        except ItemError as error:
            error.name = f"row {index}"
            raise


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hf data sets need the library datasets: pip install 'arrcoc[datasets]'.") from error
    return datasets


def _prepare(dataset: Any, columns: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The data set with its used columns, undecoded; and key -> (column, names of its class labels or None)."""
    library = _library()
    available = dataset.column_names or list(next(iter(dataset), {}))
    for key, column in columns.items():
        if key not in COLUMNS:
            close = get_close_matches(key, COLUMNS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(COLUMNS)}."
            raise ValueError(f"columns has the unknown key {key!r}; {hint}")
        if column not in available:
            raise ValueError(f"columns[{key!r}] must be one of {', '.join(available)}, got {column!r}.")
    names = {key: columns.get(key, key) for key in COLUMNS if columns.get(key, key) in available}
    if "image" not in names:
        raise ValueError(f'columns must say which of {", ".join(available)} is the "image".')
    features = dataset.features or {}
    dataset = dataset.select_columns(sorted(set(names.values()))).with_format(None)
    for column in set(names.values()):
        if isinstance(features.get(column), library.Image):
            dataset = dataset.cast_column(column, library.Image(decode=False))
    labels = {key: getattr(features.get(column), "names", None) for key, column in names.items()}
    return dataset, {key: (column, labels[key]) for key, column in names.items()}


def _record(row: Mapping[str, Any], names: Mapping[str, tuple[str, Sequence[str] | None]], number: int) -> Record:
    entry = {}
    for key, (column, labels) in names.items():
        value = row[column]
        if labels and isinstance(value, int):
            if not 0 <= value < len(labels):
                message = f"the class label in {column!r} must be in [0, {len(labels)}), got {value!r}."
                raise ItemError(message, reason="no label")
            value = labels[value]
        entry[key] = value
    queries = parse_queries({key: entry[key] for key in entry if key in ("queries", *QUERY_KEYS)}, _picture)
    name = entry.get("name")
    return Record(
        name=f"{number:08d}" if name in (None, "") else str(name), image=_picture(entry["image"]), queries=queries
    )


def _picture(value: Any) -> PictureSource:
    if isinstance(value, Mapping):  # what the library makes of a picture that it does not decode
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes | Image.Image) or not value:
        message = f"a picture must be stored as a picture, bytes or a path, got {value!r}."
        raise ItemError(message, reason="picture missing")
    return value
