"""Batches as loaders give them: tensors in nested tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def as_pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of what a loader gave; a mapping holds both and has no targets beside it."""
    if isinstance(batch, Mapping):
        return batch, None
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, (tuple, list, Tensor)) else "")
        raise ValueError(f"inputs must give batches (inputs, targets), or mappings, got a {kind}.")
    inputs, targets = batch
    return tuple(inputs) if isinstance(inputs, list) else inputs, targets  # lists: as DataLoaders collate tuples


def count_samples(inputs: Any, targets: Any) -> int:
    """The length of the first tensor that has one, targets first."""
    sizes: list[int] = []
    for value in (targets, inputs):
        map_tensors(lambda tensor: sizes.append(len(tensor)) if tensor.ndim > 0 else None, value)
    if not sizes:
        raise ValueError(
            "inputs must give batches whose targets or inputs are tensors [n, ...], to count their samples."
        )
    return sizes[0]


def cut(value: Any, whole: int, chunk: slice) -> Any:
    """Some of a batch's ``whole`` samples; tensors of another length belong to no sample and stay."""
    return map_tensors(lambda tensor: tensor[chunk] if tensor.ndim > 0 and len(tensor) == whole else tensor, value)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A function of each tensor in nested tuples, lists and mappings; all else stays."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(function, part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
