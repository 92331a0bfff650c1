"""Sharpness-aware minimization for PyTorch: optimizers, what training with them needs, and measures of flatness."""

from sam_core.ascent import AdaptiveAscent, L2Ascent, compute_perturbation
from sam_core.optimizers import (
    ASAM,
    GSAM,
    METHODS,
    MSAM,
    SAM,
    WSAM,
    EfficientSAM,
    FriendlySAM,
    LookSAM,
    MemoryEfficientSAM,
    MomentumSAM,
    OptimizerWrapper,
    TwoPassOptimizer,
)
from sam_core.sharpness import (
    compute_hessian_vector_product,
    compute_sam_sharpness,
    power_iteration_top_eigenvalue,
)
from sam_core.training import (
    checkpointed,
    disable_running_stats,
    enable_running_stats,
    frozen_running_stats,
    kept_running_stats,
    make_closure,
    make_closures,
    train_sam_with_accumulation,
    train_with_sam,
)
from sam_core.weights import perturb, perturbed, restore

__all__ = [  # noqa: RUF022, grouped as a table of contents
    # Optimizers
    "SAM",
    "ASAM",
    "GSAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "EfficientSAM",
    "MomentumSAM",
    "MSAM",
    "MemoryEfficientSAM",
    "METHODS",
    "OptimizerWrapper",
    "TwoPassOptimizer",
    # Training
    "enable_running_stats",
    "disable_running_stats",
    "frozen_running_stats",
    "kept_running_stats",
    "checkpointed",
    "make_closure",
    "make_closures",
    "train_with_sam",
    "train_sam_with_accumulation",
    # Sharpness
    "compute_sam_sharpness",
    "compute_hessian_vector_product",
    "power_iteration_top_eigenvalue",
    # Building blocks
    "L2Ascent",
    "AdaptiveAscent",
    "compute_perturbation",
    "perturb",
    "restore",
    "perturbed",
]
