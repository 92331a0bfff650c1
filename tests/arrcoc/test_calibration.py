"""Calibration of a head against a generalised linear fit of its own, and what it promises."""

from __future__ import annotations

import torch

from arrcoc import HeadConfig, RelevanceHead
from arrcoc.training.calibration import calibrate_head


def scores(num: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 3, 25, generator=generator) + 2 * torch.randn(num, 3, 1, generator=generator)


def test_it_finds_the_calibration_that_made_the_targets() -> None:
    truth, head = (RelevanceHead(HeadConfig(embed_dim=4)) for _ in range(2))
    with torch.no_grad():
        for name, value in {"log_gain": 0.4, "mean_gain": -0.7, "peak_gain": 0.5, "bias": -1.5}.items():
            getattr(truth, name).fill_(value)
    ranking = scores()
    calibrate_head(head, [(part, torch.sigmoid(truth.calibrate(part))) for part in ranking.split(7)])
    for name in ("log_gain", "mean_gain", "peak_gain", "bias"):
        torch.testing.assert_close(getattr(head, name), getattr(truth, name), atol=2e-3, rtol=0)


def test_mean_relevance_is_the_mean_coverage_and_the_order_stays() -> None:
    head = RelevanceHead(HeadConfig(embed_dim=4))
    ranking = scores()
    targets = (
        torch.rand(ranking.shape, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(ranking - 2)
    ).float()
    calibrate_head(head, [(ranking, targets)])
    relevance = torch.sigmoid(head.calibrate(ranking))
    torch.testing.assert_close(relevance.mean(), targets.mean(), atol=1e-4, rtol=0)
    assert torch.equal(relevance.argsort(-1), ranking.argsort(-1))


def test_useless_scores_give_the_base_rate() -> None:
    head = RelevanceHead(HeadConfig(embed_dim=4))
    calibrate_head(head, [(torch.zeros(4, 1, 9), torch.full((4, 1, 9), 0.2))])
    torch.testing.assert_close(
        torch.sigmoid(head.calibrate(torch.zeros(1, 1, 9))), torch.full((1, 1, 9), 0.2), atol=1e-4, rtol=0
    )
