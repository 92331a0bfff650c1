"""Optimizers that look at a perturbed point before they step; one method a file."""

from sam_core.optimizers.asam import ASAM
from sam_core.optimizers.sam import SAM
from sam_core.optimizers.two_pass import TwoPassOptimizer
from sam_core.optimizers.wrapper import OptimizerWrapper

#: Every method by its name in small letters, as command lines call it.
METHODS: dict[str, type[OptimizerWrapper]] = {method.__name__.lower(): method for method in (SAM, ASAM)}

__all__ = [
    "ASAM",
    "METHODS",
    "SAM",
    "OptimizerWrapper",
    "TwoPassOptimizer",
]
