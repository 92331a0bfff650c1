"""Training by several processes of one machine, started by torchrun: what they share, and who writes.

Every rank computes the gradient of its part of each batch; the parts are summed, so that all ranks make the same step
and their weights stay equal bit for bit. Without torchrun there is one rank, and everything here is free.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Value = TypeVar("Value")

# A rank that fails closes its connections, which fails the others at once; this is for one that hangs.
_TIMEOUT = timedelta(minutes=30)


class Ranks:
    """The processes of the current group; one if there is no group.

    Attributes:
        rank: number of this process, in [0, num_ranks).
        num_ranks: how many there are.
    """

    def __init__(self) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if grouped else 0
        self.num_ranks = dist.get_world_size() if grouped else 1

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints: one does."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place; the same bits everywhere."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors those of the writer, in place."""
        if self.num_ranks > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def broadcast(self, value: Value) -> Value:
        """The writer's value (numbers, strings, lists, dicts)."""
        if self.num_ranks == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in order, on every rank."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def share(self, length: int) -> range:
        """This rank's contiguous part of ``range(length)``."""
        start, end = (length * number // self.num_ranks for number in (self.rank, self.rank + 1))
        return range(start, end)


@contextmanager
def process_group(device: str | None = None) -> Iterator[Ranks]:
    """The group that torchrun's environment describes; one rank without it.

    Args:
        device: where the ranks compute; "cuda" gives each rank a card of its own (see `device_of_rank`).
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield Ranks()
        return
    cuda = device is not None and torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def device_of_rank(device: str | None) -> str | None:
    """The device, with the number of this rank's card where it is "cuda" and torchrun started it."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank is not None else device
