"""Divergences and PAC-Bayes bounds against exact arithmetic, torch.distributions, brute force and simulation."""

from __future__ import annotations

import math
import random

import mpmath
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from sam_core.bounds import (
    VacuousBoundWarning,
    binary_kl,
    binary_kl_inverse,
    binary_kl_inverse_lower,
    catoni_bound,
    compute_pac_bayes_bound,
    diagonal_gaussian_kl,
    isotropic_gaussian_kl,
    lambda_bound,
    mcallester_bound,
    quadratic_bound,
    seeger_bound,
)


def true_binary_kl(q, p):
    with mpmath.workdps(400):
        q, p = mpmath.mpf(q), mpmath.mpf(p)
        first = q * mpmath.log(q / p) if q > 0 else mpmath.mpf(0)
        second = (1 - q) * mpmath.log((1 - q) / (1 - p)) if q < 1 else mpmath.mpf(0)
        return first + second


def random_probability(rng):
    kind = rng.randrange(4)
    if kind == 0:
        return rng.random()
    if kind == 1:
        return 10 ** rng.uniform(-100, 0)
    if kind == 2:
        return 1 - 10 ** rng.uniform(-15, 0)
    return rng.choice([0.0, 0.5, 1.0])


def test_binary_kl_against_exact_arithmetic():
    rng = random.Random(0)
    for _ in range(1500):
        q = random_probability(rng)
        p = rng.choice([random_probability(rng), q * (1 + rng.choice([-1, 1]) * 10 ** rng.uniform(-15, 0))])
        if 0 < p < 1 and p != q:
            expected = true_binary_kl(q, p)
            assert abs(binary_kl(q, p) - expected) <= 1e-13 * expected, (q, p)


def test_binary_kl_at_the_ends():
    assert binary_kl(0.3, 0.3) == binary_kl(0.0, 0.0) == binary_kl(1.0, 1.0) == 0.0
    assert binary_kl(0.3, 0.0) == binary_kl(0.3, 1.0) == binary_kl(0.0, 1.0) == binary_kl(1.0, 0.0) == math.inf
    assert binary_kl(0.0, 0.25) == pytest.approx(math.log(4 / 3), rel=1e-15)
    assert binary_kl(1.0, 0.25) == pytest.approx(math.log(4), rel=1e-15)


def test_inverses_are_never_inside_the_true_interval_and_hardly_outside():
    rng = random.Random(1)
    for _ in range(300):
        q, c = random_probability(rng), 10 ** rng.uniform(-25, 1.5)
        for end, p in ((1.0, binary_kl_inverse(q, c)), (0.0, binary_kl_inverse_lower(q, c))):
            assert min(q, end) <= p <= max(q, end)
            if p != end:
                assert true_binary_kl(q, p) >= c, (q, c, end)
            inner = math.nextafter(math.nextafter(p - (p - q) * 1e-11, q), q)
            if inner not in (q, end):
                assert true_binary_kl(q, inner) <= c, (q, c, end)


def test_inverse_where_the_classic_midpoint_is_too_low():
    """The middle of a bracket of 1e-6, as is often seen, falls short of the true inverse in half of all cases."""

    def midpoint(q, c):
        low, high = q, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if binary_kl(q, middle) <= c else (low, middle)
        return (low + high) / 2

    cases = [(q / 50, c / 50) for q in range(1, 25) for c in range(1, 20)]
    assert sum(true_binary_kl(q, midpoint(q, c)) < c for q, c in cases) > 100
    assert all(true_binary_kl(q, binary_kl_inverse(q, c)) >= c for q, c in cases)


@pytest.mark.parametrize("c", [1e-300, 1e-17, 1e-3, 1.0, 30.0])
def test_inverse_at_the_ends(c):
    assert binary_kl_inverse(0.0, c) == pytest.approx(-math.expm1(-c), rel=1e-11)
    assert binary_kl_inverse(0.0, c) >= -math.expm1(-c)
    assert binary_kl_inverse_lower(1.0, c) == pytest.approx(math.exp(-c), rel=1e-11)
    assert binary_kl_inverse_lower(1.0, c) <= math.exp(-c)
    assert binary_kl_inverse(1.0, c) == 1.0
    assert binary_kl_inverse_lower(0.0, c) == 0.0


@pytest.mark.parametrize("q", [0.0, 1e-9, 0.3, 1.0])
def test_inverse_of_nothing_and_of_everything(q):
    assert binary_kl_inverse(q, 0) == binary_kl_inverse_lower(q, 0.0) == q
    assert binary_kl_inverse(q, math.inf) == 1.0
    assert binary_kl_inverse_lower(q, math.inf) == 0.0


