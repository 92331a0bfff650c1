"""Losses between relevance logits and the share of each token that the object covers.

Axes: B batch, Q queries, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def bce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy with soft targets, mean over tokens; a proper score, so its minimum is calibrated."""
    return F.binary_cross_entropy_with_logits(logits, targets)


def mse_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared error of the relevance, mean over tokens, as in the source (section 9.5)."""
    return F.mse_loss(torch.sigmoid(logits), targets)


def listwise_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy between the target's distribution over the tokens and the softmax of the logits (ListNet).

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach". It looks at order alone: absent
    queries (no target) do not count, and the level of the logits is left free, to be calibrated afterwards.
    """
    mass = targets.sum(-1)
    per_query = (torch.logsumexp(logits, -1) * mass - (targets * logits).sum(-1)) / mass.clamp(min=1e-6)
    present = (mass > 0).to(logits.dtype)
    return (per_query * present).sum() / present.sum().clamp(min=1)


_LOSSES: dict[str, Loss] = {"bce": bce_loss, "mse": mse_loss, "listwise": listwise_loss}


def relevance_loss(name: str) -> Loss:
    """The loss of that name: "bce", "mse" or "listwise"."""
    if name not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {name!r}.")
    return _LOSSES[name]
