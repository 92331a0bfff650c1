"""One step of the optimizer on the loss of a whole batch: in micro-batches, on all ranks, in any precision.

The loss is  sum_q l_q / Q_counted + penalty_weight * penalty,  over all queries q of all micro-batches of all ranks.
Each part divides by the whole's count, so that the parts' gradients add up to that of the whole, in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from arrcoc.config import TrainConfig
from arrcoc.training.distributed import Ranks
from arrcoc.training.losses import relevance_loss
from arrcoc.training.part import Prepared, TrainedPart
from sam_core import L2Ascent, compute_perturbation, perturbed


class Update:
    """Makes steps.

    Args:
        part: what maps batches to logits.
        groups: parameter groups of the optimizer.
        config: the settings.
        ranks: the processes that share each batch.
    """

    def __init__(self, part: TrainedPart, groups: list[dict[str, Any]], config: TrainConfig, ranks: Ranks) -> None:
        self.part, self.config, self.ranks = part, config, ranks
        self.params: list[nn.Parameter] = [param for group in groups for param in group["params"]]
        self.loss = relevance_loss(config.loss)
        self.optimizer = config.make_optimizer(groups)
        self.device = self.params[0].device
        scaled = config.precision == "float16"
        self.takes_sample_losses = getattr(self.optimizer, "takes_sample_losses", False)
        if self.takes_sample_losses and ranks.num_ranks > 1:
            raise ValueError(f"optimizer must not choose among samples on several ranks, got {config.optimizer!r}.")
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped because of a gradient that was not finite."""
        return int(getattr(self.optimizer, "num_skipped", 0))

    def __call__(self, batches: Sequence[Prepared]) -> tuple[float, float]:
        """Make one step; loss and penalty at the weights before it."""
        totals = self._totals(batches)
        seen: list[tuple[float, float]] = []

        def backward() -> Tensor:
            loss, penalty = self._backward(batches, totals, self.scaler)
            seen.append((loss.item(), penalty.item()))
            return loss + self.config.penalty_weight * penalty

        def sample_losses(indices: Tensor | None = None) -> Tensor:
            losses, penalties = self._sample_losses(batches, totals, indices)
            seen.append((losses.mean().item(), penalties.mean().item()))
            return losses + self.config.penalty_weight * penalties

        closure = sample_losses if self.takes_sample_losses else backward
        step: Any = self.optimizer.step
        if self.scaler is None:
            step(closure)
        else:
            step(closure, grad_scaler=self.scaler)
            self.scaler.update()
        return seen[0]

    def sharpness(self, batches: Sequence[Prepared]) -> float:
        """How far the loss rises within rho:  L(w + rho g / ||g||) - L(w)  (Foret et al. 2021, eq. 2)."""
        totals = self._totals(batches)
        try:
            self.optimizer.zero_grad()
            at_weights = self._backward(batches, totals, measuring=True)[0].item()
            moved = [param for param in self.params if param.grad is not None]
            grads = [param.grad for param in moved if param.grad is not None]
            rule = L2Ascent(rho=self.config.rho)
            (perturbation,) = compute_perturbation([rule], [grads], [[param.detach() for param in moved]])
            with perturbed(moved, perturbation), torch.no_grad():
                local = sum((self._part_of_loss(batch, totals, measuring=True)[0] for batch in batches), self._zero())
                return self.ranks.sum_(local.double()).item() - at_weights
        finally:
            self.optimizer.zero_grad()

    def _totals(self, batches: Sequence[Prepared]) -> Tensor:
        """Queries that count for the loss, and all queries, over the micro-batches of all ranks."""
        counted = sum(float(self.loss.counts(batch.targets).sum()) for batch in batches)
        queries = sum(batch.targets[..., 0].numel() for batch in batches)
        return self.ranks.sum_(torch.tensor([counted, queries], dtype=torch.float64, device=self.device)).clamp(min=1)

    def _per_query(self, batch: Prepared, measuring: bool = False) -> tuple[Tensor, Tensor]:
        """Losses [B, Q], 0 where a query does not count, and penalties [B, Q] of a micro-batch.

        Measuring leaves out the penalty and computes in float32.
        """
        with nullcontext() if measuring else self.part.autocast():
            clean, noisy = self.part.head_inputs(batch)
            logits = self.part.head(*clean)
            noisy_logits = self.part.head(*noisy) if noisy is not None and not measuring else None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = self.loss.per_query(logits, batch.targets) * self.loss.counts(batch.targets).to(logits.dtype)
        if noisy_logits is None:
            return losses, torch.zeros_like(losses)
        change = torch.sigmoid(logits) - torch.sigmoid(noisy_logits.to(logits.dtype))
        return losses, change.abs().mean(-1)

    def _part_of_loss(self, batch: Prepared, totals: Tensor, measuring: bool) -> tuple[Tensor, Tensor]:
        """A micro-batch's part of the loss and of the penalty."""
        losses, penalties = self._per_query(batch, measuring)
        counted, queries = totals.to(losses.dtype)
        return losses.sum() / counted, penalties.sum() / queries

    def _sample_losses(
        self, batches: Sequence[Prepared], totals: Tensor, indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Losses and penalties of single images, [sum of B] or [indices], whose mean over all is that of the whole."""
        sizes = [len(batch) for batch in batches]
        parts = []
        for batch, end in zip(batches, accumulate(sizes), strict=True):
            start = end - len(batch)
            if indices is not None:
                batch = batch.select(indices[(indices >= start) & (indices < end)] - start)
            if len(batch):
                parts.append([values.sum(-1) * sum(sizes) for values in self._per_query(batch)])
        losses, penalties = (torch.cat(list(values)) for values in zip(*parts, strict=True))
        return losses / totals[0].to(losses.dtype), penalties / totals[1].to(losses.dtype)

    def _backward(
        self,
        batches: Sequence[Prepared],
        totals: Tensor,
        scaler: torch.amp.GradScaler | None = None,
        measuring: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the whole batch in ``.grad``; its loss and penalty."""
        loss, change = self._zero(), self._zero()
        for batch in batches:
            part_loss, part_change = self._part_of_loss(batch, totals, measuring)
            total = part_loss + self.config.penalty_weight * part_change
            torch.autograd.backward(total if scaler is None else scaler.scale(total))
            loss, change = loss + part_loss.detach(), change + part_change.detach()
        if self.ranks.num_ranks > 1:
            loss, change = self._reduce(loss, change)
        return loss, change

    def _reduce(self, loss: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Sum gradients, loss and penalty over the ranks, in one message; a parameter unused everywhere stays so."""
        used = torch.tensor([float(param.grad is not None) for param in self.params], device=self.device)
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in self.params]
        message = torch.cat([torch.stack([loss, change]), used, *(grad.flatten() for grad in grads)])
        self.ranks.sum_(message)
        start = 2 + len(self.params)
        for number, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            if message[2 + number] > 0:
                param.grad = grad.copy_(message[start : start + grad.numel()].view_as(grad))
            start += grad.numel()
        return message[0], message[1]

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.promote_types(self.params[0].dtype, torch.float32), device=self.device)