def test_gaussian_kl_against_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1.0, 1e4):
        mean, prior_mean = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) * scale
        variance, prior_variance = torch.rand(2, 6, 5, generator=generator, dtype=torch.float64) * scale + 1e-3
        posterior = Independent(Normal(mean, variance.sqrt()), 2)
        expected = kl_divergence(posterior, Independent(Normal(prior_mean, prior_variance.sqrt()), 2)).item()
        assert diagonal_gaussian_kl(mean, variance, prior_mean, prior_variance) == pytest.approx(expected, rel=1e-12)

        s2, p2 = variance[0, 0], prior_variance[0, 0]
        posterior = Independent(Normal(mean, s2.sqrt().expand(6, 5)), 2)
        expected = kl_divergence(posterior, Independent(Normal(prior_mean, p2.sqrt().expand(6, 5)), 2)).item()
        distance = (mean - prior_mean).square().sum().item()
        assert isotropic_gaussian_kl(distance, 30, s2.item(), p2.item()) == pytest.approx(expected, rel=1e-12)
        assert diagonal_gaussian_kl(mean, s2, prior_mean, p2) == pytest.approx(expected, rel=1e-12)
    assert isotropic_gaussian_kl(0.0, 10**9, 0.1 + 0.2, 0.3) >= 0


def test_order_of_the_bounds_on_random_cases():
    rng = random.Random(2)
    for _ in range(3000):
        risk = rng.choice([0.0, 1.0, rng.random(), 10 ** rng.uniform(-8, 0)])
        kl, n, delta = 10 ** rng.uniform(-3, 5), int(10 ** rng.uniform(0, 7)), 10 ** rng.uniform(-6, -0.01)
        seeger = seeger_bound(risk, kl, n, delta)
        quadratic = quadratic_bound(risk, kl, n, delta)
        best = lambda_bound(risk, kl, n, delta)
        assert risk <= seeger <= 1
        assert seeger <= mcallester_bound(risk, kl, n, delta) * (1 + 1e-10)
        assert seeger <= quadratic * (1 + 1e-10)
        assert best == pytest.approx(quadratic, rel=1e-9)
        assert best <= lambda_bound(risk, kl, n, delta, lam=rng.uniform(0.01, 1.99)) * (1 + 1e-10)
        # Catoni's family is a set of tangents to kl^-1 with ln(1/delta), the best of which touches it.
        tangent = catoni_bound(risk, kl, n, delta, inverse_temperature=10 ** rng.uniform(-2, 2))
        assert binary_kl_inverse(risk, (kl + math.log(1 / delta)) / n) <= tangent * (1 + 1e-10)


def test_constant_of_maurer():
    """The mean of exp(n kl(k/n || L)) over binomial k does not depend on L, and is at most 2 sqrt(n) for n < 8 too."""
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 100):
        for risk in (0.3, 0.8):
            chances = [math.comb(n, k) * risk**k * (1 - risk) ** (n - k) for k in range(n + 1)]
            moment = sum(p * math.exp(n * binary_kl(k / n, risk)) for k, p in enumerate(chances))
            assert math.sqrt(n) <= moment <= 2 * math.sqrt(n) * (1 + 1e-12)


def test_best_catoni_bound_is_the_inverse():
    exponents = torch.linspace(-3, 3, 20001, dtype=torch.float64)
    best = min(catoni_bound(0.1, 20.0, 500, inverse_temperature=10**e) for e in exponents.tolist())
    assert best == pytest.approx(binary_kl_inverse(0.1, (20 + math.log(20)) / 500), rel=1e-6)


def test_bounds_by_hand():
    """At n = 4 and delta = 0.1, ln(2 sqrt(n) / delta) = ln 40."""
    c = (1.5 + math.log(40)) / 4
    assert mcallester_bound(0.2, 1.5, 4, 0.1) == pytest.approx(0.2 + math.sqrt(c / 2), rel=1e-14)
    assert quadratic_bound(0.0, 1.5, 4, 0.1) == pytest.approx(2 * c, rel=1e-14)
    assert seeger_bound(0.0, 1.5, 4, 0.1) == pytest.approx(1 - math.exp(-c), rel=1e-11)
    assert lambda_bound(0.2, 1.5, 4, 0.1, lam=1.0) == pytest.approx(0.4 + 2 * c, rel=1e-14)
    expected = (1 - math.exp(-0.4 - (1.5 + math.log(10)) / 4)) / (1 - math.exp(-2))
    assert catoni_bound(0.2, 1.5, 4, 0.1, inverse_temperature=2.0) == pytest.approx(expected, rel=1e-14)


@pytest.mark.filterwarnings("ignore::sam_core.bounds.VacuousBoundWarning")
def test_curvature_bound_against_brute_force():
    rng = random.Random(3)
    for _ in range(60):
        loss, trace = rng.random(), rng.choice([0.0, 10 ** rng.uniform(-3, 6)])
        n, d = int(10 ** rng.uniform(0, 6)), int(10 ** rng.uniform(0, 7))
        p2, distance = 10 ** rng.uniform(-4, 4), rng.choice([0.0, 10 ** rng.uniform(-3, 4)])
        low, high = -25.0, 3.0
        for _ in range(2):
            exponents = torch.linspace(low, high, 100_001, dtype=torch.float64)
            s2 = p2 * 10**exponents
            kl = (d * s2 / p2 + distance / p2 - d + d * (p2 / s2).log()) / 2
            values = loss + s2 * trace / 2 + ((kl.clamp(min=0) + math.log(2 * math.sqrt(n) / 0.1)) / (2 * n)).sqrt()
            best = exponents[values.argmin()].item()
            low, high = best - 1e-3, best + 1e-3
        actual = compute_pac_bayes_bound(loss, trace, n, d, p2, 0.1, distance_squared=distance)
        assert actual == pytest.approx(values.min().item(), rel=1e-6)


