"""Losses between relevance logits and the share of each token that the object covers.

A loss is a number a query, and which queries count; its value is the mean over those. So the loss of a large batch is
the weighted mean of its parts, whoever computes them, and both passes of SAM can take it in parts.

Axes: ... leading axes (batch and queries), N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Loss:
    """A loss by its parts; calling it gives the mean over the queries that count.

    Args:
        per_query: logits [..., N] and targets [..., N] in [0, 1] -> loss of each query [...].
        counts: targets [..., N] -> 1 where a query counts, 0 where it does not [...].
    """

    per_query: Callable[[Tensor, Tensor], Tensor]
    counts: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the queries that count; 0 if none does."""
        counts = self.counts(targets).to(logits.dtype)
        return (self.per_query(logits, targets) * counts).sum() / counts.sum().clamp(min=1)


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, mean over tokens; a proper score, so its minimum is calibrated."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def mse_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared error of the relevance, mean over tokens, as in the source (section 9.5)."""
    return (torch.sigmoid(logits) - targets).square().mean(-1)


def listwise_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy between the target's distribution over the tokens and the softmax of the logits (ListNet).

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach". It looks at order alone: absent
    queries (no target) do not count, and the level of the logits is left free, to be calibrated afterwards.
    """
    mass = targets.sum(-1)
    return (torch.logsumexp(logits, -1) * mass - (targets * logits).sum(-1)) / mass.clamp(min=1e-6)


def smooth_ap_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus a smooth average precision, with the targets t as soft labels (Brown et al. 2020, "Smooth-AP", eq. 5).

    AP = sum_i t_i P_i / sum_i t_i  with the precision at token i  P_i = sum_j t_j H_ij / sum_j H_ij,  where
    H_ij = sigmoid(z_j - z_i)  for j != i  says softly that j ranks above i, and  H_ii = 1.  For hard labels this is the
    paper's; its temperature is 1 here, since the head learns the scale of its logits. Takes memory N^2 a query.
    """
    above = torch.sigmoid(logits[..., None, :] - logits[..., :, None])
    above = above + 0.5 * torch.eye(logits.shape[-1], dtype=above.dtype, device=above.device)
    precision = (above * targets[..., None, :]).sum(-1) / above.sum(-1)
    return 1 - (targets * precision).sum(-1) / targets.sum(-1).clamp(min=1e-6)


def _every(targets: Tensor) -> Tensor:
    return torch.ones_like(targets[..., 0])


def _present(targets: Tensor) -> Tensor:
    return (targets.sum(-1) > 0).to(targets.dtype)


_LOSSES = {
    "bce": Loss(bce_loss, _every),
    "mse": Loss(mse_loss, _every),
    "listwise": Loss(listwise_loss, _present),
    "smooth_ap": Loss(smooth_ap_loss, _present),
}


def relevance_loss(name: str) -> Loss:
    """The loss of that name: "bce", "mse", "listwise" or "smooth_ap"."""
    if name not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {name!r}.")
    return _LOSSES[name]
