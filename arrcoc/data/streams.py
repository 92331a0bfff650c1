"""Samples in a row, decoded one at a time: as much memory for ten million pictures as for ten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar

import torch

from arrcoc.data.pictures import decode_picture
from arrcoc.data.queries import read_synonyms
from arrcoc.data.records import MOST_NAMES, Record, check_size, choose_absent, choose_queries, make_sample
from arrcoc.data.sample import RelevanceSample
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips

Item = TypeVar("Item")
Part = tuple[int, int]


class Reader(Protocol):
    """Opens a data set anew: yields part ``i`` of ``n`` of its records and counts what is broken."""

    def __call__(self, skips: Skips, part: Part, generator: torch.Generator | None) -> Iterable[Record]:
        """Records of the part (i, n); the generator may shuffle whole files."""


class RecordStream(Iterable[RelevanceSample]):
    """Samples one after the other, as often as wanted; only the picture at hand is in memory, and the buffer.

    Args:
        read: opens the data set.
        selection: which pictures, and which of their queries. ``limit`` counts in each part by itself.
        vocabulary: names that absent queries are drawn from; None for the first 256 texts seen in each pass, so that
            the first pictures get fewer.
        shuffle: size of the buffer in which records, not yet decoded, are shuffled; 0 keeps the order.
        seed: the order depends on (seed, epoch) alone.
        part: (i, n): only part i of n, 0 <= i < n.

    Attributes:
        skips: what the latest pass did not use, and why.
        epoch: see ``set_epoch``.
    """

    def __init__(
        self,
        read: Reader,
        selection: Selection | None = None,
        *,
        vocabulary: Sequence[str] | None = None,
        shuffle: int = 0,
        seed: int = 0,
        part: Part = (0, 1),
    ) -> None:
        if shuffle < 0:
            raise ValueError(f"shuffle must be >= 0, got {shuffle!r}.")
        if not 0 <= part[0] < part[1]:
            raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part!r}.")
        self.selection = selection or Selection()
        self.skips = Skips(self.selection.on_error)
        self.epoch = 0
        self._read = read
        self._synonyms = None if self.selection.synonyms is None else read_synonyms(self.selection.synonyms)
        self._vocabulary = None if vocabulary is None else tuple(vocabulary)
        self._shuffle = shuffle
        self._seed = seed
        self._part = part

    def part(self, index: int, num_parts: int) -> RecordStream:
        """Part ``index`` of this stream, for one of several workers or ranks; together they see everything once."""
        i, n = self._part
        return RecordStream(
            self._read,
            self.selection,
            vocabulary=self._vocabulary,
            shuffle=self._shuffle,
            seed=self._seed,
            part=(i + n * index, n * num_parts),
        )

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next pass follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[RelevanceSample]:
        return islice(self._samples(), self.selection.limit)

    def _samples(self) -> Iterator[RelevanceSample]:
        self.skips.clear()
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch) if self._shuffle else None
        records = self._read(self.skips, self._part, generator)
        wanted = (record for record in records if self.selection.includes(record.name))
        seen: dict[str, None] = {}
        for record in wanted if generator is None else _shuffled(wanted, self._shuffle, generator):
            try:
                sample = self._sample(record, tuple(seen) if self._vocabulary is None else self._vocabulary)
            except ItemError as error:
                self.skips.add_broken(record.name, error)
                continue
            if self._vocabulary is None and self.selection.absent_queries:
                seen.update(dict.fromkeys(list(record.queries)[: MOST_NAMES - len(seen)]))
            if sample is None:
                self.skips.add_left_out(record.name, "picture without a query", f"{len(record.queries)} texts")
            else:
                yield sample

    def _sample(self, record: Record, vocabulary: Sequence[str]) -> RelevanceSample | None:
        picture = decode_picture(record.image)
        size = (picture.height, picture.width)
        check_size(record, size)
        texts = choose_queries(record, size, self.selection, self.skips)
        if not texts:
            return None
        absent = choose_absent(record, vocabulary, self.selection.absent_queries, self._synonyms)
        return make_sample(record, picture, texts, absent)


def take_part(items: Iterable[Item], part: Part) -> Iterator[Item]:
    """Items i, i + n, i + 2 n, ..."""
    return islice(items, part[0], None, part[1])


def _shuffled(items: Iterable[Item], size: int, generator: torch.Generator) -> Iterator[Item]:
    """Each new item takes the place of a random one of the buffer, which goes out."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(torch.randint(size, (), generator=generator))
        yield buffer[place]
        buffer[place] = item
    yield from (buffer[place] for place in torch.randperm(len(buffer), generator=generator).tolist())
