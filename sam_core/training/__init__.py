"""What training around a two-pass optimizer needs: batch normalisation, checkpointing, accumulation, loops, ranks."""

from sam_core.training.accumulation import make_closure, make_closures
from sam_core.training.batchnorm import (
    disable_running_stats,
    enable_running_stats,
    frozen_running_stats,
    kept_running_stats,
)
from sam_core.training.checkpointing import checkpointed
from sam_core.training.distributed import train_sam_distributed
from sam_core.training.loops import train_sam_with_accumulation, train_with_sam
from sam_core.training.ranks import check_ranks_agree

__all__ = [
    "check_ranks_agree",
    "checkpointed",
    "disable_running_stats",
    "enable_running_stats",
    "frozen_running_stats",
    "kept_running_stats",
    "make_closure",
    "make_closures",
    "train_sam_distributed",
    "train_sam_with_accumulation",
    "train_with_sam",
]
