"""What flatness says of the true risk: divergences, PAC-Bayes bounds, certificates, description length."""

from sam_core.bounds.certificate import certify_risk
from sam_core.bounds.curvature import compute_pac_bayes_bound
from sam_core.bounds.description_length import (
    MeasuredDescriptionLength,
    description_length_bits,
    measure_description_length,
)
from sam_core.bounds.divergences import (
    binary_kl,
    binary_kl_inverse,
    binary_kl_inverse_lower,
    diagonal_gaussian_kl,
    isotropic_gaussian_kl,
)
from sam_core.bounds.pac_bayes import (
    VacuousBoundWarning,
    catoni_bound,
    lambda_bound,
    mcallester_bound,
    quadratic_bound,
    seeger_bound,
)
from sam_core.bounds.poincare import flatness_bound, population_flatness_bound
from sam_core.bounds.risk_certificate import RiskCertificate

__all__ = [  # noqa: RUF022, grouped as a table of contents
    # Certificates and estimates
    "certify_risk",
    "RiskCertificate",
    "compute_pac_bayes_bound",
    "VacuousBoundWarning",
    # Bounds
    "seeger_bound",
    "mcallester_bound",
    "quadratic_bound",
    "lambda_bound",
    "catoni_bound",
    "flatness_bound",
    "population_flatness_bound",
    # Divergences
    "binary_kl",
    "binary_kl_inverse",
    "binary_kl_inverse_lower",
    "isotropic_gaussian_kl",
    "diagonal_gaussian_kl",
    # Description length
    "description_length_bits",
    "measure_description_length",
    "MeasuredDescriptionLength",
]
