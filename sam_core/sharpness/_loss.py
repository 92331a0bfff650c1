"""The loss as a function of the parameters alone, of a model that is measured and left exactly as found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = dict[str, Tensor]
BatchLoss = Callable[[Params], Tensor]


class ParameterLoss:
    """L(w) = sum_i n_i L_i(w) / sum_i n_i over batches i of n_i samples, L_i the mean over the samples of batch i.

    Every call sees the same buffers and random numbers, so that L is one fixed function, as long as the batches are.

    Attributes:
        params: the parameters that require a gradient, by name; their values, detached.
        num_entries: the number n of their entries.
        has_one_batch: the data are one batch, whose graph may be kept from one product to the next.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> None:
        self.params: Params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("model must have a parameter that requires a gradient, got none.")
        self.num_entries = sum(param.numel() for param in self.params.values())
        self._model, self._loss_fn = model, loss_fn
        self.has_one_batch = targets is not None or isinstance(inputs, (Tensor, tuple))
        self._batches: Iterable[tuple[Any, Any]] = [(inputs, targets)] if self.has_one_batch else inputs

    def parts(self, num_samples: int | None = None) -> Iterator[tuple[int, ParameterLoss]]:
        """For each batch, or each micro-batch of at most ``num_samples``, the number of samples and its loss."""
        for inputs, targets in self._pairs():
            whole = _size(inputs, targets) if num_samples is not None or not self.has_one_batch else 1
            step = num_samples if num_samples is not None else whole
            for start in range(0, whole, step):
                chunk = slice(None) if step >= whole else slice(start, start + step)
                part = copy.copy(self)
                part.has_one_batch, part._batches = True, [(_chunk(inputs, chunk), _chunk(targets, chunk))]
                yield min(step, whole - start), part

    @property
    def like(self) -> Tensor:
        """A tensor on the device and of the dtype of vectors over all parameters."""
        return next(iter(self.params.values()))

    def batches(self) -> Iterator[tuple[int, BatchLoss]]:
        """The number of samples n_i (1 for the only batch) and the loss L_i of each batch."""
        for inputs, targets in self._pairs():
            yield 1 if self.has_one_batch else _size(inputs, targets), self._loss_of(inputs, targets)

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        empty = True
        for inputs, targets in self._batches:
            empty, inputs = False, tuple(inputs) if isinstance(inputs, list) else inputs  # as DataLoaders collate
            yield _on_device(inputs, self.like.device), _on_device(targets, self.like.device)
        if empty:
            raise ValueError("inputs must give at least one batch (inputs, targets) each time, got none.")

    def value(self, params: Params) -> float:
        """L at these parameters."""
        with torch.no_grad():
            sums = [(size, size * loss(params).double()) for size, loss in self.batches()]
        return float(sum(value for _, value in sums) / sum(size for size, _ in sums))

    def value_and_grad(self, params: Params) -> tuple[float, Params]:
        """L at these parameters, and its gradient there."""
        total, value, sums = 0, 0.0, {name: torch.zeros_like(param) for name, param in params.items()}
        for size, loss in self.batches():
            grads, batch_value = grad_and_value(loss)(params)
            total, value = total + size, value + size * float(batch_value)
            for name, sum_ in sums.items():
                sum_.add_(grads[name], alpha=size)
        return value / total, {name: sum_ / total for name, sum_ in sums.items()}

    def flatten(self, params: Params) -> Tensor:
        """One vector [n], in the order of ``model.parameters()``."""
        return torch.cat([params[name].reshape(-1).to(self.like) for name in self.params])

    def unflatten(self, vector: Tensor) -> Params:
        """Cut a vector [n] into pieces shaped, typed and placed like the parameters."""
        pieces = torch.split(vector.detach(), [param.numel() for param in self.params.values()])
        return {
            name: piece.reshape(param.shape).to(param)
            for (name, param), piece in zip(self.params.items(), pieces, strict=True)
        }

    def _loss_of(self, inputs: Any, targets: Any) -> BatchLoss:
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)

        def loss(params: Params) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
            # The fused attention kernels have no second derivative.
            with fixed_random_state(self.like), sdpa_kernel(SDPBackend.MATH):
                value = self._loss_fn(functional_call(self._model, {**params, **buffers}, arguments), targets)
            if value.ndim != 0:
                raise ValueError(f"loss_fn must return a scalar, got shape {list(value.shape)}.")
            return value

        return loss


@contextmanager
def parameter_loss(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> Iterator[ParameterLoss]:
    """Gives the loss as a function of the parameters that require a gradient.

    Within the block the model is in eval mode. Afterwards the mode of each submodule, weights, gradients, buffers and
    random state are as they were.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, or a tuple for ``model(*inputs)``; or, with targets None, a loader that gives such
            (inputs, targets) anew, and the same ones, each time it is asked.
        targets: what loss_fn takes; None for a loader.

    Raises:
        ValueError: if no parameter requires a gradient; later, if the loss is not a scalar or there is no batch.
    """
    loss = ParameterLoss(model, loss_fn, inputs, targets)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with fixed_random_state(loss.like):  # a loader that shuffles draws from the global state
            yield loss
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def fixed_random_state(like: Tensor) -> Iterator[None]:
    """The global random state of the CPU and of the tensor's device is the same before and after the block."""
    devices = [like.device] if like.device.type != "cpu" else []
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
        yield


def _size(inputs: Any, targets: Any) -> int:
    for value in (targets, *(inputs if isinstance(inputs, tuple) else (inputs,))):
        if isinstance(value, Tensor) and value.ndim > 0:
            return len(value)
    raise ValueError("inputs must give batches whose targets or inputs are tensors [n, ...], to count their samples.")


def _chunk(value: Any, chunk: slice) -> Any:
    if isinstance(value, tuple):
        return tuple(_chunk(part, chunk) for part in value)
    return value[chunk] if isinstance(value, Tensor) and value.ndim > 0 else value


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_on_device(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value
