"""PAC-Bayes bounds on the risk of a posterior, for losses in [0, 1], from tight to readable.

Setting: n independent samples of one distribution; a prior P chosen without them; L̂ = E_{w~Q} (1/n) sum_i l(w, z_i)
the empirical and L = E_{w~Q} E_z l(w, z) the true risk of a posterior Q; K = KL(Q || P) in nats. Every bound here holds
with probability at least 1 − delta over the samples, for all posteriors Q at once, so that Q may depend on the samples
in any way. With c = (K + ln(2 sqrt(n) / delta)) / n, all but the last follow from kl(L̂ || L) <= c: Maurer 2004 (arXiv
cs/0411099), who proves E exp(n kl(mean || L)) <= 2 sqrt(n) for n >= 8; below, it is a matter of counting.

    seeger <= mcallester,    seeger <= quadratic = lambda at its best lambda <= lambda at any other.
"""

from __future__ import annotations

import math

from sam_core._checks import check_count, check_finite, check_nonnegative, check_positive
from sam_core.bounds.divergences import binary_kl_inverse, check_probability


class VacuousBoundWarning(UserWarning):
    """A risk bound says nothing: it is not below 1, which no risk exceeds.

    Example:
        >>> import warnings
        >>> from sam_core.bounds import compute_pac_bayes_bound
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     bound = compute_pac_bayes_bound(0.5, hessian_trace=100.0, n_samples=100, n_params=1000)
        >>> bound > 1, caught[0].category.__name__
        (True, 'VacuousBoundWarning')
    """


def seeger_bound(empirical_risk: float, kl: float, num_samples: int, delta: float = 0.05) -> float:
    """L <= kl⁻¹(L̂, c): the bound of Seeger (2002, JMLR 3) with Maurer's constant, the tightest of those with c.

    Args:
        empirical_risk: L̂ in [0, 1], of the posterior, not of its mean.
        kl: K in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).

    Returns:
        The bound, in [L̂, 1].

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(seeger_bound(0.05, kl=20.0, num_samples=1000), 4)
        0.1173
    """
    return binary_kl_inverse(empirical_risk, _complexity(empirical_risk, kl, num_samples, delta))


def mcallester_bound(empirical_risk: float, kl: float, num_samples: int, delta: float = 0.05) -> float:
    """L <= L̂ + sqrt(c / 2): the bound of McAllester (1999) with Maurer's constant.

    Args:
        empirical_risk: L̂ in [0, 1], of the posterior, not of its mean.
        kl: K in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).

    Returns:
        The bound, >= L̂; above 1 it says nothing.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(mcallester_bound(0.05, kl=20.0, num_samples=1000), 4)
        0.1665
    """
    return empirical_risk + math.sqrt(_complexity(empirical_risk, kl, num_samples, delta) / 2)


def quadratic_bound(empirical_risk: float, kl: float, num_samples: int, delta: float = 0.05) -> float:
    """L <= (sqrt(L̂ + c/2) + sqrt(c/2))²  (Perez-Ortiz et al. 2021, JMLR 22; arXiv 2007.12911).

    Args:
        empirical_risk: L̂ in [0, 1], of the posterior, not of its mean.
        kl: K in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).

    Returns:
        The bound, >= L̂; above 1 it says nothing.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(quadratic_bound(0.05, kl=20.0, num_samples=1000), 4)
        0.1359
    """
    half = _complexity(empirical_risk, kl, num_samples, delta) / 2
    return (math.sqrt(empirical_risk + half) + math.sqrt(half)) ** 2


def lambda_bound(
    empirical_risk: float, kl: float, num_samples: int, delta: float = 0.05, *, lam: float | None = None
) -> float:
    """L <= L̂ / (1 − λ/2) + c / (λ (1 − λ/2))  (Thiemann et al. 2017, theorem 3; arXiv 1608.05610).

    It holds for all λ at once; the best is  λ = 2 / (sqrt(2 L̂ / c + 1) + 1).  For a fixed λ it is linear in L̂ and K,
    which makes it good to train with.

    Args:
        empirical_risk: L̂ in [0, 1], of the posterior, not of its mean.
        kl: K in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).
        lam: λ in (0, 2); None: the best.

    Returns:
        The bound, >= L̂; above 1 it says nothing.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(lambda_bound(0.05, kl=20.0, num_samples=1000), 4)
        0.1359
    """
    c = _complexity(empirical_risk, kl, num_samples, delta)
    lam = 2 / (math.sqrt(2 * empirical_risk / c + 1) + 1) if lam is None else lam
    check_positive("lam", lam)
    if lam >= 2:
        raise ValueError(f"lam must be in (0, 2), got {lam!r}.")
    return empirical_risk / (1 - lam / 2) + c / (lam * (1 - lam / 2))


def catoni_bound(
    empirical_risk: float, kl: float, num_samples: int, delta: float = 0.05, *, inverse_temperature: float
) -> float:
    """L <= (1 − exp(−C L̂ − (K + ln(1/delta)) / n)) / (1 − exp(−C))  (Catoni 2007, theorem 1.2.6; arXiv 0712.0248).

    Without the ln(2 sqrt(n)) of the others, for a C that is chosen before the samples are seen. To choose among m
    values of C, give each delta / m.

    Args:
        empirical_risk: L̂ in [0, 1], of the posterior, not of its mean.
        kl: K in nats, >= 0.
        num_samples: n, >= 1.
        delta: probability that the bound fails, in (0, 1).
        inverse_temperature: C, > 0.

    Returns:
        The bound, >= L̂; above 1 it says nothing.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> round(catoni_bound(0.05, kl=20.0, num_samples=1000, inverse_temperature=1.0), 4)
        0.1114
    """
    _check(empirical_risk, kl, num_samples, delta)
    check_positive("inverse_temperature", inverse_temperature)
    exponent = inverse_temperature * empirical_risk + (kl + math.log(1 / delta)) / num_samples
    return math.expm1(-exponent) / math.expm1(-inverse_temperature)


def _complexity(empirical_risk: float, kl: float, num_samples: int, delta: float) -> float:
    """c = (K + ln(2 sqrt(n) / delta)) / n, of arguments that are checked."""
    _check(empirical_risk, kl, num_samples, delta)
    return (kl + math.log(2) + math.log(num_samples) / 2 - math.log(delta)) / num_samples


def _check(empirical_risk: float, kl: float, num_samples: int, delta: float) -> None:
    check_probability("empirical_risk", empirical_risk)
    check_nonnegative("kl", kl)
    check_count("num_samples", num_samples, at_least=1)
    check_delta("delta", delta)


def check_delta(name: str, value: float) -> None:
    """Refuse what is not a number in (0, 1).

    Raises:
        ValueError: with the name, the rule and the value.
    """
    check_finite(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}.")
