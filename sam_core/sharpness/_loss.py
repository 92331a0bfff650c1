"""The loss as a function of the parameters alone, of a model that is measured and left exactly as found."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sam_core.sharpness._batches import as_pair, count_samples, cut, map_tensors
from sam_core.sharpness._random import RandomState, kept_random_numbers, random_states_of

Params = dict[str, Tensor]
BatchLoss = Callable[[Params], Tensor]

_HALF = (torch.float16, torch.bfloat16)


class ParameterLoss:
    """L(w) = sum_i n_i L_i(w) / sum_i n_i over batches i of n_i samples, L_i the mean over the samples of batch i.

    Every call sees the same buffers and random numbers, so that L is one fixed function, as long as the batches are. A
    model with trainable parameters of a half type is measured in float32: a perturbation would drown in its rounding.

    Attributes:
        params: the parameters that require a gradient, by name; their values, detached.
        num_entries: the number n of their entries.
        like: a tensor [0] on the device and of the dtype of vectors over all parameters, the widest of theirs.
        has_one_batch: the data are one batch, whose graph may be kept from one product to the next.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> None:
        self._loss_fn = _LossOf(model, loss_fn)
        trainable = {name: p.detach() for name, p in self._loss_fn.named_parameters() if p.requires_grad}
        _check_parameters(trainable)
        self._widen = any(param.dtype in _HALF for param in trainable.values())
        self.params: Params = {name: self._wide(param) for name, param in trainable.items()}
        frozen = {name: p for name, p in self._loss_fn.named_parameters() if not p.requires_grad}
        self._fixed = {name: self._wide(p.detach()) for name, p in frozen.items()} if self._widen else {}
        self._buffers = dict(self._loss_fn.named_buffers())
        self._tied = _tied_names(self._loss_fn)
        self.like = _widest([*self.params.values()])
        self.num_entries = sum(param.numel() for param in self.params.values())
        self.devices = {tensor.device for tensor in (*trainable.values(), *frozen.values())}
        self.has_one_batch = targets is not None or isinstance(inputs, (Tensor, tuple, Mapping))
        self._batches: Iterable[Any] = [(inputs, targets)] if self.has_one_batch else inputs
        #: Where the random numbers of each pass over the batches begin, e.g. for a loader that shuffles.
        self.random_state = RandomState(self.devices, random_states_of(self._batches))

    def parts(self, num_samples: int | None = None) -> Iterator[tuple[int, ParameterLoss]]:
        """For each batch, or each micro-batch of at most ``num_samples``, the number of samples and its loss."""
        for inputs, targets in self._pairs():
            whole = count_samples(inputs, targets) if num_samples is not None or not self.has_one_batch else 1
            step = num_samples if num_samples is not None else whole
            for start in range(0, whole, step):
                part = copy.copy(self)
                part.has_one_batch, part._batches = True, [(inputs, targets)]
                if step < whole:
                    part._batches = [cut((inputs, targets), whole, slice(start, start + step))]
                yield min(step, whole - start), part

    def batches(self) -> Iterator[tuple[int, BatchLoss]]:
        """The number of samples n_i (1 for the only batch) and the loss L_i of each batch."""
        for inputs, targets in self._pairs():
            yield 1 if self.has_one_batch else count_samples(inputs, targets), self._loss_of(inputs, targets)

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        empty = True
        if not self.has_one_batch:
            self.random_state.restore()
        for batch in self._batches:
            empty, (inputs, targets) = False, as_pair(batch)
            yield self._ready(inputs), self._ready(targets)
        if empty:
            raise ValueError("inputs must give at least one batch (inputs, targets) each time, got none.")

    def value(self, params: Params) -> float:
        """L at these parameters."""
        total, value = 0, 0.0
        with torch.no_grad():
            for size, loss in self.batches():
                total, value = total + size, value + size * float(loss(params))
        return value / total

    def value_and_grad(self, params: Params) -> tuple[float, Params]:
        """L at these parameters, and its gradient there."""
        total, value = 0, 0.0
        sums: Params = {}
        for size, loss in self.batches():
            leaves, batch_value = self.graph(loss, params)
            total, value = total + size, value + size * float(batch_value.detach())
            for name, grad in grads_by(batch_value, leaves).items():
                scaled = grad if self.has_one_batch else size * grad
                sums[name] = sums[name].add_(scaled) if name in sums else scaled
        return value / total, sums if total == 1 else {name: sum_ / total for name, sum_ in sums.items()}

    @staticmethod
    def graph(loss: BatchLoss, params: Params) -> tuple[Params, Tensor]:
        """Leaves that share the parameters' memory, and the loss as a function of them."""
        leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
        with torch.enable_grad():
            return leaves, loss(leaves)

    def flatten(self, values: Params) -> Tensor:
        """One vector [n], in the order of ``model.parameters()``, or [k, n] from k values of each."""
        pieces = []
        for name, param in self.params.items():
            value = values[name]
            pieces.append(value.reshape(*value.shape[: value.ndim - param.ndim], param.numel()).to(self.like))
        return torch.cat(pieces, dim=-1)

    def unflatten(self, vectors: Tensor) -> Params:
        """Cut vectors [n] or [k, n] into pieces shaped, after k, typed and placed like the parameters."""
        pieces = torch.split(vectors.detach(), [param.numel() for param in self.params.values()], dim=-1)
        return {
            name: piece.reshape(*piece.shape[:-1], *param.shape).to(param)
            for (name, param), piece in zip(self.params.items(), pieces, strict=True)
        }

    def _loss_of(self, inputs: Any, targets: Any) -> BatchLoss:
        def loss(params: Params) -> Tensor:
            buffers = {name: self._wide(buffer.clone()) for name, buffer in self._buffers.items()}
            values = {**self._fixed, **params, **buffers}
            values |= {alias: values[name] for alias, name in self._tied.items() if name in values}
            arguments = map_tensors(torch.clone, inputs), targets  # the model may write to its inputs
            with kept_random_numbers(self.devices):
                value: Tensor = functional_call(self._loss_fn, values, arguments, tie_weights=False)
            _check_loss(value)
            return value

        return loss

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.float() if self._widen and tensor.dtype in _HALF else tensor

    def _ready(self, value: Any) -> Any:
        """On the model's device, if it has only one, and in its dtype."""
        device = next(iter(self.devices)) if len(self.devices) == 1 else None
        return map_tensors(lambda tensor: self._wide(tensor if device is None else tensor.to(device)), value)


