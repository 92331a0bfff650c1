"""How far one distribution is from another: KL of Gaussians, and kl of Bernoulli variables with its inverses.

The inverses turn "kl(q || p) is at most c" into a statement about p. They are ends of an interval, found by bisection
down to neighbouring floating-point numbers, and rounded outwards: never inside the true interval.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sam_core._checks import check_count, check_finite, check_nonnegative, check_positive

_ROUNDING = 1e-12  # binary_kl is more exact than this share of itself


def isotropic_gaussian_kl(
    distance_squared: float, num_params: int, posterior_variance: float, prior_variance: float
) -> float:
    """KL(N(w, s² I) || N(w0, p² I)) = 1/2 [d s²/p² + ||w − w0||²/p² − d + d ln(p²/s²)],  in nats.

    Args:
        distance_squared: ||w − w0||², >= 0.
        num_params: d, >= 0.
        posterior_variance: s², > 0.
        prior_variance: p², > 0.

    Returns:
        The divergence in nats, >= 0.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> isotropic_gaussian_kl(4.0, 10, 1.0, 1.0)
        2.0
    """
    check_nonnegative("distance_squared", distance_squared)
    check_count("num_params", num_params)
    check_positive("posterior_variance", posterior_variance)
    check_positive("prior_variance", prior_variance)
    ratio = posterior_variance / prior_variance
    log_ratio = math.log(posterior_variance) - math.log(prior_variance)
    spread = max(ratio - 1 - log_ratio, 0.0)  # rounding must not make it negative
    return (num_params * spread + distance_squared / prior_variance) / 2


def diagonal_gaussian_kl(mean: Tensor, variance: Tensor, prior_mean: Tensor, prior_variance: Tensor) -> float:
    """KL of Gaussians with diagonal covariance: 1/2 sum_i [s_i²/p_i² + (w_i − w0_i)²/p_i² − 1 + ln(p_i²/s_i²)],  in
    nats.

    Args:
        mean: w, any shape.
        variance: s², > 0; this and the others broadcast to the shape of the mean.
        prior_mean: w0.
        prior_variance: p², > 0.

    Returns:
        The divergence in nats, >= 0, summed in float64.

    Raises:
        ValueError: for shapes that do not broadcast to that of the mean, or a variance that is not finite and > 0.

    Example:
        >>> one, two = torch.ones(10), torch.full((10,), 2.0)
        >>> diagonal_gaussian_kl(two, one, one, one)
        5.0
    """
    values = {"variance": variance, "prior_mean": prior_mean, "prior_variance": prior_variance}
    try:
        expanded = [value.detach().to(mean.device, torch.float64).expand(mean.shape) for value in values.values()]
    except RuntimeError:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
        raise ValueError(
            f"variance, prior_mean, prior_variance must fit mean {list(mean.shape)}, got {shapes}."
        ) from None
    s2, w0, p2 = expanded
    for name, entries in (("variance", s2), ("prior_variance", p2)):
        if not bool(((entries > 0) & entries.isfinite()).all()):
            raise ValueError(f"{name} must be finite and > 0 everywhere, got {values[name]!r}.")
    ratio = s2 / p2
    spread = (ratio - 1 - ratio.log()).clamp(min=0)
    return float((spread + (mean.detach().double() - w0).square() / p2).sum()) / 2


def binary_kl(q: float, p: float) -> float:
    """kl(q || p) = q ln(q/p) + (1−q) ln((1−q)/(1−p)),  of Bernoulli variables, in nats.

    Computed as q φ((p−q)/q) + (1−q) φ((q−p)/(1−q)) with φ(x) = x − ln(1+x) >= 0, where nothing cancels: the relative
    error is below 1e-12 also where q and p are almost equal.

    Args:
        q: in [0, 1].
        p: in [0, 1].

    Returns:
        The divergence, >= 0; infinity if p is 0 or 1 and q is not.

    Raises:
        ValueError: for a value outside [0, 1].

    Example:
        >>> binary_kl(0.0, 0.5)  # ln 2
        0.6931471805599453
        >>> binary_kl(0.5, 0.0)
        inf
    """
    check_probability("q", q)
    check_probability("p", p)
    q, p = float(q), float(p)
    if q == p:
        return 0.0
    if p in (0, 1):
        return math.inf
    if q == 0:
        return -math.log1p(-p)
    if q == 1:
        return -math.log(p)
    return _excess(q, p, p - q) + _excess(1 - q, 1 - p, q - p)


def binary_kl_inverse(q: float, c: float) -> float:
    """The largest p with kl(q || p) <= c:  kl⁻¹(q, c) = sup {p in [q, 1] : kl(q || p) <= c}.

    The upper end of the last bracket, so never below the true value: a risk bound must not be rounded down. For q = 0
    it is 1 − exp(−c).

    Args:
        q: in [0, 1].
        c: in nats, >= 0; infinity gives 1.

    Returns:
        p in [q, 1], above the true value by about 1e-12 of p − q, or the spacing of floating-point numbers.

    Raises:
        ValueError: for q outside [0, 1], or c negative or NaN.

    Example:
        >>> round(binary_kl_inverse(0.1, 0.05), 6)
        0.220079
        >>> binary_kl_inverse(0.0, 0.5) >= 1 - 2.718281828459045**-0.5
        True
    """
    return _inverse(q, c, 1.0)


def binary_kl_inverse_lower(q: float, c: float) -> float:
    """The smallest p with kl(q || p) <= c:  inf {p in [0, q] : kl(q || p) <= c}.

    The lower end of the last bracket, so never above the true value. For q = 1 it is exp(−c).

    Args:
        q: in [0, 1].
        c: in nats, >= 0; infinity gives 0.

    Returns:
        p in [0, q].

    Raises:
        ValueError: for q outside [0, 1], or c negative or NaN.

    Example:
        >>> round(binary_kl_inverse_lower(0.1, 0.05), 6)
        0.031278
    """
    return _inverse(q, c, 0.0)


def _inverse(q: float, c: float, end: float) -> float:
    """The point between q and the end where kl(q || p) passes c, rounded towards the end."""
    check_probability("q", q)
    _check_nonnegative_or_infinite("c", c)
    if c == 0 or q == end:
        return float(q)
    if c == math.inf:
        return end
    most = float(c) * (1 + _ROUNDING)  # where rounding leaves it open whether a point is inside, it is
    inside, outside = float(q), end
    while True:
        middle = (inside + outside) / 2
        if middle in (inside, outside):
            return outside
        if binary_kl(q, middle) <= most:
            inside = middle
        else:
            outside = middle


def _excess(share: float, other: float, change: float) -> float:
    """share * φ(x) with x = change / share, other = share + change > 0 and φ(x) = x − ln(1 + x)."""
    x = change / share
    if abs(x) < 0.01:
        return change * x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x * (1 / 6 - x * (1 / 7 - x / 8))))))
    if abs(x) < 0.5:
        return change - share * math.log1p(x)
    ratio = other / share  # 1 + x, but exact where that is almost 0
    return change - share * (math.log(ratio) if 0 < ratio < math.inf else math.log(other) - math.log(share))


def check_probability(name: str, value: float) -> None:
    """Refuse what is not a number in [0, 1].

    Raises:
        ValueError: with the name, the rule and the value.
    """
    check_finite(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}.")


def _check_nonnegative_or_infinite(name: str, value: Any) -> None:
    if not (isinstance(value, Real) and float(value) >= 0):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
