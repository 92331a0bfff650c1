"""Flatness inside the bound: c_P E_Q ||grad l||², c_P the Poincaré constant (Haddouche et al. 2024, arXiv 2402.08508).

A posterior Q has Poincaré constant c_P if Var_{w~Q} f(w) <= c_P E_{w~Q} ||grad f(w)||² for every smooth f. That of a
Gaussian N(w, s² I) is its variance s² (Chernoff 1981; equality for linear f). So it multiplies the gradient:

    E_Q l(w, z)²  =  (E_Q l(w, z))² + Var_Q l(w, z)  <=  (E_Q l(w, z))² + c_P E_Q ||grad_w l(w, z)||².

Where the loss is flat around w the second term is small although s is large, and large s makes KL(Q || P) small. The
square enters through the exponential moments of the loss of one sample, with mean L:

    (1)  E exp(λ (L − l) − λ² θ l²) <= 1  for l in [0, 1],  0 < λ < 1,  θ = (−ln(1−λ) − λ) / λ²,
    (2)  E exp(λ (L − l) − λ² E[l²] / 2) <= 1  for l >= 0,  λ > 0.

(1) is the un-expected Bernstein inequality (Mhammedi et al. 2019, arXiv 1905.13367): as (−ln(1−u) − u)/u² grows in u,
−ln(1−λl) <= λl + θ λ² l², that is exp(−λl − θ λ² l²) <= 1 − λl; take the mean and use 1 − λL <= exp(−λL). (2) is
exp(−u) <= 1 − u + u²/2 for u >= 0, and 1 + x <= exp(x). Products over n samples, Markov's inequality and the change of
measure of Donsker and Varadhan turn each into a bound that holds with probability 1 − delta for all Q at once:

    (1)  L(Q) <= L̂(Q) + (KL + ln(1/delta)) / (λn) + λ θ (1/n) sum_i E_Q l(w, z_i)²,
    (2)  L(Q) <= L̂(Q) + (KL + ln(1/delta)) / (λn) + (λ/2) E_z E_Q l(w, z)².

With the Poincaré inequality, (1) becomes :func:`flatness_bound`, which needs the samples alone, and (2) becomes
:func:`population_flatness_bound`. The latter follows the paper, which assumes E_z (E_Q l)² <= C L, "quadratically
self-bounded", and takes the gradient's mean over the unknown distribution. The constants are those proven here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sam_core._checks import check_count, check_nonnegative, check_positive
from sam_core.bounds.divergences import check_probability
from sam_core.bounds.pac_bayes import check_delta

_HALVES = tuple(2.0**-power for power in range(1, 11))


def flatness_bound(
    empirical_risk: float,
    mean_squared_risk: float,
    mean_squared_gradient: float,
    poincare_constant: float,
    kl: float,
    num_samples: int,
    delta: float = 0.05,
    *,
    lambdas: Sequence[float] | None = None,
) -> float:
    """L <= min over λ of  L̂ + (KL + ln(m/delta)) / (λn) + λ θ(λ) [S + c_P G]:  all of it known from the samples.

    It assumes n independent samples, a loss in [0, 1] that is smooth in the weights (or Lipschitz), a prior and m
    values of λ chosen without the samples, and holds with probability 1 − delta for all posteriors at once. It beats
    :func:`seeger_bound` where E_Q l² is well below L̂: losses that are small and even, not 0 or 1.

    Args:
        empirical_risk: L̂ = (1/n) sum_i E_Q l(w, z_i), in [0, 1].
        mean_squared_risk: S = (1/n) sum_i (E_Q l(w, z_i))², in [L̂², L̂].
        mean_squared_gradient: G = (1/n) sum_i E_Q ||grad_w l(w, z_i)||², of single samples (``torch.func.vmap`` of
            ``torch.func.grad``), >= 0. Like L̂ and S it is an expectation; draws only estimate it.
        poincare_constant: c_P of the posterior, in squared parameter units; of N(w, s² I) it is s².
        kl: KL(Q || P) in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).
        lambdas: values of λ in (0, 1), of which the best is paid for by the m in ln(m/delta); None: 1/2, 1/4, …,
            1/1024.

    Returns:
        The bound, >= L̂; above 1 it says nothing.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> flat = flatness_bound(0.05, 0.003, 0.1, poincare_constant=0.01, kl=20.0, num_samples=1000)
        >>> sharp = flatness_bound(0.05, 0.003, 10.0, poincare_constant=0.01, kl=20.0, num_samples=1000)
        >>> round(flat, 3), round(sharp, 3)
        (0.102, 0.14)
    """
    _check(empirical_risk, mean_squared_gradient, poincare_constant, kl, num_samples, delta)
    check_probability("empirical_risk", empirical_risk)
    if not empirical_risk**2 * (1 - 1e-6) <= mean_squared_risk <= empirical_risk * (1 + 1e-6):
        raise ValueError(
            f"mean_squared_risk must be in [empirical_risk², empirical_risk] = "
            f"[{empirical_risk**2!r}, {empirical_risk!r}], got {mean_squared_risk!r}."
        )
    lambdas = _HALVES if lambdas is None else lambdas
    _check_lambdas(lambdas, 1.0)
    second_moment = mean_squared_risk + poincare_constant * mean_squared_gradient
    complexity = (kl + math.log(len(lambdas) / delta)) / num_samples
    return empirical_risk + min(complexity / lam + (-math.log1p(-lam) - lam) / lam * second_moment for lam in lambdas)


def population_flatness_bound(
    empirical_risk: float,
    mean_squared_gradient: float,
    poincare_constant: float,
    kl: float,
    num_samples: int,
    delta: float = 0.05,
    *,
    self_bounding: float = 1.0,
    lambdas: Sequence[float] | None = None,
) -> float:
    """L <= min over λ of  [L̂ + (KL + ln(m/delta)) / (λn) + (λ/2) c_P G] / (1 − λC/2),  after the paper.

    It assumes n independent samples, a loss >= 0 that is smooth in the weights (or Lipschitz), E_z (E_Q l)² <= C L, a
    prior and m values of λ chosen without the samples. It holds with probability 1 − delta for all posteriors at once.
    Its G is a mean over the distribution of the samples, which theory knows and practice does not: a statement about
    why flat minima generalise, not a certificate.

    Args:
        empirical_risk: L̂, >= 0.
        mean_squared_gradient: G = E_z E_Q ||grad_w l(w, z)||², of single samples, >= 0.
        poincare_constant: c_P of the posterior, in squared parameter units; of N(w, s² I) it is s².
        kl: KL(Q || P) in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).
        self_bounding: C, > 0; 1 is right for every loss in [0, 1].
        lambdas: values of λ in (0, 2/C), of which the best is paid for by the m in ln(m/delta); None: 1/C, 1/2C, …,
            1/512C.

    Returns:
        The bound, >= L̂.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(population_flatness_bound(0.05, 0.1, 0.01, kl=20.0, num_samples=1000, self_bounding=0.1), 3)
        0.07
    """
    _check(empirical_risk, mean_squared_gradient, poincare_constant, kl, num_samples, delta)
    check_positive("self_bounding", self_bounding)
    lambdas = [2 / self_bounding * half for half in _HALVES] if lambdas is None else lambdas
    _check_lambdas(lambdas, 2 / self_bounding)
    complexity = (kl + math.log(len(lambdas) / delta)) / num_samples
    variance = poincare_constant * mean_squared_gradient
    return min(
        (empirical_risk + complexity / lam + lam / 2 * variance) / (1 - lam * self_bounding / 2) for lam in lambdas
    )


def _check(
    empirical_risk: float,
    mean_squared_gradient: float,
    poincare_constant: float,
    kl: float,
    num_samples: int,
    delta: float,
) -> None:
    check_nonnegative("empirical_risk", empirical_risk)
    check_nonnegative("mean_squared_gradient", mean_squared_gradient)
    check_nonnegative("poincare_constant", poincare_constant)
    check_nonnegative("kl", kl)
    check_count("num_samples", num_samples, at_least=1)
    check_delta("delta", delta)


def _check_lambdas(lambdas: Sequence[float], end: float) -> None:
    if not lambdas or not all(0 < lam < end for lam in lambdas):
        raise ValueError(f"lambdas must be numbers in (0, {end:g}), at least one, got {lambdas!r}.")
