"""What training around a two-pass optimizer needs: batch normalisation, checkpointing, accumulation, loops."""

from sam_core.training.accumulation import make_closure, make_closures
from sam_core.training.batchnorm import (
    disable_running_stats,
    enable_running_stats,
    frozen_running_stats,
    kept_running_stats,
)
from sam_core.training.checkpointing import checkpointed
from sam_core.training.loops import train_sam_with_accumulation, train_with_sam

__all__ = [
    "checkpointed",
    "disable_running_stats",
    "enable_running_stats",
    "frozen_running_stats",
    "kept_running_stats",
    "make_closure",
    "make_closures",
    "train_sam_with_accumulation",
    "train_with_sam",
]
