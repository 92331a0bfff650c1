"""Folders in COCO format as relevance data: category names or captions are the queries, united masks the answers."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from arrcoc.data.masks import Mask, decode_segmentation
from arrcoc.data.sample import RelevanceDataset, RelevanceSample
from arrcoc.data.splits import hash_fraction, split_by_image


def mentions(caption: str, name: str) -> bool:
    """Whether a caption has a category name, or its simple plural (-s, -es, -y to -ies), as whole words."""
    stem = re.escape(name.lower())
    forms = [f"{stem}(?:s|es)?"]
    if name.lower().endswith("y"):
        forms.append(f"{re.escape(name.lower()[:-1])}ies")
    return re.search(rf"\b(?:{'|'.join(forms)})\b", caption.lower()) is not None


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """What is known of a picture without its pixels.

    ``segmentations`` go by category name; ``queries`` map each text to the categories it asks for, none if absent.
    """

    path: Path
    size: tuple[int, int]
    segmentations: dict[str, list[Any]]
    queries: dict[str, tuple[str, ...]]

    def masks(self, names: Sequence[str]) -> dict[str, Mask]:
        """The united mask [H, W] of each named category."""
        return {
            name: np.logical_or.reduce([decode_segmentation(part, *self.size) for part in self.segmentations[name]])
            for name in names
        }


class CocoFolder(RelevanceDataset):
    """A folder with ``images/`` and ``instances.json``, polygons or run lengths.

    A sample is a picture with all its queries. The mask of a category is the union of its annotations, crowds included;
    the mask of a caption is the union of all categories that it mentions. Construction reads the annotations and the
    pictures' headers, and decodes the masks once for their coverage; pixels are read when a sample is asked
    for. Masks
    refer to the stored pixels, so a rotation in EXIF is not applied.

    Args:
        path: the folder; the file may also be the only ``annotations/instances*.json``. With queries="captions",
            ``captions.json`` or the only ``annotations/captions*.json`` is needed too.
        queries: "categories" or "captions".
        split: "train" or "val" for the part that ``split_by_image`` gives it, None for all.
        val_share: share of the pictures in "val", (0, 1).
        limit: at most this many pictures, None for all; >= 1.
        min_coverage, max_coverage: a query is left out if its mask covers less or more of the picture, 0 to 1.
        absent_queries: how many names of categories that are not in the picture are added (fewer if there are fewer),
            chosen by a hash of the image id; >= 0.
        on_error: "raise" stops at the first broken item, "skip" leaves it out and lists it in ``skipped``.

    Attributes:
        skipped: (name, reason) of every broken item; empty with on_error="raise".
        num_captions_left_out: captions that mention nothing annotated.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if an argument is outside its range, a file is not in COCO format, or an item is broken.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queries: str = "categories",
        split: str | None = None,
        val_share: float = 0.2,
        limit: int | None = None,
        min_coverage: float = 0.01,
        max_coverage: float = 0.60,
        absent_queries: int = 0,
        on_error: str = "raise",
    ) -> None:
        if queries not in ("categories", "captions"):
            raise ValueError(f'queries must be "categories" or "captions", got {queries!r}.')
        if split not in (None, "train", "val"):
            raise ValueError(f'split must be "train", "val" or None, got {split!r}.')
        if not 0 < val_share < 1:
            raise ValueError(f"val_share must be in (0, 1), got {val_share!r}.")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {limit!r}.")
        if not 0 <= min_coverage <= max_coverage <= 1:
            raise ValueError(
                f"0 <= min_coverage <= max_coverage <= 1 must hold, got {min_coverage!r} and {max_coverage!r}."
            )
        if absent_queries < 0:
            raise ValueError(f"absent_queries must be >= 0, got {absent_queries!r}.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')

        self.path = Path(path)
        self.absent_queries = absent_queries
        self.skipped: list[tuple[str, str]] = []
        self.num_captions_left_out = 0
        self._on_error = on_error
        self._coverage = (min_coverage, max_coverage)
        if not (self.path / "images").is_dir():
            raise FileNotFoundError(f"path must be a folder with images/ in it, got {str(self.path)!r}.")

        coco = _read(
            _find(self.path, "instances"),
            images=("id", "file_name", "height", "width"),
            annotations=("image_id", "category_id", "segmentation"),
            categories=("id", "name"),
        )
        images = {image["id"]: image for image in coco["images"]}
        if len(images) < len(coco["images"]):
            raise ValueError(f"image ids must differ, got {len(coco['images'])} images with {len(images)} ids.")
        self._names = {category["id"]: str(category["name"]) for category in coco["categories"]}
        self._all_names = sorted(set(self._names.values()))
        annotations = self._by_image(coco["annotations"], images)
        captions = None
        if queries == "captions":
            content = _read(_find(self.path, "captions"), annotations=("image_id", "caption"))
            captions = self._by_image(content["annotations"], images)

        file_names = [image["file_name"] for image in images.values()]
        if split is not None:
            file_names = split_by_image(file_names, {"train": 1 - val_share, "val": val_share})[split]
        wanted = set(file_names)
        self._pictures: list[_Picture] = []
        for image_id, image in images.items():
            if image["file_name"] not in wanted:
                continue
            if len(self._pictures) == limit:
                break
            try:
                own_captions = None if captions is None else [str(item["caption"]) for item in captions[image_id]]
                picture = self._index(image, annotations[image_id], own_captions)
            except (OSError, ValueError) as error:
                self._broken(image["file_name"], error)
                continue
            if picture.queries:
                self._pictures.append(picture)

    def __len__(self) -> int:
        return len(self._pictures)

    def make_sample(self, index: int) -> RelevanceSample:
        """Read picture number ``index``.

        Raises:
            ValueError: if its pixels cannot be read.
        """
        picture = self._pictures[index]
        try:
            with Image.open(picture.path) as image:
                pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise ValueError(f"cannot read the pixels of {str(picture.path)!r}: {error}.") from error
        named = sorted({name for names in picture.queries.values() for name in names})
        parts = picture.masks(named)
        masks = np.zeros((len(picture.queries), *picture.size), dtype=np.bool_)
        for mask, names in zip(masks, picture.queries.values(), strict=True):
            for name in names:
                mask |= parts[name]
        return RelevanceSample(
            image=torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
            queries=tuple(picture.queries),
            masks=torch.from_numpy(masks),
            name=picture.path.name,
        )

    def _broken(self, name: str, error: Exception) -> None:
        if self._on_error == "raise":
            raise ValueError(f"{name}: {error}") from error
        self.skipped.append((name, str(error)))

    def _by_image(self, annotations: list[Any], images: Mapping[Any, Any]) -> dict[Any, list[Any]]:
        """Annotations or captions by image id; one without a picture is broken."""
        found: dict[Any, list[Any]] = defaultdict(list)
        for number, annotation in enumerate(annotations):
            image_id = annotation["image_id"]
            if image_id in images:
                found[image_id].append(annotation)
            else:
                name = f"annotation {annotation.get('id', number)}"
                self._broken(name, ValueError(f"image_id {image_id!r} is not among the images."))
        return found

    def _index(self, image: dict[str, Any], annotations: list[Any], captions: list[str] | None) -> _Picture:
        """Check a picture and choose its queries."""
        path = self.path / "images" / image["file_name"]
        size = (int(image["height"]), int(image["width"]))
        with Image.open(path) as stored:
            if (stored.height, stored.width) != size:
                raise ValueError(f"the picture has (height, width) {stored.height, stored.width}, annotated is {size}.")
        segmentations: dict[str, list[Any]] = defaultdict(list)
        for annotation in annotations:
            category = annotation["category_id"]
            if category not in self._names:
                raise ValueError(f"category_id {category!r} is not among the categories.")
            segmentations[self._names[category]].append(annotation["segmentation"])
        picture = _Picture(path=path, size=size, segmentations=dict(segmentations), queries={})
        masks = picture.masks(list(segmentations))

        candidates: dict[str, tuple[str, ...]]
        if captions is None:
            candidates = {name: (name,) for name in sorted(masks)}
        else:
            candidates = {caption: tuple(name for name in masks if mentions(caption, name)) for caption in captions}
            self.num_captions_left_out += sum(not candidates[caption] for caption in captions)
        for query, names in candidates.items():
            share = np.logical_or.reduce([masks[name] for name in names]).mean() if names else -1
            if self._coverage[0] <= share <= self._coverage[1]:
                picture.queries[query] = names
        if picture.queries:
            absent = [name for name in self._all_names if name not in masks]
            absent.sort(key=lambda name: hash_fraction(f"{image['id']}/{name}"))
            picture.queries.update(dict.fromkeys(absent[: self.absent_queries], ()))
        return picture


def _find(folder: Path, kind: str) -> Path:
    """The file of a kind, ``instances`` or ``captions``."""
    direct = folder / f"{kind}.json"
    if direct.is_file():
        return direct
    found = sorted((folder / "annotations").glob(f"{kind}*.json"))
    if len(found) == 1:
        return found[0]
    listing = ", ".join(path.name for path in found) or "none"
    raise FileNotFoundError(
        f"no {kind} file: looked for {direct} and for exactly one {folder / 'annotations' / kind}*.json "
        f"(found: {listing})."
    )


def _read(path: Path, **entries: tuple[str, ...]) -> dict[str, list[Any]]:
    """The named lists of a file, each entry of which has the given keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    for name, keys in entries.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path} must have the lists {', '.join(entries)}; {name} is missing.")
        for entry in content[name]:
            if not isinstance(entry, dict) or not entry.keys() >= set(keys):
                raise ValueError(f"{path}: each of {name} must have {', '.join(keys)}, got {entry!r}.")
    return {name: content[name] for name in entries}
