"""Samples as pictures, for training that needs them anew each time: augmentation, or blocks of the backbone that learn.

Axes: B batch, Q queries, N tokens, H and W picture height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from arrcoc.data.augment import RelevanceAugmentation
from arrcoc.data.queries import QueryVariants
from arrcoc.data.sample import RelevanceSample, coverage
from arrcoc.training.batches import BatchPlan
from arrcoc.training.workers import read_items
from sam_core._checks import check_count

if TYPE_CHECKING:
    from arrcoc.model.relevance import RelevanceModel

Item = tuple[Tensor, list[str], Tensor]


def squash(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture [3, h, w] in [0, 1] at another size, whatever its aspect ratio: bicubic, antialiased.

    It is what `encode_samples` does to pictures, and gives the same bits.
    """
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)


class ImageLoader:
    """Batches (images [B, 3, H, W], texts [B][Q], targets [B, Q, N]); re-iterable, exact on resume.

    A sample's changes and the choice of its queries depend on (seed, epoch, number of the sample), the order on (seed,
    epoch): never on the workers. The choice is made as in `TokenLoader`, after the augmentation, which may leave out
    queries. Of several ranks each gets its contiguous part of every batch.

    Args:
        samples: pictures with queries and masks, by number.
        size: (height, width) that pictures are squashed to.
        grid: (h, w) in tokens that the targets are for; N = h * w.
        batch_size: samples a batch, of all ranks together.
        num_queries: Q, queries a sample.
        seed: of order, augmentation, choice of queries and variants.
        augmentation: changes every sample; None shows it as it is.
        query_variants: each query that is shown is replaced by one of its variants; None shows it as it is.
        rank, num_ranks: which part of every batch, 0 <= rank < num_ranks.
        workers: processes that read and change samples; 0 does it here.

    Raises:
        ValueError: if samples are a stream or none, or an argument is outside its range.

    Example:
        >>> from arrcoc.data import Scenes
        >>> images, texts, targets = next(iter(ImageLoader(Scenes(8), (512, 512), (16, 16), batch_size=2)))
        >>> images.shape, len(texts), targets.shape
        (torch.Size([2, 3, 512, 512]), 2, torch.Size([2, 6, 256]))
    """

    def __init__(
        self,
        samples: Sequence[RelevanceSample],
        size: tuple[int, int],
        grid: tuple[int, int],
        *,
        batch_size: int = 16,
        num_queries: int = 6,
        seed: int = 0,
        augmentation: RelevanceAugmentation | None = None,
        query_variants: QueryVariants | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        workers: int = 0,
    ) -> None:
        check_count("workers", workers, at_least=0)
        if not isinstance(samples, Sequence):
            raise ValueError(f"samples must be a sequence, to be shuffled, got {type(samples).__name__}.")
        if not len(samples):
            raise ValueError("samples must hold at least one sample, got none.")
        for name, sides in (("size", size), ("grid", grid)):
            if len(sides) != 2 or min(sides) < 1:
                raise ValueError(f"{name} must be (height, width), both >= 1, got {sides!r}.")
        self.epoch = 0
        self.workers = workers
        self._plan = BatchPlan(
            num_samples=len(samples),
            batch_size=batch_size,
            num_queries=num_queries,
            seed=seed,
            rank=rank,
            num_ranks=num_ranks,
        )
        self._items = _Items(samples, size, grid, self._plan, augmentation, query_variants)

    @classmethod
    def for_model(
        cls,
        model: RelevanceModel,
        samples: Sequence[RelevanceSample],
        *,
        batch_size: int = 16,
        num_queries: int = 6,
        seed: int = 0,
        augmentation: RelevanceAugmentation | None = None,
        query_variants: QueryVariants | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        workers: int = 0,
    ) -> ImageLoader:
        """Pictures at the size of the model's largest scale, targets for its grid: those of `encode_samples`."""
        backbone, scales = model.backbone, model.multiscale
        height, width = backbone.input_size(1, 1, scale=scales.base_scale)
        return cls(
            samples,
            backbone.input_size(1, 1, scale=max(scales.scales)),
            (height // backbone.stride[0], width // backbone.stride[1]),
            batch_size=batch_size,
            num_queries=num_queries,
            seed=seed,
            augmentation=augmentation,
            query_variants=query_variants,
            rank=rank,
            num_ranks=num_ranks,
            workers=workers,
        )

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order and changes the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[Tensor, list[list[str]], Tensor]]:
        batches = self._plan.batches(self._plan.generator(self.epoch))
        own = [[(self.epoch, number) for number in batch[self._plan.own(len(batch))].tolist()] for batch in batches]
        return read_items(self._items, self.workers, batches=own, collate=self._items.collate)

    @property
    def num_samples(self) -> int:
        """How many pictures there are, on all ranks together."""
        return self._plan.num_samples

    def sample(self, number: int) -> tuple[Tensor, tuple[str, ...], Tensor]:
        """One picture [1, 3, H, W] as it is, all its queries, and their targets [Q, N]."""
        sample = self._items.samples[number]
        image, targets = squash(sample.image, self._items.size), coverage(sample.masks, self._items.grid)
        return image[None], tuple(sample.queries), targets


@dataclass(frozen=True, eq=False)
class _Items(Dataset[Item]):
    """What a worker makes of (epoch, number of a sample)."""

    samples: Sequence[RelevanceSample]
    size: tuple[int, int]
    grid: tuple[int, int]
    plan: BatchPlan
    augmentation: RelevanceAugmentation | None
    query_variants: QueryVariants | None

    def __getitem__(self, index: tuple[int, int]) -> Item:
        epoch, number = index
        sample, generator = self.samples[number], self.plan.generator(epoch, number)
        if not sample.queries:
            raise ValueError(f"every sample must have a query, {sample.name!r} has none.")
        if self.augmentation is not None:
            sample = self.augmentation(sample, generator)
        chosen = self.plan.choose(len(sample.queries), generator)
        texts = [sample.queries[query] for query in chosen]
        if self.query_variants is not None:
            texts = [self.query_variants.draw(text, generator) for text in texts]
        shown = sorted(set(chosen))  # each mask is measured once, however often it is shown
        targets = coverage(sample.masks[shown], self.grid)[[shown.index(query) for query in chosen]]
        return squash(sample.image, self.size), texts, targets

    def collate(self, items: list[Item]) -> tuple[Tensor, list[list[str]], Tensor]:
        """A batch of this rank's items, of which there may be none."""
        images = torch.zeros(len(items), 3, *self.size)
        targets = torch.zeros(len(items), self.plan.num_queries, self.grid[0] * self.grid[1])
        for place, (image, _, target) in enumerate(items):
            images[place], targets[place] = image, target
        return images, [texts for _, texts, _ in items], targets
