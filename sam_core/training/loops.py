"""Training loops over the optimizers of sam_core."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from sam_core._checks import check_count
from sam_core.optimizers.sam import SAM
from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.training.accumulation import Batch, Loss, make_closure, make_closures

_logger = logging.getLogger(__name__)


def train_with_sam(
    model: nn.Module,
    train_loader: Iterable[Batch],
    epochs: int = 100,
    lr: float = 0.1,
    rho: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Train a classifier with SAM over SGD, the learning rate falling along a half cosine (Foret et al. 2021, sec. 3).

    Batch normalisation follows the clean weights alone. The mean loss at w of each epoch goes to the log
    ``sam_core.training.loops`` at level INFO.

    Args:
        model: maps inputs [B, ...] to class scores [B, C]; trained in place, left in training mode.
        train_loader: gives (inputs [B, ...], targets [B], class numbers), anew each epoch.
        epochs: passes over the data, >= 0.
        lr: learning rate at the start, >= 0.
        rho: SAM radius in parameter units, >= 0.
        momentum: of SGD.
        weight_decay: of SGD.
        device: where to train; None: where the model is.

    Returns:
        The model.

    Raises:
        ValueError: for a bad option, or a loader that gives no batch.

    Example:
        >>> loader = [(torch.randn(8, 3), torch.randint(2, (8,)))]
        >>> model = train_with_sam(torch.nn.Linear(3, 2), loader, epochs=2)
    """
    check_count("epochs", epochs)
    model = model.to(device) if device is not None else model
    device = next(model.parameters()).device
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho, lr=lr, momentum=momentum, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(epochs, 1))
    model.train()
    for epoch in range(epochs):
        losses = []
        for batch in train_loader:
            losses.append(optimizer.step(make_closure(model, [batch], cross_entropy, optimizer, device=device)))
        if not losses:
            raise ValueError("train_loader must give at least one batch, got none.")
        scheduler.step()
        _logger.info("epoch %d/%d: loss %.4f", epoch + 1, epochs, torch.stack(losses).mean())
    return model


def train_sam_with_accumulation(
    model: nn.Module,
    train_loader: Iterable[Batch],
    optimizer: OptimizerWrapper,
    accumulation_steps: int = 4,
    device: str | torch.device | None = None,
    loss_fn: Loss = cross_entropy,
    *,
    m_sharpness: bool = False,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> nn.Module:
    """Train for one epoch with batches of several micro-batches: a step is that on their union, in a part's memory.

    Both gradients are those of the whole batch, means over its samples; see :func:`make_closure`. What is left at the
    end of the loader makes a smaller batch. The mean loss at w goes to the log ``sam_core.training.loops`` at level
    INFO.

    Args:
        model: maps inputs [n, ...] to what ``loss_fn`` takes; trained in place, left in training mode.
        train_loader: gives micro-batches (inputs [n, ...], targets [n, ...]).
        optimizer: any optimizer of sam_core that takes one loss a batch.
        accumulation_steps: micro-batches a step, >= 1.
        device: where to train; None: where the model is.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over samples.
        m_sharpness: each micro-batch looks for its own worst neighbour, see :meth:`SAM.step_m_sharpness`.
        grad_scaler: scales the losses; updated after each step.

    Returns:
        The model.

    Raises:
        ValueError: for a bad option, a loader that gives no batch, an optimizer that cannot do it, or a
            DistributedDataParallel, which :func:`train_sam_distributed` trains.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> loader = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(6)]
        >>> model = train_sam_with_accumulation(model, loader, optimizer, accumulation_steps=4)
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model must not be a DistributedDataParallel: train it with train_sam_distributed.")
    model = model.to(device) if device is not None else model
    loss = train_one_epoch(
        model, train_loader, optimizer, accumulation_steps, loss_fn, m_sharpness=m_sharpness, grad_scaler=grad_scaler
    )
    _logger.info("loss %.4f", loss)
    return model


def train_one_epoch(
    model: nn.Module,
    train_loader: Iterable[Batch],
    optimizer: OptimizerWrapper,
    accumulation_steps: int,
    loss_fn: Loss,
    *,
    m_sharpness: bool = False,
    grad_scaler: torch.amp.GradScaler | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] | None = None,
) -> Tensor:
    """The epoch of the loops above and of :func:`train_sam_distributed`, which explain the arguments.

    Returns:
        Mean loss at w over the steps, a detached tensor [].
    """
    check_count("accumulation_steps", accumulation_steps, at_least=1)
    if m_sharpness and not isinstance(optimizer, SAM):
        raise ValueError(f"optimizer must be SAM or ASAM with m_sharpness=True, got {type(optimizer).__name__}.")
    device = next(model.parameters()).device
    model.train()
    losses, loader = [], iter(train_loader)
    while batches := list(islice(loader, accumulation_steps)):
        if m_sharpness and isinstance(optimizer, SAM):
            parts = make_closures(model, batches, loss_fn, optimizer, device=device, grad_scaler=grad_scaler)
            losses.append(optimizer.step_m_sharpness(parts, grad_scaler=grad_scaler, no_sync=no_sync))
        else:
            closure = make_closure(model, batches, loss_fn, optimizer, device=device, grad_scaler=grad_scaler)
            losses.append(optimizer.step(closure, grad_scaler=grad_scaler, ascent_context=no_sync))
        if grad_scaler is not None:
            grad_scaler.update()
    if not losses:
        raise ValueError("train_loader must give at least one batch, got none.")
    return torch.stack(losses).mean()
