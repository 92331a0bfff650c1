"""How sharp the minimum is: Hessian products and spectrum, neighbourhoods."""

from sam_core.sharpness.hessian import compute_hessian_vector_product
from sam_core.sharpness.neighborhood import compute_sam_sharpness
from sam_core.sharpness.spectrum import power_iteration_top_eigenvalue

__all__ = [
    "compute_hessian_vector_product",
    "compute_sam_sharpness",
    "power_iteration_top_eigenvalue",
]
