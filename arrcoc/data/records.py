"""From what a file says of a picture to a sample: the one place that all readers of this package go through.

A reader makes `Record`s, ``choose_queries`` says what is asked of each, ``make_sample`` decodes. `RecordDataset` does
so by number, ``streams.RecordStream`` in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from arrcoc.data.masks import Mask
from arrcoc.data.pictures import PictureSource, decode_picture, picture_size
from arrcoc.data.queries import absent_names, read_synonyms
from arrcoc.data.regions import Region, count_pixels
from arrcoc.data.sample import RelevanceDataset, RelevanceSample
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.splits import hash_fraction
from arrcoc.images import to_tensor

# Absent queries of a picture are drawn from at most this many names, so that a data set of free texts stays fast.
MOST_NAMES = 256


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Record:
    """A picture not yet decoded, what is asked of it, and where the answer is.

    Args:
        name: what reports and splits call the picture.
        image: path, bytes of a file, or PIL picture.
        queries: text -> its regions, () for a text that names nothing in the picture, None for one to score only.
        size: (height, width) that the regions were made for, if it is written down.
        present: further names of things in the picture, which are never drawn as absent queries.
        key: what absent queries are drawn by; the name if empty.
        left_out: (reason, detail) of what the reader itself did not use.
    """

    name: str
    image: PictureSource
    queries: Mapping[str, tuple[Region, ...] | None]
    size: tuple[int, int] | None = None
    present: tuple[str, ...] = ()
    key: str = ""
    left_out: tuple[tuple[str, str], ...] = ()


def check_size(record: Record, size: tuple[int, int]) -> None:
    """Refuse a picture (height, width) that its regions were not made for."""
    if record.size not in (None, size):
        raise ItemError(
            f"the picture has (height, width) {size}, annotated is {record.size}.", reason="picture of another size"
        )


def choose_queries(record: Record, size: tuple[int, int], selection: Selection, skips: Skips) -> tuple[str, ...]:
    """The texts of a record that are asked for: absent ones, and those with a mask neither too small nor too large.

    Masks are decoded only where the outlines do not decide.

    Raises:
        ItemError: if a region is broken, or a text can only be scored and broken items are not skipped.
    """
    for reason, detail in record.left_out:
        skips.add_left_out(record.name, reason, detail)
    distinct = {id(region): region for regions in record.queries.values() for region in regions or ()}
    counts = dict(zip(distinct, count_pixels(list(distinct.values()), *size), strict=True))
    masks: dict[int, Mask] = {}
    chosen = []
    for text, regions in record.queries.items():
        if regions is None:
            skips.add_broken(
                record.name, ItemError(f"{text!r} has no region and can only be scored.", reason="no region")
            )
        elif not regions:
            chosen.append(text)
        else:
            low = max(counts[id(region)][0] for region in regions)
            high = min(sum(counts[id(region)][1] for region in regions), size[0] * size[1])
            fits = _fits(low, high, size, selection)
            if fits is None:
                for region in regions:
                    if id(region) not in masks:
                        masks[id(region)] = region.decode(*size)
                exact = int(np.logical_or.reduce([masks[id(region)] for region in regions]).sum())
                fits = _fits(exact, exact, size, selection)
            if fits == "":
                chosen.append(text)
            else:
                skips.add_left_out(record.name, str(fits), repr(text))
    return tuple(chosen)


def _fits(low: int, high: int, size: tuple[int, int], selection: Selection) -> str | None:
    """Why a mask of low to high pixels is left out, "" if it is not, None if that depends on the exact number."""
    num_pixels = size[0] * size[1]
    if high == 0:
        return "mask without a pixel"
    if high / num_pixels < selection.min_coverage:
        return f"mask below {selection.min_coverage:g} of the picture"
    if low / num_pixels > selection.max_coverage:
        return f"mask above {selection.max_coverage:g} of the picture"
    sure = low > 0 and selection.min_coverage <= low / num_pixels and high / num_pixels <= selection.max_coverage
    return "" if sure else None


def choose_absent(
    record: Record, vocabulary: Sequence[str], count: int, synonyms: Mapping[str, Sequence[str]] | None = None
) -> tuple[str, ...]:
    """Names of the vocabulary that are not in the picture, chosen by the hash of the picture's key."""
    if not count:
        return ()
    key = record.key or record.name
    if len(vocabulary) > MOST_NAMES:
        start = int(hash_fraction(key) * len(vocabulary))
        vocabulary = [vocabulary[(start + step) % len(vocabulary)] for step in range(MOST_NAMES)]
    return absent_names(vocabulary, (*record.present, *record.queries), count, key=key, synonyms=synonyms)


