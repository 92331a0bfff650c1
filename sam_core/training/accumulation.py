"""Big batches in small parts: both of a step's gradients are sums over all micro-batches, not over the last one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.training.batchnorm import frozen_running_stats

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def make_closures(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: Loss,
    optimizer: OptimizerWrapper,
    *,
    device: str | torch.device | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> list[Callable[[], Tensor]]:
    """One closure a micro-batch: its share (n_i / n) L_i of the mean loss over all n samples.

    Running statistics of batch normalisation follow the clean weights: the second pass does not count.

    Args:
        model: maps inputs [n_i, ...] to what ``loss_fn`` takes.
        batches: micro-batches of (inputs [n_i, ...], targets [n_i, ...]).
        loss_fn: ``loss_fn(outputs, targets)``, the mean over samples.
        optimizer: the one whose step calls the closures.
        device: where the micro-batches are moved to, one at a time; None: they stay.
        grad_scaler: scales the loss, if the step gets one.

    Returns:
        Functions without arguments that call backward and return the share of the loss, detached.

    Raises:
        ValueError: for no samples, or an optimizer that wants each sample's loss.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> batches = [(torch.ones(n, 3), torch.zeros(n, dtype=torch.int64)) for n in (4, 2)]
        >>> closures = make_closures(model, batches, torch.nn.functional.cross_entropy, optimizer)
        >>> loss = optimizer.step_m_sharpness(closures)
    """
    if optimizer.takes_sample_losses:
        raise ValueError(
            f"optimizer must take one loss a batch, got {type(optimizer).__name__}, which selects samples."
        )
    num_samples = sum(len(targets) for _, targets in batches)
    if num_samples == 0:
        raise ValueError(f"batches must hold at least one sample, got {len(batches)} empty ones.")

    def make(inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            with frozen_running_stats(model) if optimizer.in_second_pass else nullcontext():
                loss = loss_fn(model(inputs.to(device)), targets.to(device)) * (len(targets) / num_samples)
            torch.autograd.backward(loss if grad_scaler is None else grad_scaler.scale(loss))
            return loss.detach()

        return closure

    return [make(inputs, targets) for inputs, targets in batches]


def make_closure(
    model: nn.Module,
    batches: Sequence[Batch],
    loss_fn: Loss,
    optimizer: OptimizerWrapper,
    *,
    device: str | torch.device | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> Callable[..., Tensor]:
    """One closure for all micro-batches, sum_i (n_i / n) L_i: the gradient of one big batch in the memory of a part.

    That holds for any sizes, except that batch normalisation sees micro-batches. A model with ``no_sync``, such as
    DistributedDataParallel, sums the gradients over its ranks in the last backward alone. Arguments and errors are
    those of :func:`make_closures`, except that a single batch will do for an optimizer that wants each sample's loss;
    ``loss_fn`` then returns it, e.g. ``partial(cross_entropy, reduction="none")``.

    Returns:
        A function without arguments for ``optimizer.step``; it returns the mean loss over all samples, detached. Or
        the function of indices that :class:`EfficientSAM` wants.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> batches = [(torch.ones(n, 3), torch.zeros(n, dtype=torch.int64)) for n in (4, 4, 1)]
        >>> loss = optimizer.step(make_closure(model, batches, torch.nn.functional.cross_entropy, optimizer))
    """
    if optimizer.takes_sample_losses and len(batches) == 1:
        inputs, targets = (tensor.to(device) for tensor in batches[0])
        return _sample_losses(model, inputs, targets, loss_fn, optimizer)
    *parts, last = make_closures(model, batches, loss_fn, optimizer, device=device, grad_scaler=grad_scaler)
    no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)

    def closure() -> Tensor:
        with no_sync():
            losses = [part() for part in parts]
        return torch.stack([*losses, last()]).sum()

    return closure


def _sample_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Loss, optimizer: OptimizerWrapper
) -> Callable[..., Tensor]:
    def closure(indices: Tensor | None = None) -> Tensor:
        chosen = slice(None) if indices is None else indices
        with frozen_running_stats(model) if optimizer.in_second_pass else nullcontext():
            losses = loss_fn(model(inputs[chosen]), targets[chosen])
        if losses.dim() != 1:
            raise ValueError(
                f"loss_fn must return one loss a sample for {type(optimizer).__name__}, e.g. "
                f'partial(cross_entropy, reduction="none"), got shape {list(losses.shape)}.'
            )
        return losses

    return closure
