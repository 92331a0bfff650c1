"""How well a relevance map finds what the query names: rank, budget, calibration and stability.

Rank metrics ask only for order: any scores will do. Where scores tie, each metric gives the expected value over
random tie-breaking, so nothing depends on the order of the tokens and a constant map scores as chance does.
All work on the last axis, in float64, and are macro-averaged by the caller: one value a query, nan where a query has
no answer in the picture (count those, do not average them).

Axes: ... any leading axes, Q queries, N tokens (row-major over the grid), I pictures.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arrcoc.model.allocation import num_tokens_of

Budget = int | float


def token_labels(coverage: Tensor, threshold: float = 0.5) -> Tensor:
    """Which tokens are the object: those covered by more than ``threshold``, else the best-covered ones.

    A small object may cover no token by half; the tokens that it covers best are then the answer.

    Args:
        coverage: float tensor [..., N] in [0, 1], share of each token that the mask covers.
        threshold: share above which a token counts as the object.

    Returns:
        bool tensor [..., N]; all False where nothing is covered.
    """
    _check_tokens(coverage, "coverage")
    above = coverage > threshold
    best = coverage.amax(-1, keepdim=True)
    best_covered = (coverage >= best - 1e-6) & (best > 0)  # equal shares may differ in their last bit
    return torch.where(above.any(-1, keepdim=True), above, best_covered)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision, AP = mean over positive tokens i of precision(tokens that score >= scores[i]).

    Equals ``sklearn.metrics.average_precision_score``, ties included. A random map has about the share of positives.

    Args:
        scores: float tensor [..., N], higher = more relevant.
        labels: bool tensor [..., N]; broadcasts against ``scores``.

    Returns:
        float64 tensor [...] in (0, 1]; nan where there is no positive token.
    """
    scores, labels = _broadcast(scores, labels)
    scores, order = scores.sort(dim=-1, descending=True)
    hits = labels.gather(-1, order).double()
    num_above = torch.searchsorted(-scores, -scores, right=True)  # tokens that score at least as much
    precision = hits.cumsum(-1).gather(-1, num_above - 1) / num_above
    return (precision * hits).sum(-1) / hits.sum(-1)


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve, P(a positive token scores above a negative one) + P(tie) / 2 (Mann-Whitney).

    Args:
        scores: float tensor [..., N], higher = more relevant.
        labels: bool tensor [..., N]; broadcasts against ``scores``.

    Returns:
        float64 tensor [...] in [0, 1], .5 for a constant map; nan where all labels are the same.
    """
    scores, labels = _broadcast(scores, labels)
    ascending = scores.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ascending, scores, right=right) for right in (False, True))
    rank = (below + up_to + 1) / 2  # tied tokens share their mean rank
    num_positive = labels.sum(-1).double()
    num_negative = labels.shape[-1] - num_positive
    rank_sum = (rank.double() * labels).sum(-1)
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def pointing_hit(scores: Tensor, coverage: Tensor, threshold: float = 0.25) -> Tensor:
    """Pointing game: whether the most relevant token is covered by more than ``threshold`` (Zhang et al. 2018).

    Args:
        scores: float tensor [..., N], higher = more relevant.
        coverage: float tensor [..., N] in [0, 1].
        threshold: share of the token that makes a hit.

    Returns:
        float64 tensor [...] in [0, 1], the share of hits among tied maxima; nan where nothing is covered.
    """
    scores, coverage = _broadcast(scores, coverage)
    hits = (_top(scores, 1) * (coverage > threshold)).sum(-1)
    return hits.where(coverage.sum(-1) > 0, torch.nan)


def recall_at_budget(scores: Tensor, coverage: Tensor, budget: Budget = 0.25) -> Tensor:
    """Share of the object's area that lies in the tokens a budget keeps, sum_kept coverage / sum coverage.

    Args:
        scores: float tensor [..., N], higher = more relevant.
        coverage: float tensor [..., N] in [0, 1].
        budget: tokens kept: a count in [0, N], or a float share in (0, 1].

    Returns:
        float64 tensor [...] in [0, 1], about budget / N for a random map; nan where nothing is covered.

    Raises:
        ValueError: if the budget is out of its range.
    """
    scores, coverage = _broadcast(scores, coverage)
    kept = _top(scores, num_tokens_of(budget, scores.shape[-1]))
    return (kept * coverage).sum(-1) / coverage.double().sum(-1)


def top_k_overlap(first: Tensor, second: Tensor, k: Budget) -> Tensor:
    """Share of the top-k tokens that two maps have in common, |top_k(a) & top_k(b)| / k (Levine et al. 2019).

    A token that ties for the last places belongs to the top k in part; the common part of two maps is the smaller one,
    so a map has overlap 1 with itself whatever its ties.

    Args:
        first: float tensor [..., N].
        second: float tensor [..., N].
        k: tokens kept: a count in [1, N], or a float share in (0, 1].

    Returns:
        float64 tensor [...] in [0, 1], about k / N for unrelated maps.

    Raises:
        ValueError: if k is out of its range.
    """
    first, second = _broadcast(first, second)
    count = num_tokens_of(k, first.shape[-1])
    if count < 1:
        raise ValueError(f"k must keep at least one of the {first.shape[-1]} tokens, got {k!r}.")
    return torch.minimum(_top(first, count), _top(second, count)).sum(-1) / count


def expected_calibration_error(predicted: Tensor, target: Tensor, num_bins: int = 10) -> Tensor:
    """Expected calibration error, ECE = sum over bins of (share of tokens) * |mean predicted - mean target|.

    Equal-width bins over the predicted value; the targets are soft, the share of the token that is covered
    (Guo et al. 2017, eq. 3, where they are 0 or 1). All elements are pooled.

    Args:
        predicted: float tensor of any shape in [0, 1], relevance.
        target: float tensor of the same shape in [0, 1], coverage.
        num_bins: bins over [0, 1].

    Returns:
        float64 scalar in [0, 1]; nan for no elements.

    Raises:
        ValueError: for other shapes, values outside [0, 1] or no bins.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target must have one shape, got {list(predicted.shape)} and {list(target.shape)}."
        )
    if num_bins < 1:
        raise ValueError(f"num_bins must be >= 1, got {num_bins!r}.")
    for name, value in (("predicted", predicted), ("target", target)):
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ValueError(f"{name} must be in [0, 1], got values from {value.min():.4g} to {value.max():.4g}.")
    predicted, target = predicted.double().flatten(), target.double().flatten()
    bins = (predicted * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=predicted.device).index_add_(0, bins, predicted - target)
    return gaps.abs().sum() / predicted.numel()


