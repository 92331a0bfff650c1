"""Which samples make a batch, and which of their queries are shown: from (seed, epoch) alone.

All ranks walk through the same batches. Of a batch of b samples rank r of W sees numbers b r / W up to b (r + 1) / W;
together the ranks see the batch that one process would.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_core._checks import check_count


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The settings that batches depend on.

    Args:
        num_samples: samples there are, >= 1.
        batch_size: samples a batch, of all ranks together; the last one may have fewer.
        num_queries: queries a sample.
        seed: of order and choice.
        rank, num_ranks: which part of every batch is wanted, 0 <= rank < num_ranks.

    Raises:
        ValueError: if an argument is outside its range.
    """

    num_samples: int
    batch_size: int
    num_queries: int
    seed: int
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        check_count("num_samples", self.num_samples, at_least=1)
        check_count("batch_size", self.batch_size, at_least=1)
        check_count("num_queries", self.num_queries, at_least=1)
        check_count("num_ranks", self.num_ranks, at_least=1)
        check_count("rank", self.rank, at_least=0)
        if self.rank >= self.num_ranks:
            raise ValueError(f"rank must be < num_ranks = {self.num_ranks}, got {self.rank!r}.")

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return -(-self.num_samples // self.batch_size)

    def generator(self, epoch: int, sample: int | None = None) -> torch.Generator:
        """Source of the randomness of an epoch, or of one sample in it."""
        if sample is None:
            return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        digest = hashlib.sha256(f"{self.seed}/{epoch}/{sample}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def batches(self, generator: torch.Generator) -> list[Tensor]:
        """Numbers of the samples of each whole batch, [b]; the first thing that is drawn in an epoch."""
        order = torch.randperm(self.num_samples, generator=generator)
        return list(order.split(self.batch_size))

    def own(self, length: int) -> slice:
        """This rank's part of a batch of that many samples; it may be empty."""
        return slice(length * self.rank // self.num_ranks, length * (self.rank + 1) // self.num_ranks)

    def choose(self, available: int, generator: torch.Generator) -> list[int]:
        """Which of a sample's queries are shown: drawn without replacement, repeated if there are too few."""
        assert available > 0
        chosen: list[int] = []
        while len(chosen) < self.num_queries:
            chosen += torch.randperm(available, generator=generator).tolist()
        return chosen[: self.num_queries]