def make_sample(record: Record, picture: Image.Image, texts: Sequence[str], absent: Sequence[str]) -> RelevanceSample:
    """The sample of a decoded picture: masks of the chosen texts, and empty masks for the absent ones.

    Raises:
        ItemError: if a region is broken.
    """
    size = (picture.height, picture.width)
    chosen = {text: record.queries[text] or () for text in texts}
    distinct = {id(region): region for regions in chosen.values() for region in regions}
    parts = {key: region.decode(*size) for key, region in distinct.items()}
    masks = np.zeros((len(chosen) + len(absent), *size), dtype=np.bool_)
    for mask, regions in zip(masks, chosen.values(), strict=False):
        for region in regions:
            mask |= parts[id(region)]
    return RelevanceSample(
        image=to_tensor(picture), queries=(*chosen, *absent), masks=torch.from_numpy(masks), name=record.name
    )


class RecordDataset(RelevanceDataset):
    """Samples by number, made of records: each is checked once when the data set is opened, and decoded when asked for.

    Args:
        records: the pictures; making number ``index`` may raise `ItemError`.
        selection: which of them, and which of their queries.
        vocabulary: names that absent queries are drawn from; None for all texts of all records.
        skips: goes on counting here; None for a new one.

    Attributes:
        skips: what was not used, and why.
        names: of the pictures, in order.

    Raises:
        ItemError: if an item is broken and on_error is "raise".
    """

    def __init__(
        self,
        records: Sequence[Record],
        selection: Selection | None = None,
        *,
        vocabulary: Sequence[str] | None = None,
        skips: Skips | None = None,
    ) -> None:
        self.selection = selection = selection or Selection()
        self.skips = Skips(selection.on_error) if skips is None else skips
        self._records = records
        self._synonyms = None if selection.synonyms is None else read_synonyms(selection.synonyms)
        self._chosen: list[tuple[int, tuple[str, ...]]] = []
        names: list[str] = []
        seen: dict[str, None] = {}
        for number in range(len(records)):
            if len(self._chosen) == selection.limit:
                break
            try:
                record = records[number]
            except ItemError as error:
                self.skips.add_broken(f"picture {number}", error)
                continue
            if vocabulary is None and selection.absent_queries:
                seen.update(dict.fromkeys(record.queries))
            if not selection.includes(record.name):
                continue
            try:
                texts = self._check(record)
            except ItemError as error:
                self.skips.add_broken(record.name, error)
                continue
            if texts:
                self._chosen.append((number, texts))
                names.append(record.name)
            else:
                self.skips.add_left_out(record.name, "picture without a query", f"{len(record.queries)} texts")
        self.names = tuple(names)
        self._vocabulary = tuple(sorted(seen)) if vocabulary is None else tuple(vocabulary)

    def __len__(self) -> int:
        return len(self._chosen)

    def make_sample(self, index: int) -> RelevanceSample:
        """Read picture number ``index``.

        Raises:
            ItemError: if its pixels cannot be read.
        """
        number, texts = self._chosen[index]
        record = self._records[number]
        absent = choose_absent(record, self._vocabulary, self.selection.absent_queries, self._synonyms)
        try:
            picture = decode_picture(record.image)
            check_size(record, (picture.height, picture.width))
            return make_sample(record, picture, texts, absent)
        except ItemError as error:
            raise ItemError(f"{record.name}: {error}", reason=error.reason) from error

    def _check(self, record: Record) -> tuple[str, ...]:
        if self.selection.check == "pixels":
            picture = decode_picture(record.image)
            size = (picture.height, picture.width)
        else:
            size = picture_size(record.image)
        check_size(record, size)
        return choose_queries(record, size, self.selection, self.skips)