def grads_by(value: Tensor, leaves: Params, *, create_graph: bool = False) -> Params:
    """The gradient of a value by its leaves, zero where it does not depend on them."""
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    with torch.enable_grad():
        grads = torch.autograd.grad(value, [*leaves.values()], create_graph=create_graph, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


class _LossOf(nn.Module):
    """Model and loss in one: a penalty on ``model.parameters()`` in loss_fn sees the parameters it is called at."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model: Callable[..., Any] = model
        self._compute: tuple[Callable[[Any, Any], Tensor]] = (loss_fn,)  # a module in a tuple is no part of this one

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*inputs) if isinstance(inputs, tuple) else self.model(inputs)
        return self._compute[0](outputs, targets)


@contextmanager
def parameter_loss(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> Iterator[ParameterLoss]:
    """Gives the loss as a function of the parameters that require a gradient.

    Within the block the model is in eval mode. Afterwards the mode of each submodule, weights, gradients, buffers and
    random state are as they were: that of torch, Python, NumPy and the loader's own generators.

    Args:
        model: any module; what torch.compile or DistributedDataParallel wraps is measured without them.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)`` or a mapping for ``model(**inputs)``; or, with targets None, a
            loader that gives such (inputs, targets), or mappings alone, anew and the same each time it is asked.
        targets: what loss_fn takes; None for a loader.

    Raises:
        ValueError: if no parameter requires a gradient; later, if the loss is not a scalar or there is no batch.
    """
    model = _unwrapped(model)
    loss = ParameterLoss(model, loss_fn, inputs, targets)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with loss.random_state.kept(), _plain_kernels(model):
            yield loss
    finally:
        for module, mode in training.items():
            module.training = mode


def _tied_names(module: nn.Module) -> dict[str, str]:
    """For each further name of a parameter or buffer, its first one."""
    first: dict[Tensor, str] = {}
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first[tensor] for name, tensor in every if first.setdefault(tensor, name) != name}


def _unwrapped(model: nn.Module) -> nn.Module:
    inner: Any = model
    while isinstance(inner, (DataParallel, DistributedDataParallel)) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner  # type: ignore[no-any-return]


@contextmanager
def _plain_kernels(model: nn.Module) -> Iterator[None]:
    """The same kernels with and without a gradient, so that differences of losses are of the weights alone.

    The fused ones for recurrent layers go too: cuDNN's have no gradient in eval mode, oneDNN's none for many vectors.
    """
    flags: list[tuple[Any, str]] = []
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        flags = [(torch.backends.cudnn, "enabled"), (torch.backends.mkldnn, "enabled")]
    fast, before = torch.backends.mha.get_fastpath_enabled(), [getattr(*flag) for flag in flags]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for flag in flags:
            setattr(*flag, False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for flag, value in zip(flags, before, strict=True):
            setattr(*flag, value)


def check_finite_loss(value: float) -> None:
    """Refuse to measure where the loss is NaN or infinite.

    Raises:
        FloatingPointError: with the value.
    """
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss at the weights must be finite, got {value}.")


def _check_parameters(trainable: Params) -> None:
    if not trainable:
        raise ValueError("model must have a parameter that requires a gradient, got none.")
    for name, param in trainable.items():
        if param.is_complex() or hasattr(param, "device_mesh"):
            kind = "complex" if param.is_complex() else "split over ranks"
            raise ValueError(f"model must have real parameters, whole on each rank, got a {kind} {name[6:]!r}.")


def _widest(tensors: list[Tensor]) -> Tensor:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.empty(0, dtype=dtype, device=tensors[0].device)


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"loss_fn must return a scalar tensor, got {type(value).__name__}.")
    if value.ndim != 0:
        raise ValueError(f"loss_fn must return a scalar, got shape {list(value.shape)}.")
    if not value.is_floating_point():
        raise ValueError(f"loss_fn must return a real scalar, got dtype {value.dtype}.")
