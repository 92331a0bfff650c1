"""What the ranks of a run have in common: equal weights, equally many batches; checked, at the price of a few numbers.

Without a process group there is one rank, and everything here is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam_core._dtensors import is_dtensor

Batch = TypeVar("Batch")

_CHUNK = 2**20  # entries whose checksum is taken at once: temporary memory of 16 MiB
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@torch.no_grad()
def check_ranks_agree(
    values: nn.Module | torch.optim.Optimizer | Mapping[str, Tensor] | Iterable[Tensor],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Raise if a tensor is not the same on all ranks, bit for bit; costs one all-reduce of 16 bytes a tensor.

    Tensors are compared by checksums of 64 bits, which a change of a single entry always changes. All ranks call this
    with equally many tensors; without a process group there is nothing to compare.

    Args:
        values: a module: its parameters and buffers; an optimizer: its parameters, each with its state; or tensors, by
            name or in order.
        group: the ranks to compare; None: all.

    Raises:
        RuntimeError: on every rank, with the name of the first tensor that differs.
        ValueError: for a DTensor, of which each rank holds another part.

    Example:
        >>> check_ranks_agree(torch.nn.Linear(3, 2))
    """
    named = _named(values)
    for name, tensors in named:
        if any(map(is_dtensor, tensors)):
            raise ValueError(f"values must be whole on each rank, got a DTensor for {name}.")
    if not named or not _grouped():
        return
    device = named[0][1][0].device
    sums = torch.stack([_checksum(tensors).to(device) for _, tensors in named])
    bounds = torch.cat([sums, ~sums])  # the largest ~x is ~ of the smallest x
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    different = (bounds[: len(sums)] != ~bounds[len(sums) :]).nonzero().flatten().tolist()
    if different:
        raise RuntimeError(
            f"ranks must agree bit for bit: {len(different)} of {len(named)} differ, first {named[different[0]][0]}."
        )


class Ranks(NamedTuple):
    """The processes that train one model.

    Attributes:
        group: theirs; None: all.
        device: where they compute, for what they tell each other.
        number: of this rank, in [0, num_ranks).
        num_ranks: how many there are.
    """

    group: dist.ProcessGroup | None
    device: torch.device
    number: int = 0
    num_ranks: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, device: torch.device) -> Ranks:
        """Those of a process group; this process alone without any."""
        if not _grouped():
            return cls(None, device)
        return cls(group, device, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, value: float) -> list[float]:
        """The values of all ranks, in order, on each rank."""
        values = torch.zeros(self.num_ranks, dtype=torch.float64, device=self.device)
        values[self.number] = value
        if self.num_ranks > 1:
            dist.all_reduce(values, group=self.group)
        return list(values.tolist())

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors those of the first rank, in place."""
        for tensor in tensors if self.num_ranks > 1 else ():
            dist.broadcast(tensor, group=self.group, group_src=0)

    def in_step(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches; where a rank has fewer, an error on all ranks instead of a wait without end.

        Raises:
            ValueError: before the first batch; if a loader has no length, when the first of them ends.
        """
        rule = "train_loader must give equally many batches on each rank"
        lengths = [int(length) for length in self.gather(_length(loader))]
        if min(lengths) >= 0:
            if len(set(lengths)) > 1:
                raise ValueError(f"{rule}, got {lengths}: use a DistributedSampler.")
            yield from loader
            return
        batches = iter(loader)
        for number in count():
            batch = next(batches, None)
            going_on = self.gather(batch is not None)
            if batch is not None and all(going_on):
                yield batch
            elif any(going_on):
                ended = [rank for rank, more in enumerate(going_on) if not more]
                raise ValueError(f"{rule}, got only {number} on ranks {ended}.")
            else:
                return


def _length(loader: Iterable[Batch]) -> int:
    try:
        return len(cast(Sized, loader))
    except TypeError:  # also from a DataLoader, which has a length if its dataset has one
        return -1


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _named(values: Any) -> list[tuple[str, list[Tensor]]]:
    """What to compare, by name: tensors that share a checksum."""
    if isinstance(values, nn.Module):
        values = {**dict(values.named_parameters()), **dict(values.named_buffers())}
    if isinstance(values, Mapping):
        return [(name, [tensor]) for name, tensor in values.items()]
    if not isinstance(values, torch.optim.Optimizer):
        return [(f"tensor {number}", [tensor]) for number, tensor in enumerate(values)]
    saved, named = values.state_dict(), []
    for group, packed in zip(values.param_groups, saved["param_groups"], strict=True):
        names = group.get("param_names", [f"parameter {number}" for number in packed["params"]])
        for name, param, number in zip(names, group["params"], packed["params"], strict=True):
            state = sorted(saved["state"].get(number, {}).items())
            named.append((f"{name} or its state", [param, *(x for _, x in state if isinstance(x, Tensor))]))
    return named


def _checksum(tensors: list[Tensor]) -> Tensor:
    """A number of 64 bits, int64 [], that depends on every bit and its place."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        whole = tensor.detach()
        flat = (torch.view_as_real(whole) if whole.is_complex() else whole).contiguous().flatten()
        for part in flat.view(_INTEGERS[flat.element_size()]).split(_CHUNK):
            weights = 2 * torch.arange(len(part), device=part.device) + 1  # odd ones lose no bit modulo 2^64
            total = 31 * total + (part * weights).sum().to(total.device)
    return total
