"""Calibration of a trained head: relevance as the covered share, without changing the order of the tokens.

Logistic regression (Platt 1999) with soft targets on four numbers a token: its score, the mean and the peak of the
scores over its picture, and one. It needs no step size: it is convex but for the sign of the first weight, which stays
positive so that the order is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from arrcoc.model.head import RelevanceHead

_MAX_ITERATIONS = 100


def calibrate_head(head: RelevanceHead, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the calibration of a head to minimise the binary cross-entropy.

    Args:
        head: changed in place: log_gain, mean_gain, peak_gain and bias.
        batches: pairs of scores ``head.ranking(...)`` [B, Q, N] and targets [B, Q, N] in [0, 1].
    """
    rows, targets = [], []
    for ranking_BQN, targets_BQN in batches:
        scores = ranking_BQN.detach().double()
        mean, peak = scores.mean(-1, keepdim=True), scores.amax(-1, keepdim=True)
        rows.append(torch.stack([scores, mean.expand_as(scores), peak.expand_as(scores)], -1).flatten(0, -2))
        targets.append(targets_BQN.detach().double().flatten())
    features, target = torch.cat(rows), torch.cat(targets)
    # Standardised, so that one step size fits all; undone below.
    scale = features.std(0, correction=0).clamp(min=1e-9)
    log_gain = scale[0].log().clone().requires_grad_()
    others = torch.zeros(2, dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.logit(target.mean().clamp(1e-4, 1 - 1e-4)).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [log_gain, others, bias], max_iter=_MAX_ITERATIONS, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = torch.cat([log_gain.exp()[None], others])
        loss = F.binary_cross_entropy_with_logits((features / scale) @ weights + bias, target)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.log_gain.copy_(log_gain - scale[0].log())
        head.mean_gain.copy_(others[0] / scale[1])
        head.peak_gain.copy_(others[1] / scale[2])
        head.bias.copy_(bias)
