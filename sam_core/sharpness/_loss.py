"""The loss as a function of the parameters alone, of a model that is measured and left exactly as found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = dict[str, Tensor]


@contextmanager
def parameter_loss(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> Iterator[tuple[Callable[[Params], Tensor], Params]]:
    """Gives (loss, params): the loss as a function of the parameters that require a gradient, and their values.

    Within the block the model is in eval mode. Every call of the loss sees the same buffers and random numbers, so that
    it is one fixed function. Afterwards the mode of each submodule, weights, gradients, buffers and random state are as
    they were.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, or a tuple for ``model(*inputs)``.
        targets: what loss_fn takes.

    Raises:
        ValueError: if no parameter requires a gradient, or the loss is not a scalar.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("model must have a parameter that requires a gradient, got none.")
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)

    def loss(params: Params) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # The fused attention kernels have no second derivative.
        with _fixed_random_state(params), sdpa_kernel(SDPBackend.MATH):
            value = loss_fn(functional_call(model, {**params, **buffers}, arguments), targets)
        if value.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {list(value.shape)}.")
        return value

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield loss, params
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _fixed_random_state(params: Params) -> Iterator[None]:
    """The global random state of the CPU and of the parameters' devices is the same before and after the block."""
    devices = {param.device for param in params.values() if param.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices), device_type=kind):
        yield
