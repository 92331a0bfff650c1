"""Budgets, top-k and precision-aware allocation against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arrcoc import PrecisionAwareAllocation
from arrcoc.model.allocation import keep_top, num_tokens_for_mass, num_tokens_of


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (3, 3), (8, 8), (0.5, 4), (0.0625, 0), (0.1875, 2), (1.0, 8)])
def test_budgets_in_tokens_and_shares(budget: float, expected: int) -> None:
    assert num_tokens_of(budget, 8) == expected  # Python's round: 0.5 -> 0, 1.5 -> 2


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (-1, r"budget must be in \[0, 8\] tokens, got -1"),
        (9, r"budget must be in \[0, 8\] tokens, got 9"),
        (0.0, r"budget must be a share in \(0, 1\], got 0.0"),
        (1.5, r"budget must be a share in \(0, 1\], got 1.5"),
        (float("nan"), r"budget must be a share in \(0, 1\], got nan"),
        (True, r"budget must be an int \(tokens\) or a float \(share\), got True"),
    ],
)
def test_bad_budgets(budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        num_tokens_of(budget, 8)


def test_numpy_numbers_are_numbers_and_shares_are_no_counts() -> None:
    assert num_tokens_of(np.int64(3), 8) == 3
    assert num_tokens_of(np.float64(0.5), 8) == 4
    with pytest.raises(ValueError, match=r"compute_budget must be an int, got 0\.5"):
        PrecisionAwareAllocation().compute_token_allocation(torch.zeros(4), 0.5)


def test_mass_takes_the_fewest_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.rand(12, generator=generator).double()
        for mass in (0.1, 0.5, 0.9, 1.0):
            num = num_tokens_for_mass(scores, mass)
            ranked = scores.sort(descending=True).values
            assert ranked[:num].sum() >= mass * scores.sum() * (1 - 1e-9)
            assert ranked[: num - 1].sum() < mass * scores.sum()
    assert num_tokens_for_mass(torch.tensor([0.5, 0.5, 0.0]), 1.0) == 2
    with pytest.raises(ValueError, match=r"mass must be in \(0, 1\], got 0"):
        num_tokens_for_mass(scores, 0)


def test_ties_keep_the_earlier_token() -> None:
    allocation = keep_top(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2)
    assert allocation.keep_indices.tolist() == [1, 2]
    assert allocation.weights.tolist() == [0, 1, 1, 0, 0]
    assert allocation.num_kept == 2


@pytest.mark.parametrize("budget", [0, 1, 5, 9])
def test_without_precision_it_is_top_k(budget: int) -> None:
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    chosen = PrecisionAwareAllocation().compute_token_allocation(scores, budget)
    assert chosen.sum(-1).tolist() == [budget] * 3
    for row, mask in zip(scores, chosen, strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == set(row.topk(budget).indices.tolist())


def test_negative_and_equal_scores_are_fine() -> None:
    allocate = PrecisionAwareAllocation().compute_token_allocation
    assert allocate(-torch.arange(1.0, 5.0), 2).tolist() == [1, 1, 0, 0]
    assert allocate(torch.zeros(4), 2).tolist() == [1, 1, 0, 0]


def test_precision_from_draws_is_inverse_variance() -> None:
    scores = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    draws = scores + torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([0.1, 1, 2])
    precision = PrecisionAwareAllocation().precision(scores, perturbed_scores=draws)
    assert precision is not None
    expected = torch.stack([scores.var(correction=0) / draws[:, i].var() for i in range(3)])
    torch.testing.assert_close(precision, expected, rtol=1e-3, atol=0)


def test_precision_from_neighbours_is_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, tokens = torch.rand(20, generator=generator).double(), torch.randn(20, 6, generator=generator).double()
    precision = PrecisionAwareAllocation().precision(scores, tokens=tokens)
    assert precision is not None
    for i in range(20):
        cosine = [float(torch.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in range(20)]
        nearest = sorted(range(20), key=lambda j: -cosine[j])[:9]
        variance = scores[nearest].var(correction=0)
        torch.testing.assert_close(precision[i], scores.var(correction=0) / variance, rtol=1e-4, atol=0)


def test_overconfident_tokens_lose_a_near_tie() -> None:
    scores = torch.tensor([1.00, 0.99, 0.0, -1.0])
    steady, shaky = torch.zeros(32), torch.linspace(-2, 2, 32)
    draws = scores + torch.stack([steady, shaky, steady, steady], dim=1)  # token 0 never moves: overconfident
    allocate = PrecisionAwareAllocation().compute_token_allocation
    assert allocate(scores, 1).tolist() == [1, 0, 0, 0]
    assert allocate(scores, 1, perturbed_scores=draws).tolist() == [0, 1, 0, 0]
    # A target above every precision penalises nothing.
    lenient = PrecisionAwareAllocation(1e9)
    assert lenient.compute_token_allocation(scores, 1, perturbed_scores=draws).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relevance_scores": torch.tensor([1.0, torch.nan]), "compute_budget": 1}, "relevance_scores must be finite"),
        ({"relevance_scores": torch.zeros(1, 2, 3), "compute_budget": 1}, r"must have shape \[N\] or \[B, N\]"),
        ({"relevance_scores": torch.zeros(4), "compute_budget": 5}, r"budget must be in \[0, 4\] tokens, got 5"),
        (
            {"relevance_scores": torch.zeros(4), "compute_budget": 1, "tokens": torch.zeros(3, 2)},
            r"tokens must have shape \[4, D\], got \[3, 2\]",
        ),
        (
            {"relevance_scores": torch.zeros(4), "compute_budget": 1, "perturbed_scores": torch.zeros(1, 4)},
            r"perturbed_scores must have shape \[R >= 2, 4\], got \[1, 4\]",
        ),
    ],
)
def test_bad_allocation_input(arguments: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionAwareAllocation().compute_token_allocation(**arguments)


def test_bad_target() -> None:
    with pytest.raises(ValueError, match="target_precision must be"):
        PrecisionAwareAllocation(0.0)
