"""Losses against their formulas, query by query; which queries count; a whole as the weighted mean of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arrcoc.config import LOSSES
from arrcoc.evaluation.metrics import average_precision
from arrcoc.training.losses import Loss, relevance_loss, smooth_ap_loss


def example(num_queries: int = 6) -> tuple[Tensor, Tensor]:
    """Logits and targets [Q, 5] in float64; the first query is absent."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_queries, 5, dtype=torch.float64, generator=generator)
    targets = torch.rand(num_queries, 5, dtype=torch.float64, generator=generator)
    targets[0] = 0
    return logits, targets


def slow_smooth_ap(logits: Tensor, targets: Tensor) -> Tensor:
    total = torch.tensor(0.0, dtype=torch.float64)
    for i in range(len(logits)):
        above = sum(torch.sigmoid(logits[j] - logits[i]) for j in range(len(logits)) if j != i)
        hits = sum(targets[j] * torch.sigmoid(logits[j] - logits[i]) for j in range(len(logits)) if j != i)
        total += targets[i] * (targets[i] + hits) / (1 + above)
    return 1 - total / targets.sum()


def truth(name: str, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss by its formula, in loops over queries."""
    p = torch.sigmoid(logits)
    if name == "bce":
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    if name == "mse":
        return ((p - targets) ** 2).mean()
    rows = [(row, target) for row, target in zip(logits, targets, strict=True) if target.sum() > 0]
    if name == "listwise":
        return torch.stack([-(t / t.sum() * F.log_softmax(row, -1)).sum() for row, t in rows]).mean()
    assert name == "smooth_ap"
    return torch.stack([slow_smooth_ap(row, t) for row, t in rows]).mean()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_its_formula(name: str) -> None:
    logits, targets = example()
    whole = relevance_loss(name)(logits.view(2, 3, 5), targets.view(2, 3, 5))
    torch.testing.assert_close(whole, truth(name, logits, targets), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_whole_is_the_weighted_mean_of_its_parts(name: str) -> None:
    loss = relevance_loss(name)
    logits, targets = example(9)
    parts = [(loss(logits[part], targets[part]), loss.counts(targets[part]).sum()) for part in (slice(2), slice(2, 9))]
    mean = sum(value * count for value, count in parts) / sum(count for _, count in parts)
    torch.testing.assert_close(loss(logits, targets), mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "count"), [("bce", 6), ("mse", 6), ("listwise", 5), ("smooth_ap", 5)])
def test_absent_queries_count_where_the_level_matters(name: str, count: int) -> None:
    assert relevance_loss(name).counts(example()[1]).sum() == count


@pytest.mark.parametrize("name", ["listwise", "smooth_ap"])
def test_absent_queries_alone_give_zero(name: str) -> None:
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = relevance_loss(name)(logits, torch.zeros(1, 2, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_smooth_ap_is_the_average_precision_of_a_sharp_map() -> None:
    logits = torch.randperm(12, generator=torch.Generator().manual_seed(1)).double()
    labels = torch.zeros(12, dtype=torch.bool)
    labels[[1, 4, 7]] = True
    expected = 1 - average_precision(logits, labels)
    assert 0.1 < expected < 0.9
    torch.testing.assert_close(smooth_ap_loss(100 * logits, labels.double()), expected, rtol=1e-9, atol=1e-9)


def test_loss_by_name() -> None:
    assert all(isinstance(relevance_loss(name), Loss) for name in LOSSES)
    with pytest.raises(ValueError, match="loss must be one of bce, mse, listwise, smooth_ap, got 'hinge'"):
        relevance_loss("hinge")
