"""Items read by worker processes, whose errors arrive in their own words.

A DataLoader wraps what a worker raises in its traceback, and loses its type where that cannot be made anew. Here an
error travels like an item and is raised where the items arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class _Failure:
    error: Exception


@dataclass(frozen=True)
class _Caught(Dataset[Any]):
    """The items, or why there is none."""

    items: Any
    collate: Callable[[list[Any]], Any] | None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.items[index]
        except (ValueError, OSError) as error:
            return _Failure(error)

    def join(self, items: list[Any]) -> Any:
        """A batch, or the first failure in it."""
        assert self.collate is not None
        return next((item for item in items if isinstance(item, _Failure)), None) or self.collate(items)


def read_items(
    items: Any,
    num_workers: int,
    *,
    batches: Sequence[Sequence[Any]] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Items by number, in order, read ahead by worker processes.

    Args:
        items: with ``len`` and ``[index]``; goes to the workers.
        num_workers: 0 reads in this process.
        batches: indices of the items of each batch; None for the items one by one.
        collate: makes a batch of a list of items.

    Raises:
        ValueError, OSError: as ``items[index]`` raised it.
    """
    caught = _Caught(items, collate)
    shape: dict[str, Any] = {"batch_size": None}
    if batches is not None:
        shape = {"batch_sampler": batches, "collate_fn": caught.join}
    # The loader draws its workers' seeds: from a generator of its own, for the global one is not ours.
    generator = torch.Generator().manual_seed(0)
    for item in DataLoader(caught, num_workers=num_workers, generator=generator, **shape):
        if isinstance(item, _Failure):
            raise item.error
        yield item
