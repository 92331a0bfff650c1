"""Any data set by a short text, as command lines name it: ``scenes``, ``coco:PATH``, ``shards:PATTERN``, ..."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from arrcoc.data.coco import CocoFolder
from arrcoc.data.coco_records import QUERIES, REGIONS
from arrcoc.data.folder import FolderDataset
from arrcoc.data.hugging_face import HuggingFaceDataset, open_hugging_face, stream_hugging_face
from arrcoc.data.manifest import ManifestDataset, stream_manifest
from arrcoc.data.sample import RelevanceDataset
from arrcoc.data.scenes import Scenes
from arrcoc.data.selection import Selection
from arrcoc.data.streams import RecordStream
from arrcoc.data.webdataset import stream_shards

FORMS = ("scenes", "coco:PATH", "folder:PATH", "manifest:PATH", "hf:NAME_OR_PATH", "shards:PATTERN")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Selection):
    """How a data set is read. What does not concern its kind is not looked at.

    Args:
        queries: of a COCO folder: "categories", "captions" or "sentences".
        regions: of a COCO folder: "masks" or "boxes".
        num: scenes drawn for training; validation and test get their shares of this number on top.
        columns: of an hf data set, what its columns are called, e.g. "image=photo,text=caption".
        hf_split: of an hf data set, the split of its own that is read.
        stream: read a manifest or an hf data set in a row instead of by number; shards always are.
        shuffle: of a stream, the size of the buffer in which it is shuffled, 0 for none.
        seed: of scenes and of that order.
    """

    queries: str = "categories"
    regions: str = "masks"
    num: int = 400
    columns: str = ""
    hf_split: str = "train"
    stream: bool = False
    shuffle: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("queries", QUERIES), ("regions", REGIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name, least in (("num", 1), ("shuffle", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)!r}.")
        _ = self.column_names

    @property
    def column_names(self) -> dict[str, str]:
        """``columns`` as a mapping."""
        pairs = [part.partition("=") for part in self.columns.split(",") if part.strip()]
        if not all(key.strip() and column.strip() for key, _, column in pairs):
            raise ValueError(f'columns must be like "image=photo,text=caption", got {self.columns!r}.')
        return {key.strip(): column.strip() for key, _, column in pairs}


def load_data(
    spec: str, config: DataConfig | None = None, *, split: str | None = None
) -> RelevanceDataset | RecordStream:
    """The data set that a text names.

    Args:
        spec: one of

            - "scenes": drawn, as many as wanted
            - "coco:PATH": a folder with images/ and instances.json
            - "folder:PATH": a folder with images/ and masks/QUERY/
            - "manifest:PATH": a file of JSON lines
            - "hf:NAME_OR_PATH": a data set of the library datasets, or a folder written by its save_to_disk
            - "shards:PATTERN": WebDataset tar files, e.g. shards:data/{000..011}.tar
        config: how it is read.
        split: "train", "val" or "test", instead of the config's.

    Returns:
        Samples by number, or in a row: shards always, a manifest or an hf data set on request.

    Raises:
        FileNotFoundError: if there is nothing at that place.
        ValueError: if there is no such kind, an argument is outside its range, or an item is broken.
        ImportError: if the optional library of that kind is missing.
    """
    config = config or DataConfig()
    if split is not None:
        config = replace(config, split=split)
    kind, _, place = spec.partition(":")
    if kind not in _OPEN or bool(place) != (kind != "scenes"):
        raise ValueError(f"data must be one of {', '.join(FORMS)}, got {spec!r}.{_guess(spec)}")
    return _OPEN[kind](place, config)


def _scenes(place: str, config: DataConfig) -> Scenes:
    split = config.split or "train"
    share = {"train": 1.0, "val": config.val_share, "test": config.test_share}[split]
    return Scenes(max(1, round(share * config.num)), split=split, seed=config.seed)


def _coco(place: str, config: DataConfig) -> CocoFolder:
    own = {field.name: getattr(config, field.name) for field in fields(Selection)}
    return CocoFolder(place, queries=config.queries, regions=config.regions, **own)


def _folder(place: str, config: DataConfig) -> FolderDataset:
    return FolderDataset(place, config)


def _manifest(place: str, config: DataConfig) -> ManifestDataset | RecordStream:
    if config.stream:
        return stream_manifest(place, config, shuffle=config.shuffle, seed=config.seed)
    return ManifestDataset(place, config)


def _hugging_face(place: str, config: DataConfig) -> HuggingFaceDataset | RecordStream:
    columns = config.column_names
    dataset = open_hugging_face(place, config.hf_split, stream=config.stream)
    if config.stream:
        return stream_hugging_face(dataset, config, columns=columns, shuffle=config.shuffle, seed=config.seed)
    return HuggingFaceDataset(dataset, config, columns=columns)


def _shards(place: str, config: DataConfig) -> RecordStream:
    return stream_shards(place, config, shuffle=config.shuffle, seed=config.seed)


_OPEN: dict[str, Callable[[str, DataConfig], RelevanceDataset | RecordStream]] = {
    "scenes": _scenes,
    "coco": _coco,
    "folder": _folder,
    "manifest": _manifest,
    "hf": _hugging_face,
    "shards": _shards,
}


def _guess(spec: str) -> str:
    """What may have been meant: a kind of similar name, or what lies at a bare path."""
    kind, _, place = spec.partition(":")
    path = Path(spec)
    if path.is_dir():
        if (path / "masks").is_dir():
            return f" Did you mean 'folder:{spec}'?"
        if (path / "images").is_dir():
            return f" Did you mean 'coco:{spec}'?"
        return f" Did you mean 'hf:{spec}'?" if any(path.glob("*.arrow")) else ""
    if path.suffix in (".jsonl", ".ndjson"):
        return f" Did you mean 'manifest:{spec}'?"
    if path.suffix == ".tar":
        return f" Did you mean 'shards:{spec}'?"
    close = get_close_matches(kind, _OPEN, n=1)
    if not close:
        return ""
    return f" Did you mean {close[0] + (':' + (place or 'PATH') if close[0] != 'scenes' else '')!r}?"
