"""Arithmetic on lists of tensors: fused (foreach) where possible, grouped by device and dtype.

``foreach``: None fuses plain tensors and loops over subclasses, True always fuses, False always loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

_HALF_TYPES = (torch.float16, torch.bfloat16)
_PLAIN = {Tensor, torch.nn.Parameter}


@torch.no_grad()
def norm(tensors: Sequence[Tensor], *, foreach: bool | None = None) -> Tensor:
    """Global Euclidean norm sqrt(sum |x|^2) over all entries of all tensors.

    Computed in float32 for half types; where squares would leave the range of the dtype, repeated on x / max |x|. So it
    is 0 only if all entries are, and finite if they are, unless the norm itself is too large for the dtype.

    Args:
        tensors: real or complex, any devices and dtypes.
        foreach: see the top of this file.

    Returns:
        float32 or float64 tensor [] on the first tensor's device; NaN or infinity if an entry is; 0 for no tensors.
    """
    if not tensors:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(_norms(tensors, 2.0, foreach))
    if math.isfinite(total) and total > torch.finfo(torch.float32).tiny ** 0.5:
        return total
    tensors = [tensor for tensor in tensors if tensor.numel() > 0]
    if not tensors:
        return total
    largest: Tensor = _norms(tensors, math.inf, foreach).max()
    if not math.isfinite(largest) or largest == 0:
        return largest
    shares = [_wide(tensor) / largest.to(tensor.device) for tensor in tensors]
    return torch.mul(largest, torch.linalg.vector_norm(_norms(shares, 2.0, foreach)))


def scale(tensors: Sequence[Tensor], factor: float, *, foreach: bool | None = None) -> list[Tensor]:
    """New tensors ``factor * x``."""
    return _apply(
        lambda xs: list(torch._foreach_mul(xs, factor)), lambda x: torch.mul(x, factor), (tensors,), foreach=foreach
    )


def multiply(left: Sequence[Tensor], right: Sequence[Tensor], *, foreach: bool | None = None) -> list[Tensor]:
    """New tensors ``x * y``, entry by entry, in the wider of the two dtypes."""
    return _apply(lambda xs, ys: list(torch._foreach_mul(xs, ys)), torch.mul, (left, right), foreach=foreach)


def shift_(tensors: Sequence[Tensor], amount: float, *, foreach: bool | None = None) -> None:
    """``x += amount`` in place."""
    _apply(lambda xs: torch._foreach_add_(xs, amount), lambda x: Tensor.add_(x, amount), (tensors,), foreach=foreach)


def scale_(tensors: Sequence[Tensor], factor: float, *, foreach: bool | None = None) -> None:
    """``x *= factor`` in place."""

    def fused(xs: list[Tensor]) -> list[Tensor] | None:
        if xs[0].is_cpu and xs[0].dtype in _HALF_TYPES:  # the fused form would round the factor to their type
            return [x.mul_(factor) for x in xs]
        return torch._foreach_mul_(xs, factor)

    _apply(fused, lambda x: x.mul_(factor), (tensors,), foreach=foreach)


def add_(
    tensors: Sequence[Tensor], others: Sequence[Tensor], *, alpha: float = 1.0, foreach: bool | None = None
) -> None:
    """``x += alpha * y`` in place."""
    if abs(alpha) > torch.finfo(torch.float16).max:  # torch refuses a factor that the tensors' own dtype cannot hold
        others = [_wide(other) for other in others]
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
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_(copies, tensors, foreach=foreach)
    return copies


def absolute(tensors: Sequence[Tensor], *, foreach: bool | None = None) -> list[Tensor]:
    """New real tensors ``|x|``, half types as float32: products with small gradients must not vanish."""
    return _apply(lambda xs: list(torch._foreach_abs(xs)), torch.abs, (wide(tensors),), foreach=foreach)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, half types as float32."""
    return [_wide(tensor.detach()) for tensor in tensors]


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of Re(conj(x) y) over all entries of all tensors; products in float32 for half types."""
    # No fused form exists; torch.vdot makes no temporary, but knows plain vectors alone.
    parts = [
        (torch.vdot(x.reshape(-1), y.reshape(-1)) if _plain(x) and _plain(y) else (x.conj() * y).sum()).real
        for x, y in zip(wide(left), wide(right), strict=True)
    ]
    return float(torch.stack([part.to(parts[0].device, torch.float64) for part in parts]).sum()) if parts else 0.0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF_TYPES else tensor


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN


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
    if foreach is None:
        foreach = set(map(type, chain.from_iterable(lists))) <= _PLAIN
    if not foreach:
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
