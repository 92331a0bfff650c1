"""DTensors as this rank holds them: plain local parts to compute with, and whom to ask for the rest of a sum.

Where all entries of an operation lie on the same ranks in the same order it runs on the local parts, without
communication. A sum over a list of any length takes one all-reduce for each mesh dimension that splits it: one under
``fully_shard``, replicated (HSDP) or not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


_PLAIN = {Tensor, Parameter}


class Share(NamedTuple):
    """Plain tensors: what this rank adds to a sum or a maximum over a list, and with whom the list is split."""

    tensors: list[Tensor]
    groups: tuple[ProcessGroup, ...] = ()  # one after the other; none for tensors that are whole on each rank
    device_type: str = ""  # of these groups

    def add(self, value: Tensor) -> Tensor:
        """Sum of a new tensor [] over the ranks; it is written to."""
        return self._reduce(value, "SUM")

    def combine(self, norm: Tensor, order: float) -> Tensor:
        """The norm of the list, 2 or infinity, from that of this rank's part."""
        if not self.groups:
            return norm
        if order == 2:
            return self.add(norm * norm).sqrt()
        # A maximum over ranks may lose NaN.
        return self._reduce(norm.nan_to_num(nan=math.inf, posinf=math.inf), "MAX")

    def _reduce(self, value: Tensor, operation: str) -> Tensor:
        import torch.distributed as dist

        device, op = value.device, getattr(dist.ReduceOp, operation)
        for group in self.groups:
            if value.device.type != self.device_type:  # shards may be kept on the CPU
                value = value.to(self.device_type)
            dist.all_reduce(value, op, group=group)
        return value.to(device)


def all_plain(*lists: Iterable[Tensor]) -> bool:
    """Whether all tensors are torch's own, no subclass's: the quick answer, almost always."""
    return _PLAIN.issuperset(map(type, chain.from_iterable(lists)))


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; does not import what torch builds may lack: without it there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def split(tensors: Sequence[Tensor]) -> list[Share]:
    """The list by mesh; a tensor that several ranks hold counts as empty on all but one of them."""
    plain = [tensor for tensor in tensors if not is_dtensor(tensor)]
    shares = [Share(plain)] if plain else []
    meshes: dict[Any, list[DTensor]] = {}
    for tensor in tensors:
        if is_dtensor(tensor):
            meshes.setdefault(tensor.device_mesh, []).append(_without_partial(tensor))
    for mesh, members in meshes.items():
        dims = [d for d in range(mesh.ndim) if not all(member.placements[d].is_replicate() for member in members)]
        mine = [
            all(mesh.get_local_rank(d) == 0 for d in dims if member.placements[d].is_replicate()) for member in members
        ]
        parts = [m.to_local() if own else m.to_local().new_empty(0) for m, own in zip(members, mine, strict=True)]
        shares.append(Share(parts, tuple(mesh.get_group(d) for d in dims), mesh.device_type))
    return shares


def align(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor, split like the model."""
    if not (is_dtensor(tensor) and is_dtensor(model)) or _split_alike(tensor, model):
        return tensor
    model = _without_partial(model)
    return tensor.redistribute(model.device_mesh, model.placements)


def apply(
    operation: Callable[..., list[Tensor]], single: Callable[..., Tensor], lists: tuple[Sequence[Tensor], ...]
) -> list[Tensor]:
    """Run an entrywise operation on lists of local parts, all split as those of the first list.

    Args:
        operation: takes plain lists and returns one, new tensors or, if it works in place, those of the first list.
        single: the same on DTensors; for summands (``Partial``), as far as torch knows how.
        lists: plain tensors and DTensors; a DTensor stands beside DTensors alone.
    """
    rows = [(first, *(align(other, first) for other in others)) for first, *others in zip(*lists, strict=True)]
    local = [i for i, row in enumerate(rows) if not any(map(is_dtensor, row)) or _matching(*row)]
    results: list[Any] = list(lists[0])
    if local:
        parts = [[_local(rows[i][column]) for i in local] for column in range(len(lists))]
        for i, part, result in zip(local, parts[0], operation(*parts), strict=True):
            if result is not part:
                results[i] = _like(result, rows[i][0])
    for i in sorted(set(range(len(rows))) - set(local)):
        results[i] = single(*rows[i])
    return results


def _split_alike(tensor: DTensor, other: DTensor) -> bool:
    return tensor.device_mesh == other.device_mesh and tensor.placements == other.placements


def _matching(first: Tensor, *others: Tensor) -> bool:
    """Whether all are DTensors of which each rank holds the same entries, and not summands of them."""
    return (
        is_dtensor(first)
        and not any(placement.is_partial() for placement in first.placements)
        and all(is_dtensor(other) and _split_alike(first, other) and first.shape == other.shape for other in others)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _like(local: Tensor, model: Tensor) -> Tensor:
    """The local part as a tensor that is split like the model."""
    if not is_dtensor(model):
        return local
    return type(model).from_local(
        local, model.device_mesh, model.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def _without_partial(tensor: DTensor) -> DTensor:
    """Summands added up."""
    if not any(placement.is_partial() for placement in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
