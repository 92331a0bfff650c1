"""Arithmetic on lists of tensors: fused (foreach) where possible, grouped by device and dtype.

``foreach``: None fuses plain tensors and loops over subclasses, True always fuses, False always loops. A DTensor counts
as what this rank holds of it; norm and dot are of the whole, so that all ranks must call them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sam_core import _dtensors
from sam_core._dtensors import all_plain

_HALF_TYPES = (torch.float16, torch.bfloat16)
_CHUNK_BYTES = 2**26  # of a copy that lives for a moment


@torch.no_grad()
def norm(tensors: Sequence[Tensor], *, foreach: bool | None = None, wait: bool = True) -> Tensor:
    """Global Euclidean norm sqrt(sum |x|^2) over all entries of all tensors.

    Computed in float32 for half types; where squares would leave the range of the dtype, repeated on x / max |x|. So it
    is 0 only if all entries are, and finite if they are, unless the norm itself is too large for the dtype.

    Args:
        tensors: real or complex, any devices and dtypes.
        foreach: see the top of this file.
        wait: look at the result, which makes the host wait for the device, and repeat where need be. If False, squares
            beyond the range of the dtype count as 0 or infinity.

    Returns:
        float32 or float64 tensor [] on the first tensor's device; NaN or infinity if an entry is; 0 for no tensors.
    """
    if not tensors:
        return torch.zeros(())
    shares, device = _shares(tensors), tensors[0].device
    total = _total(shares, 2.0, device, foreach)
    if not wait or torch.finfo(torch.float32).tiny ** 0.5 < float(total) < math.inf:
        return total
    shares = [s._replace(tensors=[x if x.numel() > 0 else x.new_zeros(1) for x in s.tensors]) for s in shares]
    largest = _total(shares, math.inf, device, foreach)
    if not math.isfinite(largest) or largest == 0:
        return largest
    shares = [s._replace(tensors=[_wide(x) / largest.to(x.device) for x in s.tensors]) for s in shares]
    return torch.mul(largest, _total(shares, 2.0, device, foreach))


def scale(tensors: Sequence[Tensor], factor: float | Tensor, *, foreach: bool | None = None) -> list[Tensor]:
    """New tensors ``factor * x``; a factor that is a tensor [] is rounded to half types."""
    return _apply(
        lambda xs: list(torch._foreach_mul(xs, _like(factor, xs[0]))),
        lambda x: torch.mul(x, _like(factor, x)),
        (tensors,),
        foreach=foreach,
    )


def multiply(left: Sequence[Tensor], right: Sequence[Tensor], *, foreach: bool | None = None) -> list[Tensor]:
    """New tensors ``x * y``, entry by entry, in the wider of the two dtypes."""
    return _apply(lambda xs, ys: list(torch._foreach_mul(xs, ys)), torch.mul, (left, right), foreach=foreach)


def shift_(tensors: Sequence[Tensor], amount: float, *, foreach: bool | None = None) -> None:
    """``x += amount`` in place."""
    _apply(lambda xs: torch._foreach_add_(xs, amount), lambda x: Tensor.add_(x, amount), (tensors,), foreach=foreach)


def scale_(tensors: Sequence[Tensor], factor: float | Tensor, *, foreach: bool | None = None) -> None:
    """``x *= factor`` in place; a factor that is a tensor [] is rounded to half types."""

    def fused(xs: list[Tensor]) -> list[Tensor] | None:
        if xs[0].is_cpu and xs[0].dtype in _HALF_TYPES and not isinstance(factor, Tensor):
            return [x.mul_(factor) for x in xs]  # the fused form would round the factor to their type
        return torch._foreach_mul_(xs, _like(factor, xs[0]))

    _apply(fused, lambda x: x.mul_(_like(factor, x)), (tensors,), foreach=foreach)


def add_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], *, alpha: float | Tensor = 1.0, foreach: bool | None = None
) -> None:
    """``x += alpha * y`` in place; a tensor [] alpha is not looked at, and costs a copy of ``_CHUNK_BYTES`` of y."""
    if isinstance(alpha, Tensor):  # torch takes numbers alone here
        for chunk in chunks(tensors, _CHUNK_BYTES):
            add_(tensors[chunk], scale(wide(others[chunk]), alpha, foreach=foreach), foreach=foreach)
        return
    if abs(alpha) > torch.finfo(torch.float16).max:  # torch refuses a factor that the tensors' own dtype cannot hold
        others = wide(others)
    _apply(
        lambda xs, ys: torch._foreach_add_(xs, ys, alpha=alpha),
        lambda x, y: x.add_(y, alpha=alpha),
        (tensors, others),
        foreach=foreach,
    )


def lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float, *, foreach: bool | None = None) -> None:
    """``x += weight * (y - x)`` in place, for any real weight."""
    _apply(
        lambda xs, ys: torch._foreach_lerp_(xs, ys, weight),
        lambda x, y: x.lerp_(y, weight),
        (tensors, ends),
        foreach=foreach,
    )


def copy_(tensors: Sequence[Tensor], sources: Sequence[Tensor], *, foreach: bool | None = None) -> None:
    """``x[:] = y`` in place."""
    _apply(torch._foreach_copy_, Tensor.copy_, (tensors, sources), foreach=foreach)


def clone(tensors: Sequence[Tensor], *, foreach: bool | None = None) -> list[Tensor]:
    """New tensors with the same entries."""

    def fused(xs: list[Tensor]) -> list[Tensor]:
        copies = [torch.empty_like(x) for x in xs]
        torch._foreach_copy_(copies, xs)
        return copies

    return _apply(fused, torch.clone, (tensors,), foreach=foreach)


def absolute(tensors: Sequence[Tensor], *, foreach: bool | None = None) -> list[Tensor]:
    """New real tensors ``|x|``, half types as float32: products with small gradients must not vanish."""
    return _apply(lambda xs: list(torch._foreach_abs(xs)), torch.abs, (wide(tensors),), foreach=foreach)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, half types as float32."""
    return [_wide(tensor.detach()) for tensor in tensors]


