"""What training around a two-pass optimizer needs: batch normalisation, loops."""

from sam_core.training.batchnorm import disable_running_stats, enable_running_stats, frozen_running_stats
from sam_core.training.loops import train_with_sam

__all__ = [
    "disable_running_stats",
    "enable_running_stats",
    "frozen_running_stats",
    "train_with_sam",
]
