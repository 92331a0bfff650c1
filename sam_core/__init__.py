"""Sharpness-aware minimization for PyTorch: optimizers, what training with them needs, and measures of flatness."""

from sam_core.ascent import AdaptiveAscent, L2Ascent, compute_perturbation
from sam_core.bounds import (
    RiskCertificate,
    VacuousBoundWarning,
    certify_risk,
    compute_pac_bayes_bound,
    description_length_bits,
    measure_description_length,
)
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
from sam_core.planning import estimate_communication, estimate_memory
from sam_core.sharpness import (
    compute_average_sharpness,
    compute_hessian,
    compute_hessian_sharpness,
    compute_hessian_trace,
    compute_hessian_vector_product,
    compute_loss_landscape,
    compute_m_sharpness,
    compute_sam_sharpness,
    compute_spectral_density,
    compute_top_eigenvalues,
    compute_worst_case_sharpness,
    hessian_operator,
    power_iteration_top_eigenvalue,
)
from sam_core.training import (
    check_ranks_agree,
    checkpointed,
    disable_running_stats,
    enable_running_stats,
    frozen_running_stats,
    kept_running_stats,
    make_closure,
    make_closures,
    train_sam_distributed,
    train_sam_with_accumulation,
    train_with_sam,
)
from sam_core.tuning import RhoScheduler, RhoSweep, group_by_perturbation, sweep_rho
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
    "train_sam_distributed",
    "check_ranks_agree",
    # rho in practice; more in sam_core.tuning
    "RhoScheduler",
    "group_by_perturbation",
    "sweep_rho",
    "RhoSweep",
    # Sharpness; more in sam_core.sharpness
    "compute_sam_sharpness",
    "compute_m_sharpness",
    "compute_worst_case_sharpness",
    "compute_average_sharpness",
    "compute_hessian_sharpness",
    "power_iteration_top_eigenvalue",
    "compute_top_eigenvalues",
    "compute_hessian_trace",
    "compute_spectral_density",
    "compute_hessian_vector_product",
    "compute_hessian",
    "hessian_operator",
    "compute_loss_landscape",
    # Bounds; more in sam_core.bounds
    "certify_risk",
    "RiskCertificate",
    "compute_pac_bayes_bound",
    "VacuousBoundWarning",
    "description_length_bits",
    "measure_description_length",
    # Memory and communication before the first run; more in sam_core.planning
    "estimate_memory",
    "estimate_communication",
    # Building blocks
    "L2Ascent",
    "AdaptiveAscent",
    "compute_perturbation",
    "perturb",
    "restore",
    "perturbed",
]
