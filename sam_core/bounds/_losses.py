"""Losses of single samples under weights other than the model's, which is left exactly as found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

LossFn = Callable[[Any, Any], Tensor]  # (model output, targets) -> losses [B]
Data = tuple[Any, Any] | Iterable[tuple[Any, Any]]
Weights = dict[str, Tensor]


def named_weights(model: nn.Module, params: Iterable[Tensor] | None) -> Weights:
    """The chosen parameters by name, detached, in their order; those that require a gradient if None.

    Raises:
        ValueError: if there is none, or one that is not the model's.
    """
    named = {id(param): name for name, param in model.named_parameters()}
    chosen = [param for param in model.parameters() if param.requires_grad] if params is None else list(params)
    if strangers := sum(id(param) not in named for param in chosen):
        raise ValueError(f"params must be the model's, got {strangers} that are not.")
    if not chosen:
        raise ValueError("params must be one at least, by default those that require a gradient, got none.")
    return {named[id(param)]: param.detach() for param in chosen}


@contextmanager
def sample_losses(
    model: nn.Module, loss_fn: LossFn, data: Data, device: torch.device
) -> Iterator[Callable[[Callable[[], Weights]], Iterator[Tensor]]]:
    """Gives a function: one pass over the data, with weights that it asks for once a batch, to the losses [B] of each,
    in float64 on the CPU.

    Within the block the model is in eval mode and no gradients are recorded. Afterwards the mode of each submodule,
    weights, gradients, buffers and the global random state are as they were.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to the losses [B] of B samples.
        data: a tuple (inputs, targets), or an iterable of such batches that can be read again and again, such as a
            DataLoader or a list. Inputs are a tensor, or a tuple for ``model(*inputs)``.
        device: where batches are moved to.

    Raises:
        ValueError: by the function, if the data are of another form, or the losses not one a sample.
    """
    batches = [data] if isinstance(data, tuple) else data

    def one_pass(weights: Callable[[], Weights]) -> Iterator[Tensor]:
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:  # [inputs, targets], say, which is no tuple
                kind = type(batch).__name__
                raise ValueError(f"data must be a tuple (inputs, targets), or give such batches, got a {kind} as one.")
            inputs, targets = (_move(part, device) for part in batch)
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            losses = loss_fn(functional_call(model, {**weights(), **buffers}, arguments), targets)
            if losses.ndim != 1:
                raise ValueError(f"loss_fn must return one loss a sample, [B], got shape {list(losses.shape)}.")
            yield losses.cpu().double()  # some devices have no float64

    training = {module: module.training for module in model.modules()}
    model.eval()
    devices = [] if device.type == "cpu" else [device.index or 0]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type):
            yield one_pass
    finally:
        for module, mode in training.items():
            module.training = mode


def like_weights(name: str, tensors: Sequence[Tensor] | None, weights: Weights) -> Weights:
    """Tensors in the order of the weights, by name; zeros if None.

    Raises:
        ValueError: if they do not match.
    """
    if tensors is None:
        return {key: torch.zeros_like(weight) for key, weight in weights.items()}
    tensors = list(tensors)
    expected = [list(weight.shape) for weight in weights.values()]
    shapes = [list(tensor.shape) for tensor in tensors]
    if shapes != expected:
        raise ValueError(f"{name} must hold tensors of shapes {expected}, got {shapes}.")
    return {key: tensor.detach().to(weights[key]) for key, tensor in zip(weights, tensors, strict=True)}


def _move(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_move(item, device) for item in value)
    return value
