"""Optimizers that look at a perturbed point before they step; one method a file."""

from sam_core.optimizers.asam import ASAM
from sam_core.optimizers.checkpointed import MemoryEfficientSAM
from sam_core.optimizers.efficient import EfficientSAM
from sam_core.optimizers.friendly import FriendlySAM
from sam_core.optimizers.gsam import GSAM
from sam_core.optimizers.guarded import GuardedOptimizer
from sam_core.optimizers.looksam import LookSAM
from sam_core.optimizers.momentum import MomentumSAM
from sam_core.optimizers.msam import MSAM
from sam_core.optimizers.sam import SAM
from sam_core.optimizers.two_pass import TwoPassOptimizer
from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.optimizers.wsam import WSAM

#: Every method by its name in small letters, as command lines call it.
METHODS: dict[str, type[OptimizerWrapper]] = {
    method.__name__.lower(): method
    for method in (
        SAM,
        ASAM,
        GSAM,
        WSAM,
        FriendlySAM,
        LookSAM,
        EfficientSAM,
        MomentumSAM,
        MSAM,
        MemoryEfficientSAM,
    )
}

__all__ = [
    "ASAM",
    "GSAM",
    "METHODS",
    "MSAM",
    "SAM",
    "WSAM",
    "EfficientSAM",
    "FriendlySAM",
    "GuardedOptimizer",
    "LookSAM",
    "MemoryEfficientSAM",
    "MomentumSAM",
    "OptimizerWrapper",
    "TwoPassOptimizer",
]
