"""The flatness form on a Gaussian example whose risks, squares and gradients are known in closed form.

Weights w ~ Q = N(m, s² I_d), samples z ~ N(0, t² I_d), loss l(w, z) = 1 − exp(−a ||w − z||² / 2) in [0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.distributions import Binomial

from sam_core.bounds import flatness_bound, isotropic_gaussian_kl, population_flatness_bound, seeger_bound


def gaussian_mean(squares, variance, d, a):
    """E exp(−a ||x||²/2) and E ||x||² exp(−a ||x||²/2) for x ~ N(c, v I_d), squares = ||c||²."""
    shrink = 1 + a * variance
    mass = shrink ** (-d / 2) * torch.exp(-a * squares / (2 * shrink))
    return mass, mass * (d * variance / shrink + squares / shrink**2)


@dataclass(frozen=True)
class Example:
    a: float = 0.2
    d: int = 3
    t: float = 0.5
    s: float = 0.3
    prior: float = 0.5

    def sample(self, num_samples, generator):
        return self.t * torch.randn(num_samples, self.d, generator=generator, dtype=torch.float64)

    def of_samples(self, mean, z):
        """L̂, S and G on the samples; G from grad l = a (w − z) exp(−a ||w − z||²/2)."""
        squares = (mean - z).square().sum(-1)
        losses = 1 - gaussian_mean(squares, self.s**2, self.d, self.a)[0]
        gradients = self.a**2 * gaussian_mean(squares, self.s**2, self.d, 2 * self.a)[1]
        return losses.mean().item(), losses.square().mean().item(), gradients.mean().item()

    def of_distribution(self, mean):
        """L and G over the distribution: w − z ~ N(m, (s² + t²) I)."""
        squares, variance = mean.square().sum(), self.s**2 + self.t**2
        risk = 1 - gaussian_mean(squares, variance, self.d, self.a)[0]
        return risk.item(), (self.a**2 * gaussian_mean(squares, variance, self.d, 2 * self.a)[1]).item()

    def kl(self, mean):
        return isotropic_gaussian_kl(mean.square().sum().item(), self.d, self.s**2, self.prior**2)


def test_closed_forms_against_autograd_and_draws():
    example, generator = Example(), torch.Generator().manual_seed(0)
    mean, z = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([[0.5, 0.0, -0.4]]).double()
    w = mean + example.s * torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    w.requires_grad_()
    losses = 1 - torch.exp(-example.a * (w - z).square().sum(-1) / 2)
    (gradients,) = torch.autograd.grad(losses.sum(), w)
    risk, squared, gradient = example.of_samples(mean, z)
    assert risk == pytest.approx(losses.mean().item(), rel=5e-3)
    assert squared == pytest.approx(losses.mean().item() ** 2, rel=1e-2)
    assert gradient == pytest.approx(gradients.square().sum(-1).mean().item(), rel=5e-3)
    with torch.no_grad():
        far = w - example.sample(400_000, generator)
        expected = (1 - torch.exp(-example.a * far.square().sum(-1) / 2)).mean().item()
    assert example.of_distribution(mean)[0] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("s", [0.1, 1.0, 3.0])
def test_poincare_constant_of_a_gaussian_is_its_variance(s):
    """Var l <= s² E ||grad l||², nearly an equality where s is small; with 1/s² it fails where s is large."""
    example, mean = Example(s=s), torch.tensor([0.3, -0.2, 0.1]).double()
    z = example.sample(200, torch.Generator().manual_seed(0))
    squares = (mean - z).square().sum(-1)
    first, second = (gaussian_mean(squares, s**2, 3, a)[0] for a in (example.a, 2 * example.a))
    gradients = example.a**2 * gaussian_mean(squares, s**2, 3, 2 * example.a)[1]
    assert bool((second - first.square() <= s**2 * gradients).all())
    if s < 1:  # nearly linear
        assert (second - first.square()).sum().item() > 0.9 * (s**2 * gradients).sum().item()
    if s > 1:
        assert not bool((second - first.square() <= gradients / s**2).any())


@pytest.mark.parametrize("num_samples", [20, 200])
def test_bounds_fail_at_most_delta_of_the_time(num_samples):
    """Posteriors at the minimiser of the samples, as training finds it. Leaving the terms out is caught."""
    example, generator, delta = Example(), torch.Generator().manual_seed(0), 0.2
    failures = {"flatness": 0, "population": 0, "no terms": 0}
    num_runs = 300
    for _ in range(num_runs):
        z = example.sample(num_samples, generator)
        mean = z.mean(0)
        risk, squared, gradient = example.of_samples(mean, z)
        true_risk, true_gradient = example.of_distribution(mean)
        kl, c_p = example.kl(mean), example.s**2
        bounds = {
            "flatness": flatness_bound(risk, squared, gradient, c_p, kl, num_samples, delta),
            "population": population_flatness_bound(risk, true_gradient, c_p, kl, num_samples, delta),
            "no terms": risk,
        }
        for name, bound in bounds.items():
            failures[name] += true_risk > bound
    most = int(num_runs * delta + 3 * Binomial(num_runs, torch.tensor(delta)).stddev)
    assert failures["flatness"] <= most
    assert failures["population"] <= most
    assert failures["no terms"] > most


def test_exponential_inequality_that_the_bound_rests_on():
    """E exp(λ (L − l) − λ² θ l²) <= 1 for every l in [0, 1]: it is enough to look at exp(−λl − λ²θl²) <= 1 − λl."""
    losses = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for lam in (0.001, 0.1, 0.5, 0.9):
        theta = (-math.log1p(-lam) - lam) / lam**2
        assert bool((torch.exp(-lam * losses - lam**2 * theta * losses**2) <= (1 - lam * losses) * (1 + 1e-14)).all())
        smaller = theta * 0.99
        assert not bool((torch.exp(-lam * losses - lam**2 * smaller * losses**2) <= 1 - lam * losses).all())


def test_bound_by_hand():
    """One λ = 1/2: λθ = 2 (ln 2 − 1/2)."""
    kl, second_moment = 3.0, 0.04 + 0.01 * 2.0
    expected = 0.1 + (kl + math.log(20)) / (0.5 * 100) + 2 * (math.log(2) - 0.5) * second_moment
    assert flatness_bound(0.1, 0.04, 2.0, 0.01, kl, 100, lambdas=[0.5]) == pytest.approx(expected, rel=1e-12)
    expected = (0.1 + (kl + math.log(20)) / (0.5 * 100) + 0.25 * 0.02) / (1 - 0.25)
    assert population_flatness_bound(0.1, 2.0, 0.01, kl, 100, lambdas=[0.5]) == pytest.approx(expected, rel=1e-12)
    # Two values of λ cost ln 2.
    dearer = flatness_bound(0.1, 0.04, 2.0, 0.01, kl + math.log(2), 100, lambdas=[0.5])
    assert flatness_bound(0.1, 0.04, 2.0, 0.01, kl, 100, lambdas=[0.5, 0.5]) == pytest.approx(dearer, rel=1e-12)


def test_values_of_lambda_by_default():
    """1/2 to 1/1024; of the population form 1/C to 1/512C, so that every C has some."""
    settings = {"empirical_risk": 0.1, "mean_squared_gradient": 2.0, "poincare_constant": 0.01, "kl": 3.0}
    settings |= {"num_samples": 100}
    halves = [2.0**-k for k in range(1, 11)]
    assert flatness_bound(**settings, mean_squared_risk=0.04) == flatness_bound(
        **settings, mean_squared_risk=0.04, lambdas=halves
    )
    for c in (0.1, 40.0):
        scaled = population_flatness_bound(**settings, self_bounding=c, lambdas=[2 * half / c for half in halves])
        assert population_flatness_bound(**settings, self_bounding=c) == pytest.approx(scaled, rel=1e-12)


def test_flat_minima_and_even_losses_beat_the_bound_that_knows_the_risk_alone():
    """The gradient pays off where losses are even, S near L̂²; where they are 0 or 1, S = L̂ and it cannot."""
    even = flatness_bound(0.2, 0.041, 0.01, 0.01, 20.0, 10_000)
    uneven = flatness_bound(0.2, 0.2, 0.01, 0.01, 20.0, 10_000)
    assert even < seeger_bound(0.2, 20.0, 10_000) < uneven
    assert even < flatness_bound(0.2, 0.041, 1.0, 0.01, 20.0, 10_000)
    assert even < flatness_bound(0.2, 0.041, 0.01, 1.0, 20.0, 10_000)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("empirical_risk", 1.5, r"must be in \[0, 1\], got 1\.5"),
        ("mean_squared_risk", 0.001, r"must be in \[empirical_risk², empirical_risk\] = \[0\.01\d*, 0\.1\], got .*"),
        ("mean_squared_gradient", -1.0, r"must be >= 0, got -1\.0"),
        ("poincare_constant", -1.0, r"must be >= 0, got -1\.0"),
        ("kl", math.nan, "must be finite, got nan"),
        ("num_samples", 0, "must be an integer >= 1, got 0"),
        ("delta", 1.0, r"must be in \(0, 1\), got 1\.0"),
        ("lambdas", (0.5, 1.0), r"must be numbers in \(0, 1\), at least one, got \(0\.5, 1\.0\)"),
        ("lambdas", (), r"must be numbers in \(0, 1\), at least one, got \(\)"),
    ],
)
def test_errors(option, value, rule):
    settings = {"empirical_risk": 0.1, "mean_squared_risk": 0.05, "mean_squared_gradient": 1.0}
    settings |= {"poincare_constant": 0.01, "kl": 1.0, "num_samples": 10}
    with pytest.raises(ValueError, match=rf"^{option} {rule}\.$"):
        flatness_bound(**{**settings, option: value})


def test_errors_of_the_population_form():
    with pytest.raises(ValueError, match=r"^self_bounding must be > 0, got 0\.0\.$"):
        population_flatness_bound(0.1, 1.0, 0.01, 1.0, 10, self_bounding=0.0)
    with pytest.raises(ValueError, match=r"^lambdas must be numbers in \(0, 0\.5\), at least one, got \[1\.0\]\.$"):
        population_flatness_bound(0.1, 1.0, 0.01, 1.0, 10, self_bounding=4.0, lambdas=[1.0])
    with pytest.raises(ValueError, match=r"^empirical_risk must be >= 0, got -0\.1\.$"):
        population_flatness_bound(-0.1, 1.0, 0.01, 1.0, 10)
    assert population_flatness_bound(3.0, 1.0, 0.01, 1.0, 10, self_bounding=0.1) > 3.0  # unbounded losses are allowed
