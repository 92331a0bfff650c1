"""Training loops over two-pass optimizers."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_core._checks import check_count
from sam_core.optimizers.sam import SAM
from sam_core.training.batchnorm import frozen_running_stats

_logger = logging.getLogger(__name__)


def train_with_sam(
    model: nn.Module,
    train_loader: Iterable[tuple[Tensor, Tensor]],
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
            inputs, targets = (tensor.to(device) for tensor in batch)

            def backward(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                loss = cross_entropy(model(inputs), targets)
                torch.autograd.backward(loss)
                return loss.detach()

            optimizer.zero_grad()
            losses.append(backward())
            with frozen_running_stats(model):
                optimizer.step(backward, grads_ready=True)
        if not losses:
            raise ValueError("train_loader must give at least one batch, got none.")
        scheduler.step()
        _logger.info("epoch %d/%d: loss %.4f", epoch + 1, epochs, torch.stack(losses).mean())
    return model