def paired_difference(scores: Tensor, labels: Tensor) -> Tensor:
    """What the query's words add: AP of its own map minus the mean AP of the maps of the picture's other queries.

    0 for a map that ignores the text, however well it finds things.

    Args:
        scores: float tensor [Q, N], one map a query of one picture.
        labels: bool tensor [Q, N]; queries without a positive token take no part.

    Returns:
        float64 tensor [Q] in (-1, 1); nan for queries without a positive token, and for an only one.
    """
    precision_QQ = average_precision(scores[None], labels[:, None])  # [i, j]: the answer of i found by the map of j
    present_Q = labels.any(-1)
    others_QQ = present_Q[None] & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    mean_of_others_Q = precision_QQ.where(others_QQ, 0.0).sum(-1) / others_QQ.sum(-1)
    return precision_QQ.diagonal() - mean_of_others_Q


def bootstrap_interval(
    totals: Tensor, counts: Tensor, *, generator: torch.Generator, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over queries, resampling pictures: queries of one picture go together.

    Args:
        totals: float tensor [I], sum of the metric over each picture's queries.
        counts: tensor [I], number of those queries; pictures without any are left out.
        generator: source of randomness, on the CPU.
        num_resamples: bootstrap samples.
        level: probability that the interval is meant to hold.

    Returns:
        (low, high); nan for no queries.
    """
    totals, counts = totals[counts > 0].cpu().double(), counts[counts > 0].cpu().double()
    num_pictures = len(totals)
    if num_pictures == 0:
        return float("nan"), float("nan")
    picks = torch.randint(num_pictures, (num_resamples, num_pictures), generator=generator)
    means = totals[picks].sum(1) / counts[picks].sum(1)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _top(scores: Tensor, k: int) -> Tensor:
    """Membership [..., N] in the top k, sums to k: 1 above the k-th score, the places left shared by its ties."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.float64)
    kth = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = (scores > kth).double(), (scores == kth).double()
    return above + tied * (k - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)


def _broadcast(scores: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both with one shape and contiguous, checked."""
    _check_tokens(scores, "scores")
    if scores.shape[-1:] != other.shape[-1:]:
        raise ValueError(
            f"both maps must have the same number of tokens, got {list(scores.shape)} and {list(other.shape)}."
        )
    shape = np.broadcast_shapes(scores.shape, other.shape)
    return scores.expand(shape).contiguous(), other.expand(shape).contiguous()


def _check_tokens(values: Tensor, name: str) -> None:
    if values.ndim < 1 or values.shape[-1] < 1:
        raise ValueError(f"{name} must have shape [..., N] with at least one token, got {list(values.shape)}.")
    if bool(values.isnan().any()):
        raise ValueError(f"{name} must not contain NaN.")
