"""Which tokens to keep within a budget, and precision-aware selection.

Precision is the inverse variance of a token's relevance: over perturbed copies of the scores, or over the tokens that
look most like it (high variance across similar regions is low precision). A token more precise than the target is
treated as overconfident and loses a little of its score.

The source's listing divides by the largest score, which fails when that is negative, and its penalty is zero at its
default target; here precision is estimated from data, as the source's text says.

Axes: B batch, N tokens, K kept, M neighbours, R perturbed draws, D embedding width.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_core._checks import check_positive

_NUM_NEIGHBOURS = 8
_STRENGTH = 0.1  # of the scores' standard deviation, as in the source


@dataclass(frozen=True, eq=False)
class Allocation:
    """The tokens that are kept.

    Args:
        keep_indices: row-major token numbers in ascending order, [K] or [B, K]; rows with fewer tokens end in -1.
        weights: 1 for a kept token, 0 for a dropped one, [N] or [B, N].
        num_kept: how many tokens are kept, an int or an integer tensor [B].
    """

    keep_indices: Tensor
    weights: Tensor
    num_kept: int | Tensor


def _is_count(value: object) -> bool:
    """A whole number of Python, NumPy or torch, but not a truth value."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def num_tokens_of(budget: int | float, num_tokens: int) -> int:
    """A budget in tokens: an int is a number of tokens, a float in (0, 1] a share, rounded as Python's round does.

    Raises:
        ValueError: if an int is outside [0, num_tokens] or a float outside (0, 1].
    """
    if _is_count(budget):
        if not 0 <= budget <= num_tokens:
            raise ValueError(f"budget must be in [0, {num_tokens}] tokens, got {budget}.")
        return operator.index(budget)  # type: ignore[arg-type]
    if isinstance(budget, bool) or not hasattr(budget, "__float__"):
        raise ValueError(f"budget must be an int (tokens) or a float (share), got {budget!r}.")
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be a share in (0, 1], got {budget!r}.")
    return round(float(budget) * num_tokens)


def num_tokens_for_mass(scores: Tensor, mass: float) -> int:
    """The fewest tokens whose scores [N] >= 0 add up to at least a share ``mass`` in (0, 1] of the total."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], got {mass!r}.")
    cumulative = scores.double().sort(descending=True).values.cumsum(0)
    # The tolerance keeps rounding in the sum from asking for one token too many.
    return int((cumulative < mass * cumulative[-1] * (1 - 1e-12)).sum()) + 1


def keep_top(scores: Tensor, num_kept: int) -> Allocation:
    """The ``num_kept`` highest of finite scores [N]; of equal scores the earlier token is kept."""
    order = scores.sort(descending=True, stable=True).indices
    keep_indices = order[:num_kept].sort().values
    weights = torch.zeros_like(scores, dtype=torch.float32)
    weights[keep_indices] = 1
    return Allocation(keep_indices, weights, num_kept)


def _check_scores(scores: Tensor) -> None:
    if scores.ndim not in (1, 2):
        raise ValueError(f"relevance_scores must have shape [N] or [B, N], got {list(scores.shape)}.")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("relevance_scores must be finite.")


class PrecisionAwareAllocation(nn.Module):
    """Top-k selection that prefers moderate precision to overconfidence.

    Args:
        target_precision: > 0; precision is relative to the inverse variance of the map itself, so at 1 a token is
            overconfident if its relevance varies less than relevance does over the picture.
    """

    def __init__(self, target_precision: float = 1.0) -> None:
        super().__init__()
        check_positive("target_precision", target_precision)
        self.target_precision = target_precision

    def compute_token_allocation(
        self,
        relevance_scores: Tensor,
        compute_budget: int,
        *,
        perturbed_scores: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Choose ``compute_budget`` tokens of every picture.

        Args:
            relevance_scores: finite scores [N] or [B, N], of any sign.
            compute_budget: tokens to keep, 0 to N.
            perturbed_scores: the same scores under R perturbations, [R, N] or [R, B, N]; gives the precision.
            tokens: token embeddings [N, D] or [B, N, D]; gives the precision from each token's nearest neighbours in
                cosine, if perturbed_scores is None. With neither, this is plain top-k.

        Returns:
            0/1 tensor of the shape and dtype of relevance_scores, with exactly compute_budget ones a picture.

        Raises:
            ValueError: for scores that are not finite, a budget outside [0, N], or shapes that do not fit.
        """
        _check_scores(relevance_scores)
        if not _is_count(compute_budget):
            raise ValueError(f"compute_budget must be an int, got {compute_budget!r}.")
        num_kept = num_tokens_of(compute_budget, relevance_scores.shape[-1])
        adjusted = relevance_scores.detach().double()
        precision = self.precision(adjusted, perturbed_scores=perturbed_scores, tokens=tokens)
        if precision is not None:
            spread = adjusted.std(-1, correction=0, keepdim=True)
            overconfidence = (1 - self.target_precision / precision).clamp(min=0)
            adjusted = adjusted - _STRENGTH * spread * overconfidence
        rows = [keep_top(row, num_kept).weights for row in adjusted.reshape(-1, adjusted.shape[-1])]
        return torch.stack(rows).reshape(adjusted.shape).to(relevance_scores.dtype)

    def precision(
        self, relevance_scores: Tensor, *, perturbed_scores: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor | None:
        """Inverse variance of each token's relevance, times the variance of the map; shape of the scores, > 0.

        Arguments as in ``compute_token_allocation``. None if neither perturbed_scores nor tokens is given.
        """
        if perturbed_scores is not None:
            if perturbed_scores.shape[1:] != relevance_scores.shape or len(perturbed_scores) < 2:
                raise ValueError(
                    f"perturbed_scores must have shape [R >= 2, {', '.join(map(str, relevance_scores.shape))}], "
                    f"got {list(perturbed_scores.shape)}."
                )
            variance = perturbed_scores.double().var(0)
        elif tokens is not None:
            if tokens.shape[:-1] != relevance_scores.shape:
                raise ValueError(
                    f"tokens must have shape [{', '.join(map(str, relevance_scores.shape))}, D], "
                    f"got {list(tokens.shape)}."
                )
            variance = _neighbour_variance(relevance_scores.double(), tokens.double())
        else:
            return None
        spread = relevance_scores.double().var(-1, correction=0, keepdim=True)
        return (spread + 1e-12) / (variance + 1e-6 * spread + 1e-12)


def _neighbour_variance(scores: Tensor, tokens: Tensor) -> Tensor:
    """Variance of the scores among each token and the tokens most like it (cosine)."""
    looks_ND = F.normalize(tokens, dim=-1)
    num_neighbours = min(_NUM_NEIGHBOURS + 1, tokens.shape[-2])
    nearest_NM = (looks_ND @ looks_ND.mT).topk(num_neighbours, dim=-1).indices
    values_NM = scores[..., None, :].expand(*nearest_NM.shape[:-1], scores.shape[-1]).gather(-1, nearest_NM)
    return values_NM.var(-1, correction=0)
