"""What COCO's files say of each picture: annotations by category, captions, and sentences that refer to one object."""

from __future__ import annotations

import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

from arrcoc.data.records import Record
from arrcoc.data.regions import Region
from arrcoc.data.skips import ItemError, Skips

QUERIES = ("categories", "captions", "sentences")
REGIONS = ("masks", "boxes")
NOTHING_MENTIONED = "caption that mentions nothing annotated"


def mentions(caption: str, name: str) -> bool:
    """Whether a caption has a category name, or its simple plural (-s, -es, -y to -ies), as whole words."""
    stem = re.escape(name.lower())
    forms = [f"{stem}(?:s|es)?"]
    if name.lower().endswith("y"):
        forms.append(f"{re.escape(name.lower()[:-1])}ies")
    return re.search(rf"\b(?:{'|'.join(forms)})\b", caption.lower()) is not None


class CocoRecords(Sequence[Record]):
    """The pictures of a folder in COCO format, each made into a `Record` when asked for.

    Args:
        folder, queries, regions: as in ``CocoFolder``.
        skips: where annotations, captions and sentences that belong to no picture are counted.

    Attributes:
        category_names: all of them, in alphabetical order.
        num_boxes_as_masks: annotations without a segmentation, for which their box stands.
    """

    def __init__(self, folder: Path, skips: Skips, *, queries: str = "categories", regions: str = "masks") -> None:
        if queries not in QUERIES:
            raise ValueError(f'queries must be "categories", "captions" or "sentences", got {queries!r}.')
        if regions not in REGIONS:
            raise ValueError(f'regions must be "masks" or "boxes", got {regions!r}.')
        if not (folder / "images").is_dir():
            raise FileNotFoundError(f"path must be a folder with images/ in it, got {str(folder)!r}.")
        coco = _read(
            _find(folder, "instances"),
            images=("id", "file_name", "height", "width"),
            annotations=("image_id", "category_id"),
            categories=("id", "name"),
        )
        self._folder = folder / "images"
        self._queries = queries
        self._boxes_only = regions == "boxes"
        self._images = coco["images"]
        for image in self._images:
            sides = (image["height"], image["width"])
            if not (isinstance(image["file_name"], str) and all(isinstance(side, int) and side > 0 for side in sides)):
                raise ValueError(f"each image must have a file_name and a height and width >= 1, got {image!r}.")
        ids = {image["id"] for image in self._images}
        if len(ids) < len(self._images):
            raise ValueError(f"image ids must differ, got {len(self._images)} images with {len(ids)} ids.")
        self._names = {category["id"]: category["name"] for category in coco["categories"]}
        if len(self._names) < len(coco["categories"]):
            raise ValueError(
                f"category ids must differ, got {len(coco['categories'])} categories with {len(self._names)} ids."
            )
        for name in self._names.values():
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"the name of a category must be a text that is not empty, got {name!r}.")
        self.category_names = tuple(sorted(set(self._names.values())))
        self._annotations = _by_image(coco["annotations"], ids, "annotation", skips)
        self.num_boxes_as_masks = 0
        if not self._boxes_only:
            self.num_boxes_as_masks = sum(not annotation.get("segmentation") for annotation in coco["annotations"])
        self._texts: dict[Any, list[dict[str, Any]]] = {}
        if queries == "captions":
            captions = _read(_find(folder, "captions"), annotations=("image_id", "caption"))["annotations"]
            self._texts = _by_image(captions, ids, "caption", skips)
        elif queries == "sentences":
            sentences = _sentences(_find(folder, "refs"), coco["annotations"], skips)
            self._texts = _by_image(sentences, ids, "sentence", skips)

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        image = self._images[index]
        try:
            return self._record(image)
        except ItemError as error:
            error.name = image["file_name"]
            raise

    def _record(self, image: dict[str, Any]) -> Record:
        regions = {}  # of each annotation, by identity
        things: dict[str, list[Region]] = defaultdict(list)
        for annotation in self._annotations.get(image["id"], ()):
            category = annotation["category_id"]
            if category not in self._names:
                message = f"category_id {category!r} is not among the categories."
                raise ItemError(message, reason="annotation broken")
            region = regions[id(annotation)] = _region(annotation, self._boxes_only)
            things[self._names[category]].append(region)

        queries: dict[str, tuple[Region, ...]] = {}
        left_out = []
        if self._queries == "categories":
            queries = {name: tuple(things[name]) for name in sorted(things)}
        elif self._queries == "captions":
            for caption in dict.fromkeys(str(text["caption"]) for text in self._texts.get(image["id"], ())):
                named = tuple(region for name in things if mentions(caption, name) for region in things[name])
                if named:
                    queries[caption] = named
                else:
                    left_out.append((NOTHING_MENTIONED, repr(caption)))
        else:
            for sentence in self._texts.get(image["id"], ()):
                region = regions[id(sentence["annotation"])]
                others = queries.get(sentence["text"], ())
                queries[sentence["text"]] = others if region in others else (*others, region)
        return Record(
            name=image["file_name"],
            image=self._folder / image["file_name"],
            queries=queries,
            size=(image["height"], image["width"]),
            present=tuple(things),
            key=str(image["id"]),
            left_out=tuple(left_out),
        )


