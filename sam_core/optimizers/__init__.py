"""Optimizers that look at a perturbed point before they step; one method a file."""

from sam_core.optimizers.asam import ASAM
from sam_core.optimizers.sam import SAM
from sam_core.optimizers.two_pass import TwoPassOptimizer

__all__ = [
    "ASAM",
    "SAM",
    "TwoPassOptimizer",
]
