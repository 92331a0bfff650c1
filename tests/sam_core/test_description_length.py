"""Description length against Gaussian integrals, hand-made roundings and brute force."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from sam_cases import make_batch, make_model
from sam_core.bounds import description_length_bits, measure_description_length


def distances(outputs, targets):
    return (outputs - targets).square().sum(-1)


def own_outputs():
    """A model and data at whose minimum, a loss of almost 0, it sits."""
    model, (inputs, _) = make_model(), make_batch()
    return model, (inputs, model(inputs).detach() + 0.01)


def squares(outputs, targets):
    return (outputs[:, 0] - targets).square()


def test_laplace_form_is_exact_for_least_squares():
    """There the evidence is a Gaussian integral: y ~ N(0, I + p² X X'), up to (2 pi)^(n/2), which is in the loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    p2, n = 0.7, 30
    hessian = x.T @ x / n  # of the mean of (y − x . w)²/2 + ln(2 pi)/2
    w = torch.linalg.solve(n * hessian + torch.eye(4) / p2, x.T @ y)  # the maximum of likelihood and prior together
    loss = ((y - x @ w).square() / 2).mean().item() + math.log(2 * math.pi) / 2
    evidence = MultivariateNormal(torch.zeros(n).double(), torch.eye(n).double() + p2 * x @ x.T).log_prob(y).item()
    bits = description_length_bits(
        torch.linalg.eigvalsh(hessian),
        n,
        train_loss=loss,
        distance_squared=w.square().sum().item(),
        prior_variance=p2,
    )
    assert bits == pytest.approx(-evidence / math.log(2), rel=1e-10)


def test_laplace_form_is_kl_plus_what_the_data_lose_under_the_posterior():
    eigenvalues, n, p2 = torch.tensor([3.0, 0.5, 0.0]).double(), 200, 0.3
    w = torch.tensor([0.2, -1.0, 0.4]).double()
    covariance = torch.diag(1 / (n * eigenvalues + 1 / p2))
    prior = MultivariateNormal(torch.zeros(3).double(), p2 * torch.eye(3).double())
    kl = kl_divergence(MultivariateNormal(w, covariance), prior).item()
    lost = n * (eigenvalues * covariance.diag()).sum().item() / 2
    bits = description_length_bits(eigenvalues, n, distance_squared=w.square().sum().item(), prior_variance=p2)
    assert bits == pytest.approx((kl + lost) / math.log(2), rel=1e-12)


def test_flat_directions_are_free_and_the_trace_gives_an_upper_end():
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.rand(20, generator=generator).double() ** 4
    bits = description_length_bits(eigenvalues, 1000)
    assert description_length_bits([0.0] * 20, 1000) == 0.0
    assert description_length_bits([*eigenvalues.tolist(), 0.0], 1000) == bits
    assert description_length_bits(eigenvalues[:5], 1000) < bits
    assert description_length_bits(torch.full_like(eigenvalues, eigenvalues.mean().item()), 1000) > bits
    assert description_length_bits(10 * eigenvalues, 1000) > bits


def rounded_by_hand(model, bits):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            low, high = param.min().item(), param.max().item()
            count = 2**bits
            levels = [low + (high - low) * k / (count - 1) for k in range(count)] if bits else [(low + high) / 2]
            nearest = [min(levels, key=lambda level, v=v: abs(level - v)) for v in param.flatten().tolist()]
            param.copy_(torch.tensor(nearest, dtype=torch.float64).view(param.shape))
    return model


@pytest.mark.parametrize("tolerance", [3.0, 0.3, 0.03, 1e-3, 1e-4])
def test_measured_form_against_brute_force(tolerance):
    model, (inputs, targets) = own_outputs()
    with torch.no_grad():
        loss = distances(model(inputs), targets).mean().item()
        rounded = [distances(rounded_by_hand(model, b)(inputs), targets).mean().item() for b in range(12)]
    expected = next(b for b, value in enumerate(rounded) if value - loss <= tolerance)
    actual = measure_description_length(model, distances, (inputs, targets), tolerance)
    assert actual.bits_per_weight == expected
    assert actual.total_bits == 39 * expected + 4 * 64
    assert actual.loss == pytest.approx(loss, rel=1e-12)
    assert actual.rounded_loss == pytest.approx(rounded[expected], rel=1e-12)


def test_fewest_bits_are_found_where_more_are_worse():
    """1/3 and 2/3 of the range are levels of 2 bits, and not of 3."""
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).double()
    data = torch.eye(4).double(), torch.arange(4.0).double()
    assert measure_description_length(model, squares, data, 1e-9).bits_per_weight == 2
    assert measure_description_length(model, squares, data, 10.0).bits_per_weight == 0  # the middle of the range


def test_constant_and_empty_tensors_need_no_bits():
    model = nn.Linear(3, 1).double()
    nn.init.constant_(model.weight, 0.1)
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    data = torch.ones(2, 3).double(), torch.zeros(2).double()
    actual = measure_description_length(model, squares, data, 0.0)
    assert (actual.bits_per_weight, actual.total_bits) == (0, 3 * 64)
    assert actual.rounded_loss == actual.loss


def test_only_given_parameters_are_rounded_and_everything_is_restored():
    model, (inputs, targets) = own_outputs()
    before = [p.detach().clone() for p in model.parameters()]
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    actual = measure_description_length(model, distances, batches, 0.01, params=[model[2].bias])
    assert actual.total_bits == 3 * actual.bits_per_weight + 64
    whole = measure_description_length(model, distances, (inputs, targets), 0.01, params=[model[2].bias])
    assert whole.bits_per_weight == actual.bits_per_weight
    assert whole.loss == pytest.approx(actual.loss, rel=1e-12)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        measure_description_length(model, lambda outputs, targets: 1 / 0, batches, 0.01)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_errors():
    model, data = own_outputs()
    with pytest.raises(ValueError, match=r"^hessian_eigenvalues must be finite and >= 0, got \[1\.0, -1\.0\]\.$"):
        description_length_bits([1.0, -1.0], 10)
    with pytest.raises(ValueError, match=r"^n_samples must be an integer >= 1, got 0\.$"):
        description_length_bits([1.0], 0)
    with pytest.raises(ValueError, match=r"^train_loss must be finite, got nan\.$"):
        description_length_bits([1.0], 10, train_loss=math.nan)
    with pytest.raises(ValueError, match=r"^distance_squared must be >= 0, got -1\.0\.$"):
        description_length_bits([1.0], 10, distance_squared=-1.0)
    with pytest.raises(ValueError, match=r"^prior_variance must be > 0, got 0\.0\.$"):
        description_length_bits([1.0], 10, prior_variance=0.0)
    with pytest.raises(ValueError, match=r"^tolerance must be >= 0, got -1\.0\.$"):
        measure_description_length(model, distances, data, -1.0)
    with pytest.raises(ValueError, match=r"^max_bits must be <= 52, got 53\.$"):
        measure_description_length(model, distances, data, 0.1, max_bits=53)
    message = r"^max_bits must be enough for a rise of at most tolerance = 0\.0, got 1, with which the loss rises by \d"
    with pytest.raises(ValueError, match=message):
        measure_description_length(model, distances, data, 0.0, max_bits=1)
    with pytest.raises(ValueError, match=r"^the mean loss must be finite, got inf\.$"):
        measure_description_length(model, lambda outputs, targets: outputs[:, 0].exp() / 0.0, data, 0.1)
    with pytest.raises(ValueError, match=r"^loss_fn must return one loss a sample, \[B\], got shape \[16, 3\]\.$"):
        measure_description_length(model, lambda outputs, targets: outputs, data, 0.1)
