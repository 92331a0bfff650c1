"""rho in practice: its schedule, the layers that it moves, and a sweep that finds it."""

from sam_core.tuning.layers import group_by_perturbation, is_norm
from sam_core.tuning.plot import plot_sweeps
from sam_core.tuning.results import RhoRow, RhoRun, RhoSweep
from sam_core.tuning.schedule import Decay, RhoScheduler, Warmup
from sam_core.tuning.sweep import sweep_rho

__all__ = [  # noqa: RUF022, grouped as a table of contents
    # Over time
    "RhoScheduler",
    "Warmup",
    "Decay",
    # Over layers
    "group_by_perturbation",
    "is_norm",
    # Over a grid
    "sweep_rho",
    "RhoSweep",
    "RhoRow",
    "RhoRun",
    "plot_sweeps",
]