def test_curvature_bound_without_curvature_is_that_of_the_prior():
    expected = mcallester_bound(0.1, 2.0, 1000)
    assert compute_pac_bayes_bound(0.1, 0.0, 1000, 50, distance_squared=4.0) == pytest.approx(expected, rel=1e-12)


def test_curvature_bound_grows_with_curvature_distance_and_parameters():
    def bound(**options):
        settings = {"train_loss": 0.05, "hessian_trace": 10.0, "n_samples": 10**4, "n_params": 100, **options}
        return compute_pac_bayes_bound(**settings)

    assert bound() < bound(hessian_trace=100.0)
    assert bound() < bound(distance_squared=10.0)
    assert bound() < bound(n_params=200)
    assert bound() < bound(delta=0.01)
    assert bound() > bound(n_samples=10**5)


def test_vacuous_bound_is_told():
    with pytest.warns(VacuousBoundWarning, match=r"^The risk bound is 4: vacuous, for no risk exceeds 1\.$"):
        assert compute_pac_bayes_bound(0.5, 100.0, 100, 1000) >= 1


def refused(function, message, *arguments, **options):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_errors():
    one = torch.ones(2)
    refused(binary_kl, r"^q must be in \[0, 1\], got 1\.1\.$", 1.1, 0.5)
    refused(binary_kl, r"^p must be in \[0, 1\], got -0\.1\.$", 0.5, -0.1)
    refused(binary_kl_inverse, r"^q must be finite, got nan\.$", math.nan, 0.5)
    refused(binary_kl_inverse, r"^c must be a number >= 0, got -1\.$", 0.5, -1)
    refused(binary_kl_inverse_lower, r"^c must be a number >= 0, got nan\.$", 0.5, math.nan)
    refused(isotropic_gaussian_kl, r"^distance_squared must be >= 0, got -1\.0\.$", -1.0, 2, 1.0, 1.0)
    refused(isotropic_gaussian_kl, r"^posterior_variance must be > 0, got 0\.0\.$", 1.0, 2, 0.0, 1.0)
    refused(isotropic_gaussian_kl, r"^prior_variance must be > 0, got -1\.0\.$", 1.0, 2, 1.0, -1.0)
    refused(diagonal_gaussian_kl, r"^variance must be finite and > 0 everywhere, got ", one, one - 1, one, one)
    refused(diagonal_gaussian_kl, r"^prior_variance must be finite and > 0 everywhere", one, one, one, one * math.nan)
    message = r"must fit mean \[2\], got variance \[3\], prior_mean \[2\], prior_variance \[2\]\.$"
    refused(diagonal_gaussian_kl, message, one, torch.ones(3), one, one)
    for bound in (seeger_bound, mcallester_bound, quadratic_bound, lambda_bound):
        refused(bound, r"^empirical_risk must be in \[0, 1\], got 1\.5\.$", 1.5, 1.0, 10)
        refused(bound, r"^kl must be >= 0, got -1\.0\.$", 0.5, -1.0, 10)
        refused(bound, r"^num_samples must be an integer >= 1, got 0\.$", 0.5, 1.0, 0)
        refused(bound, r"^delta must be in \(0, 1\), got 1\.0\.$", 0.5, 1.0, 10, 1.0)
    refused(lambda_bound, r"^lam must be in \(0, 2\), got 2\.0\.$", 0.5, 1.0, 10, lam=2.0)
    refused(catoni_bound, r"^inverse_temperature must be > 0, got 0\.0\.$", 0.5, 1.0, 10, inverse_temperature=0.0)


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("train_loss", 1.2, r"must be in \[0, 1\], got 1\.2"),
        ("train_loss", -0.1, r"must be in \[0, 1\], got -0\.1"),
        ("hessian_trace", -1.0, r"must be >= 0, got -1\.0"),
        ("hessian_trace", math.inf, "must be finite, got inf"),
        ("n_samples", 0, "must be an integer >= 1, got 0"),
        ("n_params", 1.5, r"must be an integer >= 1, got 1\.5"),
        ("prior_variance", 0.0, r"must be > 0, got 0\.0"),
        ("delta", 0.0, r"must be in \(0, 1\), got 0\.0"),
        ("distance_squared", -2.0, r"must be >= 0, got -2\.0"),
    ],
)
def test_errors_of_the_curvature_bound(option, value, rule):
    settings = {"train_loss": 0.1, "hessian_trace": 1.0, "n_samples": 10, "n_params": 5}
    refused(compute_pac_bayes_bound, rf"^{option} {rule}\.$", **{**settings, option: value})
