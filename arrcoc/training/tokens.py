"""Samples encoded once: tokens of the frozen backbone and targets, reread every epoch in a new order.

Axes: S samples, B batch, Q queries, N tokens, D embedding width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm

from arrcoc.data.queries import QueryVariants
from arrcoc.data.sample import RelevanceSample, coverage
from arrcoc.model.relevance import RelevanceModel
from arrcoc.tokens import VisualTokens, concatenate
from arrcoc.training.batches import BatchPlan
from arrcoc.training.token_cache import CachedTokens, TokenCache, TokenCacheWarning, picture_key, square_grid
from arrcoc.training.workers import read_items
from sam_core._checks import check_count


class TokenLoader:
    """Batches (VisualTokens, texts [B][Q], targets [B, Q, N]) of encoded samples; re-iterable, exact on resume.

    The order and the choice of queries depend on (seed, epoch) alone. A sample with more than Q queries shows Q of
    them, drawn without replacement; one with fewer repeats some. Of several ranks each gets its contiguous part of
    every batch; together they see the batches of a single process.

    Args:
        tokens: tokens of all S samples, in memory or in a cache.
        queries: texts of each sample, at least one each.
        targets: for each sample, coverage [number of its queries, N] in [0, 1].
        batch_size: samples a batch, of all ranks together.
        num_queries: Q, queries a sample.
        seed: of order, choice of queries and variants.
        query_variants: each query that is shown is replaced by one of its variants; None shows it as it is.
        rank, num_ranks: which part of every batch, 0 <= rank < num_ranks.
    """

    def __init__(
        self,
        tokens: VisualTokens | CachedTokens,
        queries: Sequence[Sequence[str]],
        targets: Sequence[Tensor],
        *,
        batch_size: int = 16,
        num_queries: int = 6,
        seed: int = 0,
        query_variants: QueryVariants | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not len(tokens) == len(queries) == len(targets) > 0:
            raise ValueError(
                f"tokens, queries and targets must be for the same samples, at least one; "
                f"got {len(tokens)}, {len(queries)} and {len(targets)}."
            )
        if not all(queries):
            raise ValueError("queries must hold at least one text for every sample, got none for one of them.")
        self.tokens = tokens
        self.queries = [tuple(texts) for texts in queries]
        self.targets = list(targets)
        self.batch_size = batch_size
        self.num_queries = num_queries
        self.seed = seed
        self.query_variants = query_variants
        self.epoch = 0
        self._plan = BatchPlan(
            num_samples=len(self.queries),
            batch_size=batch_size,
            num_queries=num_queries,
            seed=seed,
            rank=rank,
            num_ranks=num_ranks,
        )

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[VisualTokens, list[list[str]], Tensor]]:
        generator = self._plan.generator(self.epoch)
        for index in self._plan.batches(generator):
            # Every rank draws for the whole batch, so that all draw the same.
            shown = [self._show(sample, generator) for sample in index.tolist()]
            own = self._plan.own(len(index))
            tokens = self.tokens.select(index[own])
            texts, targets = [texts for texts, _ in shown[own]], [target for _, target in shown[own]]
            none = torch.zeros(0, self.num_queries, tokens.num_tokens)
            yield tokens, texts, torch.stack(targets) if targets else none

    def _show(self, sample: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Texts and targets [Q, N] of the queries that a sample shows."""
        chosen = self._plan.choose(len(self.queries[sample]), generator)
        texts = [self.queries[sample][number] for number in chosen]
        if self.query_variants is not None:
            texts = [self.query_variants.draw(text, generator) for text in texts]
        return texts, self.targets[sample][chosen]

    def sample(self, number: int) -> tuple[VisualTokens, tuple[str, ...], Tensor]:
        """Tokens of one picture, all its queries, and their targets [Q, N]."""
        return self.tokens.select(torch.tensor([number])), self.queries[number], self.targets[number]

    @property
    def num_samples(self) -> int:
        """How many pictures there are, on all ranks together."""
        return len(self.queries)


class _Read(NamedTuple):
    """What is needed of a sample: its key if there is a cache, its pixels unless they are known, what it is asked."""

    key: str
    image: Tensor | None
    queries: tuple[str, ...]
    targets: Tensor


class _Reader(Dataset[_Read]):
    """Reads samples, in this process or in a worker, which sends no pixels of pictures that have an entry."""

    def __init__(self, samples: Any, grid: tuple[int, int], cache: TokenCache | None, *, skip_known: bool) -> None:
        self.samples, self.grid, self.keyed = samples, grid, cache is not None
        self.known = cache.keys() if cache is not None and skip_known else frozenset()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> _Read:
        return self.read(self.samples[number])

    def read(self, sample: RelevanceSample) -> _Read:
        key = picture_key(sample.image) if self.keyed else ""
        image = None if key in self.known else sample.image
        return _Read(key, image, tuple(sample.queries), coverage(sample.masks, self.grid))