def _region(annotation: dict[str, Any], boxes_only: bool) -> Region:
    segmentation = annotation.get("segmentation")
    if segmentation and not boxes_only:
        return Region(kind="rle" if isinstance(segmentation, dict) else "polygons", value=segmentation)
    if annotation.get("bbox"):
        return Region(kind="boxes", value=[annotation["bbox"]])
    wanted = "a bbox" if boxes_only else "a segmentation or a bbox"
    message = f"annotation {annotation.get('id', 'without id')} must have {wanted}."
    raise ItemError(message, reason="annotation broken")


def _sentences(path: Path, annotations: Sequence[dict[str, Any]], skips: Skips) -> list[dict[str, Any]]:
    """Sentences of RefCOCO's list of references, each with the annotation that it refers to."""
    refs = _load(path)
    if not isinstance(refs, list):
        raise ValueError(f"{path} must be a list of references, got {type(refs).__name__}.")
    by_id = {annotation["id"]: annotation for annotation in annotations if "id" in annotation}
    found = []
    for number, ref in enumerate(refs):
        parts = ref.get("sentences") if isinstance(ref, dict) else None
        if not isinstance(parts, list) or isinstance(ref.get("ann_id", []), list | dict):
            raise ValueError(f"{path}: each reference must have ann_id and a list of sentences, got {ref!r}.")
        name = f"reference {ref.get('ref_id', number)}"
        annotation = by_id.get(ref["ann_id"])
        if annotation is None:
            error = ItemError(f"ann_id {ref['ann_id']!r} is not among the annotations.", reason="annotation missing")
            skips.add_broken(name, error)
            continue
        if ref.get("image_id", annotation["image_id"]) != annotation["image_id"]:
            message = (
                f"image_id is {ref['image_id']!r}, that of annotation {ref['ann_id']!r} {annotation['image_id']!r}."
            )
            skips.add_broken(name, ItemError(message, reason="annotation of another picture"))
            continue
        for part in parts:
            text = part.get("sent") or part.get("raw") if isinstance(part, dict) else None
            if not isinstance(text, str) or not text.strip():
                error = ItemError(f'a sentence must have a text "sent" or "raw", got {part!r}.', reason="no text")
                skips.add_broken(name, error)
                continue
            found.append({"image_id": annotation["image_id"], "text": text.strip(), "annotation": annotation})
    return found


def _by_image(entries: Iterable[dict[str, Any]], ids: set[Any], kind: str, skips: Skips) -> dict[Any, list[Any]]:
    """Annotations or texts by image id; one without a picture is broken."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for number, entry in enumerate(entries):
        if entry["image_id"] in ids:
            found[entry["image_id"]].append(entry)
        else:
            error = ItemError(f"image_id {entry['image_id']!r} is not among the images.", reason="picture not listed")
            skips.add_broken(f"{kind} {entry.get('id', number)}", error)
    return dict(found)


def _find(folder: Path, kind: str) -> Path:
    """The file of a kind: ``instances``, ``captions`` or ``refs``."""
    direct = folder / f"{kind}.json"
    if direct.is_file():
        return direct
    found = sorted((folder / "annotations").glob(f"{kind}*.json"))
    if len(found) == 1:
        return found[0]
    pickles = sorted([*folder.glob(f"{kind}*.p"), *folder.glob(f"annotations/{kind}*.p")])
    if pickles and not found:
        raise ValueError(
            f"{pickles[0]} is a pickle, and opening a pickle runs whatever code is in it. If you trust its source, "
            f'turn it into {direct.name} once: python -c "import json, pickle; '
            f"json.dump(pickle.load(open({str(pickles[0])!r}, 'rb')), open({str(direct)!r}, 'w'))\""
        )
    listing = ", ".join(path.name for path in found) or "none"
    raise FileNotFoundError(
        f"no {kind} file: looked for {direct} and for exactly one {folder / 'annotations' / kind}*.json "
        f"(found: {listing})."
    )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_hook=_pack)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _pack(entry: dict[str, Any]) -> dict[str, Any]:
    """Sound polygons as arrays of numbers, which take a quarter of the memory of lists."""
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        with suppress(
            TypeError, OverflowError
        ):  # a broken one is left as it is, and refused when its picture is checked
            entry["segmentation"] = [array("d", ring) for ring in polygons]
    return entry


def _read(path: Path, **entries: tuple[str, ...]) -> dict[str, list[Any]]:
    """The named lists of a file, each entry of which has the given keys."""
    content = _load(path)
    for name, keys in entries.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path} must have the lists {', '.join(entries)}; {name} is missing.")
        for entry in content[name]:
            if not isinstance(entry, dict) or any(key not in entry for key in keys):
                raise ValueError(f"{path}: each of {name} must have {', '.join(keys)}, got {entry!r}.")
            for key in ("id", "image_id", "category_id"):
                if isinstance(entry.get(key), list | dict):
                    raise ValueError(f"{path}: {key} must be a number or a text, got {entry[key]!r}.")
    return {name: content[name] for name in entries}
