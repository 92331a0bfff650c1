"""From what a file says of a picture to a sample: the one place that all readers of this package go through.

A reader makes `Record`s. ``choose_queries`` says what is asked of a record, ``decode_record`` makes the sample;
`RecordDataset` does so by number, `RecordStream` in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from arrcoc.data.masks import Mask
from arrcoc.data.pictures import PictureSource, decode_picture, picture_size
from arrcoc.data.regions import Region
from arrcoc.data.sample import RelevanceDataset, RelevanceSample
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.splits import hash_fraction, split_by_image
from arrcoc.images import to_tensor

SPLITS = ("train", "val", "test")
CHECKS = ("headers", "pixels")
# Absent queries of a picture are drawn from at most this many names, so that a data set of free texts stays fast.
_MOST_NAMES = 1000


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
    """

    name: str
    image: PictureSource
    queries: Mapping[str, tuple[Region, ...] | None]
    size: tuple[int, int] | None = None
    present: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pictures and queries of a data set are used.

    Args:
        split: "train", "val" or "test" for the part that ``split_by_image`` gives it, None for all.
        val_share: share of the pictures in "val", (0, 1).
        test_share: share of the pictures in "test", [0, 1 - val_share); the rest is "train".
        split_seed: another seed, other splits.
        limit: at most this many pictures, None for all; >= 1.
        min_coverage, max_coverage: a query is left out if its mask covers less or more of the picture, 0 to 1, or not
            one pixel.
        absent_queries: how many texts that name nothing in the picture are added (fewer if there are fewer), drawn from
            the names of the whole data set by a hash of the picture; >= 0.
        on_error: "raise" stops at the first broken item, "skip" leaves it out and counts it.
        check: what is read of each picture when a data set is opened: "headers", or "pixels" too, which takes longer
            and finds truncated files then and not in the middle of training. Streams always see the pixels.
    """

    _: KW_ONLY
    split: str | None = None
    val_share: float = 0.2
    test_share: float = 0.0
    split_seed: int = 0
    limit: int | None = None
    min_coverage: float = 0.01
    max_coverage: float = 0.60
    absent_queries: int = 0
    on_error: str = "raise"
    check: str = "headers"

    def __post_init__(self) -> None:
        if self.split not in (None, *SPLITS):
            raise ValueError(f'split must be "train", "val", "test" or None, got {self.split!r}.')
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must be in (0, 1), got {self.val_share!r}.")
        if not 0 <= self.test_share < 1 - self.val_share:
            raise ValueError(f"test_share must be in [0, 1 - val_share), got {self.test_share!r}.")
        if self.split == "test" and not self.test_share:
            raise ValueError(f'split "test" needs test_share > 0, got {self.test_share!r}.')
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {self.limit!r}.")
        if not 0 <= self.min_coverage <= self.max_coverage <= 1:
            raise ValueError(
                f"0 <= min_coverage <= max_coverage <= 1 must hold, got {self.min_coverage!r} and "
                f"{self.max_coverage!r}."
            )
        if self.absent_queries < 0:
            raise ValueError(f"absent_queries must be >= 0, got {self.absent_queries!r}.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {self.on_error!r}.')
        if self.check not in CHECKS:
            raise ValueError(f'check must be "headers" or "pixels", got {self.check!r}.')

    @property
    def shares(self) -> dict[str, float]:
        """Share of each split; "test" only if it has one."""
        shares = {"train": 1 - self.val_share - self.test_share, "val": self.val_share, "test": self.test_share}
        return {split: share for split, share in shares.items() if share}

    def includes(self, name: str) -> bool:
        """Whether the picture of this name is in the split."""
        return self.split is None or bool(split_by_image([name], self.shares, self.split_seed)[self.split])


def check_size(record: Record, size: tuple[int, int]) -> None:
    """Refuse a picture (height, width) that its regions were not made for."""
    if record.size not in (None, size):
        raise ItemError(
            f"the picture has (height, width) {size}, annotated is {record.size}.", reason="picture of another size"
        )


def choose_queries(record: Record, size: tuple[int, int], selection: Selection, skips: Skips) -> tuple[str, ...]:
    """The texts of a record that can be asked for: absent ones, and those whose mask is neither too small nor too large.

    Masks are decoded only where the outlines do not decide.

    Raises:
        ItemError: if a region is broken, or a text can only be scored and broken items are not skipped.
    """
    distinct = {id(region): region for regions in record.queries.values() for region in regions or ()}
    counts = {key: region.count(*size) for key, region in distinct.items()}
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
        return "mask outside the picture"
    if high / num_pixels < selection.min_coverage:
        return f"mask below {selection.min_coverage:g} of the picture"
    if low / num_pixels > selection.max_coverage:
        return f"mask above {selection.max_coverage:g} of the picture"
    sure = low > 0 and selection.min_coverage <= low / num_pixels and high / num_pixels <= selection.max_coverage
    return "" if sure else None


def absent_names(record: Record, vocabulary: Sequence[str], number: int) -> tuple[str, ...]:
    """The first ``number`` names that are not in the picture, in the order of their hash with the picture's key."""
    if not number:
        return ()
    key = record.key or record.name
    present = {text.casefold() for text in (*record.present, *record.queries)}
    if len(vocabulary) > _MOST_NAMES:
        start = int(hash_fraction(key) * len(vocabulary))
        vocabulary = [vocabulary[(start + step) % len(vocabulary)] for step in range(_MOST_NAMES)]
    absent = [name for name in vocabulary if name.casefold() not in present]
    return tuple(sorted(absent, key=lambda name: hash_fraction(f"{key}/{name}"))[:number])


def decode_record(record: Record, texts: Sequence[str], absent: Sequence[str] = ()) -> RelevanceSample:
    """The sample: the pixels, the masks of the chosen texts, and empty masks for the absent ones.

    Raises:
        ItemError: if the picture or a region is broken or their sizes differ.
    """
    picture = decode_picture(record.image)
    size = (picture.height, picture.width)
    check_size(record, size)
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
        try:
            return decode_record(record, texts, absent_names(record, self._vocabulary, self.selection.absent_queries))
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
