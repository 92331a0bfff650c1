"""A certificate of the risk: PAC-Bayes-kl for a Gaussian posterior as wide as the minimum is flat, measured by draws.

The recipe of Dziugaite & Roy (2017, arXiv 1703.11008) and Perez-Ortiz et al. (2021, arXiv 2007.12911), without training
of the posterior. With probability at least 1 − delta over the n samples and the draws,

    L(Q) <= kl⁻¹( kl⁻¹(L̂_MC, ln(1/delta_MC) / m),  (KL(Q || P_j) + ln(2 sqrt(n) J / (delta − delta_MC))) / n ),

    Q = N(w, s² I),   P_j = N(w0, p_j² I),   KL(Q || P_j) = 1/2 [d s²/p_j² + ||w − w0||²/p_j² − d + d ln(p_j²/s²)].

What each choice costs. The width s: nothing, for the bound holds for all posteriors at once, and the draws that choose
it are not those that measure the risk. The prior's width p_j, the best of J: ln J, a union bound. The draws: delta_MC.

Why the draws may be counted so. Every batch of every pass gets weights of its own, so that the losses of batch b, with
mean X_b in [0, 1], are independent of those of the others; each pass shows every sample once, so that the mean over
all, weighted by a_b = batch size / largest batch size, has expectation L̂. As x^a is concave, E exp(t a_b X_b) <= (1 −
μ_b + μ_b exp(t))^a_b, and as ln is concave the product over b is that of m = sum_b a_b variables: the bound of Chernoff
and Hoeffding (1963, theorem 1), P[L̂_MC < L̂ and kl(L̂_MC || L̂) >= ε] <= exp(−m ε).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_nonnegative, check_positive
from sam_core.bounds._losses import Data, LossFn, Weights, like_weights, named_weights, sample_losses
from sam_core.bounds.divergences import binary_kl_inverse, isotropic_gaussian_kl
from sam_core.bounds.pac_bayes import VacuousBoundWarning, check_delta, seeger_bound
from sam_core.bounds.risk_certificate import RiskCertificate

_SIGMAS = tuple(2.0 ** (k / 4) for k in range(-48, 5))  # 0.0002 to 2
_PRIOR_SIGMAS = tuple(2.0 ** (k / 8) for k in range(-96, 25))  # 0.0002 to 8; the finer, the nearer to the best KL
_PILOT_DRAWS = 32  # at each width tried
_SEED = 2402_08508  # an unusual one: draws must not repeat the numbers that made the samples or the weights


def certify_risk(
    model: nn.Module,
    loss_fn: LossFn,
    data: Data,
    *,
    params: Sequence[Tensor] | None = None,
    prior_mean: Sequence[Tensor] | None = None,
    max_rise: float = 0.05,
    sigmas: Sequence[float] | None = None,
    prior_sigmas: Sequence[float] | None = None,
    delta: float = 0.05,
    mc_delta: float = 0.01,
    num_draws: int = 1000,
    generator: torch.Generator | None = None,
) -> RiskCertificate:
    """Bound the true risk of weights drawn from N(w, s² I), w the model's, with the formula at the top of this file.

    It holds if the samples are independent draws of one distribution, and w0 and prior_sigmas were chosen without them:
    w0 may be the weights before training, or weights learnt on other samples, which makes the KL small and is what
    makes bounds of networks non-vacuous. The model itself may be trained on the samples. s is the largest of the grid
    at which the risk on the samples rises by at most max_rise, or the smallest of the grid if none is: the flatter, the
    wider. It is sought from above, so that this costs 32 draws for every width of the grid down to s. Of several
    certificates the best is paid for: give each delta divided by their number.

    The model is measured in eval mode, where a sample's loss must not depend on the rest of its batch, and left exactly
    as found. Weights in half precision are drawn in float32 and then rounded, which can only lower the KL. An optimizer
    that keeps its parameters away from w must be inside its ``at_weights()``.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to the losses [B] of B samples, in [0, 1], such as the 0-1 loss.
        data: a tuple (inputs, targets), or an iterable of such batches that shows the same samples whenever it is read,
            such as a DataLoader that drops none or a list. Inputs are a tensor, or a tuple for ``model(*inputs)``. One
            draw a batch: smaller batches are cheaper draws.
        params: the parameters that are random; None: those that require a gradient. The others and the buffers, such as
            running statistics, are fixed, and must have been chosen without the samples, too.
        prior_mean: w0, one tensor for each of them; None: zeros.
        max_rise: rise of the empirical risk that the width may cost, >= 0.
        sigmas: widths s to choose from, > 0, in parameter units; None: 53 from 2^-12 to 2, each 2^(1/4) times the last.
        prior_sigmas: widths p to choose from, likewise; None: 121 from 2^-12 to 8, each 2^(1/8) times the last.
        delta: probability that the bound fails, in (0, 1), of all causes.
        mc_delta: the share of it that the draws have, in (0, delta).
        num_draws: fewest independent draws that measure the risk; whole passes are made.
        generator: source of the draws, independent of the samples and of w; None: one on the CPU with a fixed seed. The
            global random state is not touched.

    Returns:
        The certificate.

    Raises:
        ValueError: for a bad option, a loss outside [0, 1], or data that change from pass to pass.

    Warns:
        VacuousBoundWarning: if the bound is 1 to three decimals.

    Example:
        >>> inputs = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
        >>> targets = (inputs[:, 0] > 0).long()
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> error = lambda outputs, targets: (outputs.argmax(-1) != targets).float()
        >>> print(certify_risk(model, error, (inputs, targets)))
        With probability 0.95, weights drawn around w with standard deviation 0.297 have a true risk of at most 0.127.
        On the 2000 samples they have 0.061 (at most 0.087; 1000 draws), w itself 0.000. KL to the prior: 3.8 nats.
    """
    check_nonnegative("max_rise", max_rise)
    check_delta("delta", delta)
    check_delta("mc_delta", mc_delta)
    if mc_delta >= delta:
        raise ValueError(f"mc_delta must be < delta = {delta!r}, got {mc_delta!r}.")
    check_count("num_draws", num_draws, at_least=1)
    sigmas = _SIGMAS if sigmas is None else sigmas
    prior_sigmas = _PRIOR_SIGMAS if prior_sigmas is None else prior_sigmas
    for name, values in (("sigmas", sigmas), ("prior_sigmas", prior_sigmas)):
        if not len(values):
            raise ValueError(f"{name} must hold one value at least, got {values!r}.")
        for value in values:
            check_positive(name, value)
    generator = generator if generator is not None else torch.Generator().manual_seed(_SEED)
    weights = named_weights(model, params)
    prior = like_weights("prior_mean", prior_mean, weights)
    device = next(iter(weights.values())).device

    with sample_losses(model, loss_fn, data, device) as one_pass:
        at_weights = _measure(one_pass, lambda: weights)

        def draw(sigma: float, num_draws: int) -> _Risk:
            return _measure(one_pass, lambda: _draw(weights, sigma, generator), num_draws, at_weights.num_losses)

        *wider, sigma = sorted(sigmas, reverse=True)
        for candidate in wider:
            if draw(candidate, _PILOT_DRAWS).mean - at_weights.mean <= max_rise:
                sigma = candidate
                break
        risk = draw(sigma, num_draws)

    num_params = sum(weight.numel() for weight in weights.values())
    moves = (weights[name].cpu().double() - prior[name].cpu().double() for name in weights)
    distance = sum(float(move.square().sum()) for move in moves)
    kl, prior_sigma = min((isotropic_gaussian_kl(distance, num_params, sigma**2, p**2), p) for p in prior_sigmas)
    empirical_risk_bound = binary_kl_inverse(risk.mean, math.log(1 / mc_delta) / risk.num_draws)
    certificate = RiskCertificate(
        risk_bound=seeger_bound(
            empirical_risk_bound, kl, at_weights.num_losses, (delta - mc_delta) / len(prior_sigmas)
        ),
        empirical_risk=risk.mean,
        empirical_risk_bound=empirical_risk_bound,
        risk_at_weights=at_weights.mean,
        kl=kl,
        sigma=sigma,
        prior_sigma=prior_sigma,
        num_samples=at_weights.num_losses,
        num_params=num_params,
        num_draws=risk.num_draws,
        num_priors=len(prior_sigmas),
        delta=delta,
        mc_delta=mc_delta,
    )
    if certificate.is_vacuous:
        message = f"The risk bound is {certificate.risk_bound:.3g}: vacuous, for no risk exceeds 1."
        warnings.warn(message, VacuousBoundWarning, stacklevel=2)
    return certificate


@dataclass(frozen=True)
class _Risk:
    mean: float
    num_losses: int  # of all passes
    num_draws: int  # the m at the top of this file


def _measure(
    one_pass: Callable[[Callable[[], Weights]], Iterator[Tensor]],
    weights: Callable[[], Weights],
    num_draws: int = 1,
    num_samples: int | None = None,
) -> _Risk:
    """The mean loss over whole passes, until there are enough draws; every pass must have ``num_samples``, if given."""
    total, num_losses, largest = 0.0, 0, 1
    while True:
        seen = 0
        for losses in one_pass(weights):  # of float64, on the CPU
            low, high = (float(value) for value in losses.aminmax()) if len(losses) else (0.0, 0.0)
            if not 0 <= low <= high <= 1:  # also NaN
                raise ValueError(f"loss_fn must return losses in [0, 1], got one of {low if not low >= 0 else high!r}.")
            total += float(losses.sum())
            seen += len(losses)
            largest = max(largest, len(losses))
        if seen != (num_samples or seen) or not seen:
            expected = f"{num_samples} samples in every pass" if num_samples else "at least one sample"
            raise ValueError(f"data must show {expected}, got {seen}.")
        num_losses += seen
        if num_samples is None or num_losses // largest >= num_draws:
            return _Risk(min(total / num_losses, 1.0), num_losses, num_losses // largest)


def _draw(weights: Weights, sigma: float, generator: torch.Generator) -> Weights:
    """Weights from N(w, sigma² I)."""
    drawn = {}
    for name, weight in weights.items():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        noise = torch.randn(weight.shape, generator=generator, device=generator.device, dtype=dtype)
        drawn[name] = (weight + sigma * noise.to(weight.device)).to(weight.dtype)
    return drawn
