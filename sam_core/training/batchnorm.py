"""Running statistics of batch normalisation follow the clean weights: frozen in the pass at w + perturbation.

Freezing is exact. Each layer gets back its own momentum, also None (cumulative average), and a frozen pass is not
counted in ``num_batches_tracked``. Layers are found by what they have (a running mean and a momentum), not by class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

_SAVED = "_sam_core_running_stats"  # on a frozen layer: what it needs back; its presence says that it is frozen


def disable_running_stats(model: nn.Module) -> None:
    """Freeze the running statistics of all normalisation layers in training mode; again is the same as once.

    Args:
        model: any module; layers that have not yet seen their first batch (lazy ones) are left alone.

    Example:
        >>> model = torch.nn.BatchNorm1d(3)
        >>> disable_running_stats(model)
        >>> output = model(torch.randn(8, 3))
        >>> enable_running_stats(model)
        >>> model.num_batches_tracked.item()
        0
    """
    _freeze(model)


def enable_running_stats(model: nn.Module) -> None:
    """Undo :func:`disable_running_stats`: each layer updates its statistics as before; again is the same as once.

    Args:
        model: any module.

    Example:
        >>> model = torch.nn.BatchNorm1d(3, momentum=0.3)
        >>> disable_running_stats(model)
        >>> enable_running_stats(model)
        >>> model.momentum
        0.3
    """
    _release(list(model.modules()))


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Within the block no running statistic changes; layers that were frozen before stay frozen after it.

    Args:
        model: any module.

    Example:
        >>> model = torch.nn.BatchNorm1d(3)
        >>> with frozen_running_stats(model):
        ...     output = model(torch.randn(8, 3))
        >>> model.running_mean.tolist(), model.num_batches_tracked.item()
        ([0.0, 0.0, 0.0], 0)
    """
    frozen = _freeze(model)
    try:
        yield
    finally:
        _release(frozen)


@contextmanager
def kept_running_stats(model: nn.Module) -> Iterator[None]:
    """After the block the running statistics are what they were before it; layers run in it as usual.

    For code that runs layers again as they ran, such as the backward of a checkpointed model: unlike
    :func:`frozen_running_stats` this changes nothing about how a layer computes.

    Args:
        model: any module.

    Example:
        >>> model = torch.nn.BatchNorm1d(3)
        >>> with kept_running_stats(model):
        ...     output = model(torch.randn(8, 3))
        >>> model.running_mean.tolist(), model.num_batches_tracked.item()
        ([0.0, 0.0, 0.0], 0)
    """
    layers = [layer for layer in model.modules() if _has_running_stats(layer)]
    saved = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


def _freeze(model: nn.Module) -> list[nn.Module]:
    """Freeze the layers that are not frozen yet, and return them."""
    layers = [layer for layer in model.modules() if _has_running_stats(layer) and not hasattr(layer, _SAVED)]
    for layer in layers:
        saved: dict[str, Any] = {"momentum": layer.momentum}
        layer.momentum = 0.0  # type: ignore[assignment]
        if isinstance(layer, _BatchNorm):
            # In training mode torch then neither reads, writes nor counts; momentum 0 alone would still count batches
            # and would let 0 * NaN in.
            saved["track_running_stats"] = layer.track_running_stats
            layer.track_running_stats = False
        else:
            saved["buffers"] = {name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)}
        setattr(layer, _SAVED, saved)
    return layers


def _release(layers: list[nn.Module]) -> None:
    for layer in layers:
        saved = layer.__dict__.pop(_SAVED, {})
        for name, buffer in saved.pop("buffers", {}).items():
            getattr(layer, name).copy_(buffer)
        for name, value in saved.items():
            setattr(layer, name, value)


def _has_running_stats(layer: nn.Module) -> bool:
    mean = getattr(layer, "running_mean", None)
    return isinstance(mean, Tensor) and not is_lazy(mean) and hasattr(layer, "momentum")