@torch.no_grad()
def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of Re(conj(x) y) over all entries of all tensors; products in float32 for half types."""
    if not left:
        return 0.0
    if all_plain(left, right):
        return float(_dot(left, right))
    right = [_dtensors.align(y, x) for x, y in zip(left, right, strict=True)]
    shares = zip(_dtensors.split(left), _dtensors.split(right), strict=True)
    return sum(float(xs.add(_dot(xs.tensors, ys.tensors))) for xs, ys in shares)


def chunks(tensors: Sequence[Tensor], num_bytes: int) -> Iterator[slice]:
    """Parts of the list, of at least so many bytes each but the last."""
    start, size = 0, 0
    for position, tensor in enumerate(tensors, start=1):
        size += tensor.numel() * tensor.element_size()
        if size >= num_bytes or position == len(tensors):
            yield slice(start, position)
            start, size = position, 0


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    # No fused form exists; torch.vdot makes no temporary, but knows plain vectors alone.
    plain = all_plain(left, right)
    parts = [
        (torch.vdot(x.reshape(-1), y.reshape(-1)) if plain else (x.conj() * y).sum()).real
        for x, y in zip(wide(left), wide(right), strict=True)
    ]
    return torch.stack([part.to(parts[0].device, torch.float64) for part in parts]).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF_TYPES else tensor


def _like(factor: float | Tensor, tensor: Tensor) -> Any:
    """A factor that the fused forms take at once."""
    return factor.to(tensor.device, tensor.dtype) if isinstance(factor, Tensor) else factor


def _shares(tensors: Sequence[Tensor]) -> list[_dtensors.Share]:
    return [_dtensors.Share(list(tensors))] if all_plain(tensors) else _dtensors.split(tensors)


def _total(shares: list[_dtensors.Share], order: float, device: torch.device, foreach: bool | None) -> Tensor:
    """The norm over all shares, 2 or infinity."""
    totals = [s.combine(torch.linalg.vector_norm(_norms(s.tensors, order, foreach), order), order) for s in shares]
    if len(totals) == 1:
        return totals[0].to(device)
    total: Tensor = torch.linalg.vector_norm(torch.stack([total.to(device) for total in totals]), order)
    return total


def _norms(tensors: Sequence[Tensor], order: float, foreach: bool | None) -> Tensor:
    """The norm of each tensor, [n], on the first tensor's device."""

    def dtype(tensor: Tensor) -> torch.dtype | None:
        return torch.float32 if tensor.dtype in _HALF_TYPES else None

    norms = _apply(
        lambda xs: list(torch._foreach_norm(xs, order, dtype(xs[0]))),
        lambda x: torch.linalg.vector_norm(x, order, dtype=dtype(x)),
        (tensors,),
        foreach=foreach,
    )
    if len({value.device for value in norms}) > 1:
        norms = [value.to(norms[0].device) for value in norms]
    return torch.stack(norms)


def _apply(
    fused: Callable[..., Any],
    single: Callable[..., Tensor],
    lists: tuple[Sequence[Tensor], ...],
    *,
    foreach: bool | None,
) -> list[Tensor]:
    """Run the fused operation once a (device, dtype) group, or the single one once a tensor; results in input order."""
    plain = all_plain(*lists)
    if not plain and any(map(_dtensors.is_dtensor, chain.from_iterable(lists))):
        return _dtensors.apply(lambda *local: _apply(fused, single, local, foreach=foreach), single, lists)
    if not (plain if foreach is None else foreach):
        return [single(*tensors) for tensors in zip(*lists, strict=True)]
    if len({(tensor.device, tensor.dtype) for tensor in chain.from_iterable(lists)}) == 1:  # as good as always
        return list(fused(*map(list, lists)) or lists[0])
    results = list(lists[0])
    for positions in _alike(lists):
        group = fused(*([tensors[i] for i in positions] for tensors in lists))
        for position, result in zip(positions, group or (), strict=group is not None):
            results[position] = result
    return results


def _alike(lists: tuple[Sequence[Tensor], ...]) -> Iterator[list[int]]:
    """Positions that one fused call can take together: same device and dtype within every list."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for position, tensors in enumerate(zip(*lists, strict=True)):
        groups.setdefault(tuple((t.device, t.dtype) for t in tensors), []).append(position)
    yield from groups.values()
