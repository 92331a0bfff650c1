"""PAC-Bayes from the Hessian's trace: the flatter the minimum, the wider the posterior that the loss allows."""

from __future__ import annotations

import math
import warnings

import torch

from sam_core._checks import check_count, check_nonnegative, check_positive
from sam_core.bounds.divergences import check_probability
from sam_core.bounds.pac_bayes import VacuousBoundWarning, check_delta

_LOWEST = -700.0  # ln of the smallest posterior variance tried, as a share of the prior's


def compute_pac_bayes_bound(
    train_loss: float,
    hessian_trace: float,
    n_samples: int,
    n_params: int,
    prior_variance: float = 1.0,
    delta: float = 0.05,
    *,
    distance_squared: float = 0.0,
) -> float:
    """An estimate of the McAllester-Maurer bound for a Gaussian posterior of the best width, from the Hessian's trace.

        min over s² of   train_loss + s² trace / 2 + sqrt((KL(s²) + ln(2 sqrt(n) / delta)) / (2 n)),
        KL(s²) = KL(N(w, s² I) || N(w0, p² I)) = 1/2 [d s²/p² + ||w − w0||²/p² − d + d ln(p²/s²)].

    The bound is on the risk of the posterior N(w, s² I), so its empirical risk belongs in it: train_loss + s² trace / 2
    to second order. Choosing s² costs nothing, for the bound holds for all posteriors at once.

    It is an estimate, not a certificate: the second order says little of a loss that bends within s of w, and nothing
    of the 0-1 loss. :func:`certify_risk` draws weights instead. Beware of forms that set s² = 1/trace, exchange prior
    and posterior in the KL, or leave out the distance.

    Args:
        train_loss: mean loss at w, in [0, 1].
        hessian_trace: trace of its Hessian, in loss per squared parameter unit, >= 0.
        n_samples: n, >= 1.
        n_params: d, >= 1.
        prior_variance: p², > 0, chosen without the samples. The best of several is paid for: give each delta divided by
            their number.
        delta: probability that the bound fails, in (0, 1).
        distance_squared: ||w − w0||², from the weights to the centre of the prior, >= 0.

    Returns:
        The bound; 1 or more says nothing.

    Raises:
        ValueError: for a value outside its range.

    Warns:
        VacuousBoundWarning: if the bound is 1 or more.

    Example:
        >>> flat = compute_pac_bayes_bound(0.05, hessian_trace=1.0, n_samples=10_000, n_params=100)
        >>> sharp = compute_pac_bayes_bound(0.05, hessian_trace=100.0, n_samples=10_000, n_params=100)
        >>> round(flat, 3), round(sharp, 3)
        (0.147, 0.199)
    """
    check_probability("train_loss", train_loss)
    check_nonnegative("hessian_trace", hessian_trace)
    check_count("n_samples", n_samples, at_least=1)
    check_count("n_params", n_params, at_least=1)
    check_positive("prior_variance", prior_variance)
    check_delta("delta", delta)
    check_nonnegative("distance_squared", distance_squared)

    distance = distance_squared / prior_variance
    rise = prior_variance * hessian_trace / 2  # of the loss at s² = p²
    confidence = math.log(2 * math.sqrt(n_samples) / delta)

    def bounds(log_ratio: torch.Tensor) -> torch.Tensor:
        """Of every ln(s²/p²); both terms are exact also near 0."""
        kl = (n_params * (torch.expm1(log_ratio) - log_ratio) + distance) / 2
        return train_loss + rise * log_ratio.exp() + ((kl + confidence) / (2 * n_samples)).sqrt()

    # Above s² = p² both terms grow. Below it there may be two minima, so search everywhere, four times finer each time.
    low, high = _LOWEST, 0.0
    for _ in range(4):
        points = torch.linspace(low, high, 1001, dtype=torch.float64)
        values = bounds(points)
        best = int(values.argmin())
        low, high = float(points[max(best - 1, 0)]), float(points[min(best + 1, 1000)])
    bound = float(values[best])
    if bound >= 1:
        warnings.warn(
            f"The risk bound is {bound:.3g}: vacuous, for no risk exceeds 1.", VacuousBoundWarning, stacklevel=2
        )
    return bound
