"""Metrics against scikit-learn, brute force over tie-breakings, and values known by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.testing import assert_close

from arrcoc.evaluation import metrics


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RANKED = {
    "random": (_random(196), _random(196, seed=1) > 0.8),
    "ties": ((_random(196) * 5).floor(), _random(196, seed=1) > 0.8),
    "constant": (torch.full((50,), 0.3), torch.arange(50) < 7),
    "perfect": (torch.arange(20.0), torch.arange(20) >= 15),
    "worst": (torch.arange(20.0), torch.arange(20) < 5),
    "one positive, tied at the top": (torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([False, True, False, False])),
    "signed logits": (_random(60) * 40 - 20, _random(60, seed=2) > 0.5),
    "infinite": (torch.tensor([-torch.inf, 0.0, torch.inf, 1.0]), torch.tensor([False, True, True, False])),
}


def test_average_precision_equals_scikit_learn() -> None:
    for name, (scores, labels) in RANKED.items():
        finite = scores.nan_to_num(posinf=1e9, neginf=-1e9)
        expected = average_precision_score(labels.numpy(), finite.numpy())
        assert metrics.average_precision(scores, labels).item() == pytest.approx(expected, abs=1e-12), name
    assert metrics.average_precision(*RANKED["constant"]).item() == pytest.approx(7 / 50, abs=1e-12)


def test_auroc_equals_scikit_learn() -> None:
    for name, (scores, labels) in RANKED.items():
        finite = scores.nan_to_num(posinf=1e9, neginf=-1e9)
        expected = roc_auc_score(labels.numpy(), finite.numpy())
        assert metrics.auroc(scores, labels).item() == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("metric", [metrics.average_precision, metrics.auroc])
def test_rank_metrics_are_undefined_without_positives_and_ignore_order_and_scale(metric) -> None:
    scores, labels = RANKED["ties"]
    assert metric(scores, torch.zeros(196, dtype=torch.bool)).isnan()
    order = torch.randperm(196, generator=torch.Generator().manual_seed(3))
    assert_close(metric(scores[order], labels[order]), metric(scores, labels), rtol=0, atol=1e-12)
    assert_close(metric(3 * scores - 7, labels), metric(scores, labels), rtol=0, atol=1e-12)
    assert metrics.auroc(scores, torch.ones(196, dtype=torch.bool)).isnan()


def test_metrics_batch_over_leading_axes() -> None:
    scores, coverage = (_random(2, 3, 30) * 6).floor(), _random(2, 3, 30, seed=1)
    labels = metrics.token_labels(coverage, threshold=0.7)
    functions = {
        "ap": lambda i: metrics.average_precision(scores[i], labels[i]),
        "auroc": lambda i: metrics.auroc(scores[i], labels[i]),
        "hit": lambda i: metrics.pointing_hit(scores[i], coverage[i]),
        "recall": lambda i: metrics.recall_at_budget(scores[i], coverage[i], 7),
        "overlap": lambda i: metrics.top_k_overlap(scores[i], coverage[i], 7),
    }
    for name, function in functions.items():
        for index in itertools.product(range(2), range(3)):
            assert_close(function(...)[index], function(index), rtol=0, atol=1e-12, msg=name)


def test_labels_are_the_half_covered_tokens_or_else_the_best_covered() -> None:
    coverage = torch.tensor([[0.6, 0.5, 0.1, 1.0], [0.2, 0.5, 0.1, 0.5], [0.0, 0.0, 0.0, 0.0]])
    expected = [[True, False, False, True], [False, True, False, True], [False] * 4]
    assert metrics.token_labels(coverage).tolist() == expected


def _expected_over_tie_breakings(scores: Tensor, value) -> float:
    """Mean of value(order) over all orders of the tokens that sort the scores downwards."""
    orders = [
        order for order in itertools.permutations(range(len(scores))) if (scores[list(order)].diff() <= 0).all().item()
    ]
    return sum(value(list(order)) for order in orders) / len(orders)


@pytest.mark.parametrize("scores", [[2, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 3, 3, 2, 2], [5, 4, 3, 2, 1]])
def test_ties_give_the_expected_value_over_random_tie_breaking(scores: list[int]) -> None:
    scores = torch.tensor(scores, dtype=torch.float32)
    coverage = torch.tensor([0.9, 0.1, 0.4, 0.0, 0.6])
    hit = _expected_over_tie_breakings(scores, lambda order: float(coverage[order[0]] > 0.25))
    assert metrics.pointing_hit(scores, coverage).item() == pytest.approx(hit, abs=1e-7)
    for k in range(6):
        recall = _expected_over_tie_breakings(scores, lambda order, k=k: (coverage[order[:k]].sum() / 2).item())
        assert metrics.recall_at_budget(scores, coverage, k).item() == pytest.approx(recall, abs=1e-7)


def test_recall_counts_the_objects_area_in_the_budget() -> None:
    scores, coverage = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.5, 0.0, 1.0, 0.5])
    assert metrics.recall_at_budget(scores, coverage, 2).item() == 0.25
    assert metrics.recall_at_budget(scores, coverage, 0.75).item() == 0.75
    assert metrics.recall_at_budget(scores, coverage, 1.0).item() == 1.0
    assert metrics.recall_at_budget(scores, coverage, 0).item() == 0.0
    assert metrics.recall_at_budget(scores, torch.zeros(4), 2).isnan()
    assert metrics.pointing_hit(scores, torch.zeros(4)).isnan()


def test_budgets_out_of_range_are_refused() -> None:
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match=r"budget must be in \[0, 4\] tokens, got 5\."):
        metrics.recall_at_budget(scores, scores, 5)
    with pytest.raises(ValueError, match=r"budget must be a share in \(0, 1\], got 1\.5\."):
        metrics.top_k_overlap(scores, scores, 1.5)


def test_overlap_is_one_with_itself_and_chance_with_a_constant_map() -> None:
    scores, constant = _random(40), torch.full((40,), 0.5)
    assert metrics.top_k_overlap(scores, scores, 10).item() == 1
    assert metrics.top_k_overlap(constant, constant, 10).item() == pytest.approx(1)
    assert metrics.top_k_overlap(scores, constant, 0.25).item() == pytest.approx(0.25)
    assert metrics.top_k_overlap(scores, -scores, 20).item() == 0
    shifted = torch.arange(40.0), (torch.arange(40.0) + 4) % 40
    assert metrics.top_k_overlap(*shifted, 10).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"k must keep at least one of the 40 tokens, got 0\."):
        metrics.top_k_overlap(scores, constant, 0)


def test_calibration_error_equals_scikit_learn_on_hard_labels() -> None:
    predicted = _random(3000).square()
    target = (_random(3000, seed=1) < predicted.sqrt()).double()
    truth, mean = calibration_curve(target.numpy(), predicted.numpy(), n_bins=10, strategy="uniform")
    share = np.histogram(predicted.numpy(), bins=10, range=(0, 1))[0] / 3000
    expected = (share[share > 0] * np.abs(truth - mean)).sum()
    assert metrics.expected_calibration_error(predicted, target).item() == pytest.approx(expected, abs=1e-12)


def test_calibration_error_on_soft_targets() -> None:
    coverage = _random(14, 14)
    assert metrics.expected_calibration_error(coverage, coverage).item() == 0
    constant = torch.full_like(coverage, coverage.mean().item())
    assert metrics.expected_calibration_error(constant, coverage).item() == pytest.approx(0, abs=1e-12)
    ends = torch.tensor([0.0, 1.0])
    assert metrics.expected_calibration_error(ends, 1 - ends).item() == 1
    assert metrics.expected_calibration_error(torch.empty(0), torch.empty(0)).isnan()


def test_calibration_error_refuses_what_is_not_relevance() -> None:
    with pytest.raises(ValueError, match=r"predicted must be in \[0, 1\], got values from -0.5 to 2\."):
        metrics.expected_calibration_error(torch.tensor([-0.5, 2.0]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"target must be in \[0, 1\], got values from 0 to 3\."):
        metrics.expected_calibration_error(torch.zeros(2), torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match=r"must have one shape, got \[2\] and \[3\]\."):
        metrics.expected_calibration_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"num_bins must be >= 1, got 0\."):
        metrics.expected_calibration_error(torch.zeros(2), torch.zeros(2), num_bins=0)


def test_paired_difference_against_a_loop() -> None:
    scores, labels = _random(4, 30), metrics.token_labels(_random(4, 30, seed=1), 0.7)
    labels[2] = False  # an absent query: neither measured nor another's rival
    present = [0, 1, 3]
    for i, difference in enumerate(metrics.paired_difference(scores, labels).tolist()):
        if i not in present:
            assert math.isnan(difference)
            continue
        own, *others = (average_precision_score(labels[i], scores[j]) for j in [i, *(j for j in present if j != i)])
        assert difference == pytest.approx(own - np.mean(others), abs=1e-12)


def test_paired_difference_of_a_map_that_ignores_the_text_is_zero_and_of_an_only_query_undefined() -> None:
    labels = metrics.token_labels(_random(3, 30, seed=1), 0.7)
    assert_close(metrics.paired_difference(_random(30).expand(3, 30), labels), torch.zeros(3).double())
    assert metrics.paired_difference(_random(1, 30), labels[:1]).isnan().all()
    assert metrics.paired_difference(_random(0, 30), labels[:0]).shape == (0,)


def test_bootstrap_interval_is_that_of_the_normal_law_for_many_pictures() -> None:
    values = _random(400, 2)  # two queries a picture, independent
    low, high = metrics.bootstrap_interval(
        values.sum(1), torch.full((400,), 2), generator=torch.Generator().manual_seed(0)
    )
    half_width = 1.96 * (1 / 12 / 800) ** 0.5
    assert low == pytest.approx(values.mean().item() - half_width, abs=0.15 * half_width)
    assert high == pytest.approx(values.mean().item() + half_width, abs=0.15 * half_width)


def test_bootstrap_interval_resamples_pictures_not_queries() -> None:
    values = _random(400, 1).expand(400, 9)  # nine queries that agree are one piece of evidence
    intervals = [
        metrics.bootstrap_interval(
            values[:, :n].sum(1), torch.full((400,), n), generator=torch.Generator().manual_seed(0)
        )
        for n in (1, 9)
    ]
    assert intervals[1] == pytest.approx(intervals[0], abs=1e-12)
    empty = metrics.bootstrap_interval(torch.zeros(3), torch.zeros(3), generator=torch.Generator())
    assert all(map(math.isnan, empty))


def test_malformed_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores must not contain NaN\."):
        metrics.average_precision(torch.tensor([0.1, math.nan]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"same number of tokens, got \[3\] and \[2\]\."):
        metrics.recall_at_budget(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"scores must have shape \[\.\.\., N\] with at least one token, got \[0\]\."):
        metrics.auroc(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"coverage must have shape \[\.\.\., N\]"):
        metrics.token_labels(torch.zeros(()))
