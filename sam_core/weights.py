"""Moves weights and puts them back exactly: from a copy, in place, whatever happened in between.

Subtracting the perturbation again would round, and would leave NaN behind if the perturbation held one. A copy does
not; it costs one set of weights in memory. Storage stays where it is, so views and captured graphs stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sam_core import _tensors
from sam_core._gathered import forget_gathered

_CACHE_BYTES = 2**22


@torch.no_grad()
def perturb(
    params: Sequence[Tensor],
    perturbation: Sequence[Tensor],
    *,
    alpha: float | Tensor = 1.0,
    foreach: bool | None = None,
) -> list[Tensor]:
    """Add the perturbation to the parameters in place: w <- w + alpha e.

    Args:
        params: tensors of any shape, device and dtype.
        perturbation: one tensor of the same shape for each parameter, in parameter units.
        alpha: factor of the perturbation; as a tensor [] nothing here looks at its value.
        foreach: fuse the operations; None: where possible.

    Returns:
        Copies of the clean parameters, for :func:`restore`.

    Raises:
        ValueError: if the two lists do not match.

    Example:
        >>> w = torch.zeros(2)
        >>> backup = perturb([w], [torch.ones(2)], alpha=0.5)
        >>> w
        tensor([0.5000, 0.5000])
    """
    if len(params) != len(perturbation):
        raise ValueError(f"perturbation must have {len(params)} tensors, one a parameter, got {len(perturbation)}.")
    for position, (param, move) in enumerate(zip(params, perturbation, strict=True)):
        if param.shape != move.shape:
            raise ValueError(f"perturbation {position} must have shape {list(param.shape)}, got {list(move.shape)}.")
    forget_gathered(params)
    backup: list[Tensor] = []
    # On a CPU run by run, as it fits into the cache, where the second look at a weight costs nothing.
    in_cache = all(param.is_cpu for param in params)
    for run in _tensors.chunks(params, _CACHE_BYTES) if in_cache else [slice(None)]:
        backup += _tensors.clone(params[run], foreach=foreach)
        _tensors.add_(params[run], perturbation[run], alpha=alpha, foreach=foreach)
    return backup


@torch.no_grad()
def restore(params: Sequence[Tensor], backup: Sequence[Tensor], *, foreach: bool | None = None) -> None:
    """Copy the clean parameters back in place, bit for bit.

    Args:
        params: the parameters given to :func:`perturb`.
        backup: what it returned.
        foreach: fuse the operations; None: where possible.

    Example:
        >>> w = torch.tensor([0.1, 0.2])
        >>> backup = perturb([w], [torch.tensor([1e8, float("nan")])])
        >>> restore([w], backup)
        >>> w
        tensor([0.1000, 0.2000])
    """
    forget_gathered(params)
    _tensors.copy_(params, backup, foreach=foreach)


@contextmanager
def perturbed(
    params: Sequence[Tensor], perturbation: Sequence[Tensor], *, foreach: bool | None = None
) -> Iterator[None]:
    """Within the block the parameters are w + e; after it, also after an exception, exactly w.

    Args:
        params: tensors of any shape, device and dtype.
        perturbation: one tensor of the same shape for each parameter, in parameter units.
        foreach: fuse the operations; None: where possible.

    Raises:
        ValueError: if the two lists do not match.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> with perturbed([w], [torch.ones(2)]):
        ...     print(w.tolist())
        [1.0, 1.0]
        >>> w.tolist()
        [0.0, 0.0]
    """
    params = list(params)
    backup = perturb(params, perturbation, foreach=foreach)
    try:
        yield
    finally:
        restore(params, backup, foreach=foreach)
