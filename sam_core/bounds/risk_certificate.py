"""What is certified about the risk, in numbers, in words and as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RiskCertificate:
    """What ``certify_risk`` found; ``print`` says it in words, :meth:`to_markdown` as a table.

    Args:
        risk_bound: bound on the true risk of weights drawn from N(w, sigma² I), in [0, 1].
        empirical_risk: their mean risk on the samples, as measured by draws.
        empirical_risk_bound: what that risk is at most, with probability 1 − mc_delta.
        risk_at_weights: risk of w itself on the samples; the bound is not about w.
        kl: KL(posterior || prior) in nats.
        sigma: standard deviation of the posterior, in parameter units.
        prior_sigma: that of the prior.
        num_samples: samples of the data.
        num_params: random weights.
        num_draws: independent draws of them that count.
        num_priors: prior widths that were paid for.
        delta: probability that the bound fails, of all causes.
        mc_delta: the share of it that the draws have.

    Example:
        >>> certificate = RiskCertificate(
        ...     risk_bound=0.1234, empirical_risk=0.05, empirical_risk_bound=0.06, risk_at_weights=0.04, kl=20.0,
        ...     sigma=0.1, prior_sigma=0.5, num_samples=1000, num_params=650, num_draws=5000, num_priors=121,
        ...     delta=0.05, mc_delta=0.01,
        ... )
        >>> print(certificate)
        With probability 0.95, weights drawn around w with standard deviation 0.1 have a true risk of at most 0.124.
        On the 1000 samples they have 0.050 (at most 0.060; 5000 draws), w itself 0.040. KL to the prior: 20.0 nats.
    """

    risk_bound: float
    empirical_risk: float
    empirical_risk_bound: float
    risk_at_weights: float
    kl: float
    sigma: float
    prior_sigma: float
    num_samples: int
    num_params: int
    num_draws: int
    num_priors: int
    delta: float
    mc_delta: float

    @property
    def confidence(self) -> float:
        """Probability, over the samples and the draws, with which the bound holds: at least 1 − delta."""
        return 1 - self.delta

    @property
    def rise(self) -> float:
        """How much more the drawn weights lose on the samples than w: the price of the width."""
        return self.empirical_risk - self.risk_at_weights

    @property
    def is_vacuous(self) -> bool:
        """Whether the bound is 1 to three decimals, and so says nothing."""
        return self.risk_bound >= 0.9995

    def __str__(self) -> str:
        vacuous = "This is vacuous: no risk exceeds 1.\n" if self.is_vacuous else ""
        return (
            f"With probability {self.confidence:.4g}, weights drawn around w with standard deviation {self.sigma:.3g} "
            f"have a true risk of at most {_up(self.risk_bound)}.\n{vacuous}"
            f"On the {self.num_samples} samples they have {self.empirical_risk:.3f} (at most "
            f"{_up(self.empirical_risk_bound)}; {self.num_draws} draws), w itself {self.risk_at_weights:.3f}. "
            f"KL to the prior: {self.kl:.1f} nats."
        )

    def to_markdown(self) -> str:
        """A table of two columns, quantity and value.

        Returns:
            Markdown, without a newline at the end.
        """
        rows = {
            "true risk of drawn weights, at most": _up(self.risk_bound) + (" (vacuous)" if self.is_vacuous else ""),
            "with probability, at least": f"{self.confidence:.4g}",
            "their risk on the samples, measured": f"{self.empirical_risk:.3f}",
            "... at most": _up(self.empirical_risk_bound),
            "risk of w itself on the samples": f"{self.risk_at_weights:.3f}",
            "KL to the prior, nats": f"{self.kl:.1f}",
            "standard deviation of the weights": f"{self.sigma:.3g}",
            "that of the prior": f"{self.prior_sigma:.3g}",
            "samples, weights, draws": f"{self.num_samples}, {self.num_params}, {self.num_draws}",
        }
        return "\n".join(
            ["| certificate | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]
        )


def _up(value: float) -> str:
    """Three decimals, never below the value."""
    return f"{min(math.ceil(value * 1000) / 1000, 1.0):.3f}"
