"""How sharp the minimum is: Hessian and spectrum, neighbourhoods, averages, pictures."""

from sam_core.sharpness.average import compute_average_sharpness
from sam_core.sharpness.density import SpectralDensity, compute_spectral_density
from sam_core.sharpness.hessian import Hessian, compute_hessian, compute_hessian_vector_product, hessian_operator
from sam_core.sharpness.lanczos import Eigenpairs
from sam_core.sharpness.landscape import LossLandscape, compute_loss_landscape
from sam_core.sharpness.neighborhood import compute_m_sharpness, compute_sam_sharpness, compute_worst_case_sharpness
from sam_core.sharpness.spectrum import (
    compute_hessian_sharpness,
    compute_top_eigenvalues,
    power_iteration_top_eigenvalue,
)
from sam_core.sharpness.trace import Estimate, compute_hessian_trace

__all__ = [  # noqa: RUF022, grouped as a table of contents
    # Spectrum
    "compute_hessian_sharpness",
    "power_iteration_top_eigenvalue",
    "compute_top_eigenvalues",
    "compute_hessian_trace",
    "compute_spectral_density",
    "compute_hessian_vector_product",
    "compute_hessian",
    "hessian_operator",
    # Neighbourhoods
    "compute_sam_sharpness",
    "compute_m_sharpness",
    "compute_worst_case_sharpness",
    "compute_average_sharpness",
    "compute_loss_landscape",
    # What they return
    "Eigenpairs",
    "Estimate",
    "Hessian",
    "LossLandscape",
    "SpectralDensity",
]