@torch.no_grad()
def encode_samples(
    model: RelevanceModel,
    samples: Sequence[RelevanceSample] | Iterable[RelevanceSample],
    *,
    batch_size: int = 16,
    num_queries: int = 6,
    seed: int = 0,
    progress: bool = False,
    cache: TokenCache | str | os.PathLike[str] | None = None,
    query_variants: QueryVariants | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    workers: int = 0,
) -> TokenLoader:
    """Run the backbone once over all samples, every picture squashed to a square so that they share a grid.

    1,000 samples of 196 tokens of width 384 take 0.3 GB, and as much again for every scale if there are several: in
    memory, or on disk with a cache. From a cache come the bits that were written first, so a run that is resumed sees
    the same; without one, pictures are encoded one at a time, so that no digit depends on their company.

    Args:
        model: gives the backbone and the scales.
        samples: pictures with queries and masks; any iterable, e.g. a stream. With several ranks it is gone through a
            second time for pictures that no rank encoded.
        batch_size, num_queries, seed, query_variants: of the loader.
        progress: show a progress bar.
        cache: a `TokenCache` or its folder; only pictures that it does not hold are encoded. None keeps the tokens in
            memory.
        rank, num_ranks: with a cache each rank encodes its share of the missing pictures and waits for the others;
            without one every rank encodes all.
        workers: processes that read samples; 0 reads them here. Streams are read here.

    Raises:
        ValueError: if there is no sample, an argument is outside its range, or the cache is of another model.

    Warns:
        TokenCacheWarning: if entries were damaged; they are encoded anew.
    """
    check_count("workers", workers, at_least=0)
    BatchPlan(  # refuses bad settings before pictures are encoded, which takes a while
        num_samples=1, batch_size=batch_size, num_queries=num_queries, seed=seed, rank=rank, num_ranks=num_ranks
    )
    if isinstance(samples, Sequence) and not len(samples):
        raise ValueError("samples must hold at least one sample, got none.")
    if workers and not isinstance(samples, Sequence):
        raise ValueError(f"workers must be 0 for samples that are a stream, got {workers!r}.")
    if cache is not None and not isinstance(cache, TokenCache):
        cache = TokenCache(cache, model)
    if cache is not None and not cache.fits(model):
        raise ValueError(f"cache must be made for this model, got one for {cache.space}.")

    keys: list[str] = []
    queries: list[tuple[str, ...]] = []
    targets: list[Tensor] = []
    parts: list[VisualTokens] = []
    for number, item in enumerate(_read(model, samples, cache, workers, progress)):
        keys.append(item.key)
        queries.append(item.queries)
        targets.append(item.targets)
        if item.image is None:
            continue
        if cache is None:
            parts.append(_encode(model, item.image))
        elif number % num_ranks == rank and item.key not in cache:
            cache.put(item.key, _encode(model, item.image))
    if not keys:
        raise ValueError("samples must hold at least one sample, got none.")
    if cache is not None:
        if num_ranks > 1:
            if dist.is_available() and dist.is_initialized():
                dist.barrier()
            cache.refresh()
        if not all(key in cache for key in keys):  # other ranks' shares that nobody encoded, and damaged entries
            for item in _read(model, samples, cache, 0, progress):
                if item.image is not None and item.key not in cache:
                    cache.put(item.key, _encode(model, item.image))
        if damaged := cache.damaged & set(keys):
            warnings.warn(
                f"{len(damaged)} of {len(keys)} pictures had damaged entries in {cache.folder} and were encoded anew.",
                TokenCacheWarning,
                stacklevel=2,
            )
    tokens = concatenate(parts) if cache is None else cache.tokens(keys)
    return TokenLoader(
        tokens,
        queries,
        targets,
        batch_size=batch_size,
        num_queries=num_queries,
        seed=seed,
        query_variants=query_variants,
        rank=rank,
        num_ranks=num_ranks,
    )


def _read(
    model: RelevanceModel, samples: Iterable[RelevanceSample], cache: TokenCache | None, workers: int, progress: bool
) -> Iterator[_Read]:
    """What is needed of every sample, in order."""
    total = len(samples) if isinstance(samples, Sequence) else None
    reader = _Reader(samples, square_grid(model), cache, skip_known=workers > 0)
    items: Iterable[_Read] = read_items(reader, workers) if workers else map(reader.read, samples)
    for item in tqdm(items, total=total, desc="encoding pictures", unit="picture", disable=not progress):
        # What comes from a worker lies in shared memory and holds a file open as long as it lives.
        yield item._replace(targets=item.targets.clone()) if workers else item


def _encode(model: RelevanceModel, image: Tensor) -> VisualTokens:
    return model.multiscale.encode(model, image[None].to(model.backbone.device), shape=(1, 1))
