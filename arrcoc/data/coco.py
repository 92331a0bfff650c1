"""Folders in COCO format: category names, captions or referring sentences ask, masks or boxes answer."""

from __future__ import annotations

import os
from pathlib import Path

from arrcoc.data.coco_records import NOTHING_MENTIONED, CocoRecords
from arrcoc.data.records import RecordDataset
from arrcoc.data.selection import Selection
from arrcoc.data.skips import Skips


class CocoFolder(RecordDataset):
    """A folder with ``images/`` and ``instances.json``: polygons, run lengths, boxes.

    A sample is a picture with all its queries, which are one of

    - "categories": the names of the categories; the mask is the union of their annotations, crowds included.
    - "captions": of ``captions.json``; the mask is the union of all categories that the caption mentions.
    - "sentences": of ``refs.json``, as in RefCOCO; the mask is that of the annotation that the sentence refers to.

    Opening reads the annotations and the pictures' headers; masks are counted from their outlines and decoded only
    where parts that may overlap leave their coverage open. Pixels are read when a sample is asked for. Masks refer to
    the stored pixels, so a rotation in EXIF is not applied.

    Args:
        path: the folder; each file may also be the only one that matches ``annotations/instances*.json`` (and
            ``captions*.json``, ``refs*.json``).
        queries: "categories", "captions" or "sentences".
        regions: "masks", where an annotation without a segmentation is given by its box; or "boxes" for all.
        split, val_share, test_share, split_seed, limit, min_coverage, max_coverage, absent_queries, synonyms, on_error,
            check: as in `Selection`. Absent queries are names of categories.

    Attributes:
        names: file names of the pictures.
        skips: what was not used, and why.
        num_boxes_as_masks: annotations without a segmentation; with regions="masks" their boxes stand in.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if an argument is outside its range, a file is not in COCO format, or an item is broken.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        queries: str = "categories",
        regions: str = "masks",
        split: str | None = None,
        val_share: float = 0.2,
        test_share: float = 0.0,
        split_seed: int = 0,
        limit: int | None = None,
        min_coverage: float = 0.01,
        max_coverage: float = 0.60,
        absent_queries: int = 0,
        synonyms: str | None = None,
        on_error: str = "raise",
        check: str = "headers",
    ) -> None:
        selection = Selection(
            split=split,
            val_share=val_share,
            test_share=test_share,
            split_seed=split_seed,
            limit=limit,
            min_coverage=min_coverage,
            max_coverage=max_coverage,
            absent_queries=absent_queries,
            synonyms=synonyms,
            on_error=on_error,
            check=check,
        )
        self.path = Path(path)
        skips = Skips(on_error, num_examples=None)
        records = CocoRecords(self.path, skips, queries=queries, regions=regions)
        self.num_boxes_as_masks = records.num_boxes_as_masks
        super().__init__(records, selection, vocabulary=records.category_names, skips=skips)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, what is wrong) of every broken item; empty with on_error="raise"."""
        return [example for reason in self.skips.broken for example in self.skips.examples[reason]]

    @property
    def num_captions_left_out(self) -> int:
        """Captions that mention nothing annotated."""
        return self.skips.left_out[NOTHING_MENTIONED]
