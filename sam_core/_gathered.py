"""Whole weights that FSDP2 keeps from a forward: given up when their shards are written, or the next forward uses them.

A forward without a backward leaves the weights of the root, and of all modules with ``reshard_after_forward=False``,
gathered, and the next forward does not gather them again. So would an evaluation or a metric between the passes of a
step make the second gradient be taken at w, or the next step at w + perturbation.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sam_core._dtensors import all_plain

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def forget_gathered(params: Collection[Tensor]) -> None:
    """Let the next forward gather these parameters anew; does nothing for those that no ``fully_shard`` holds."""
    if all_plain(params):
        return
    written = set(map(id, params))
    for module, group in _gathered_groups():
        if any(id(held.sharded_param) in written for held in group.fsdp_params):
            module.reshard()


def check_sharded(params: Collection[Tensor]) -> None:
    """Raise ValueError for whole copies of parameters: they get no gradient, and are no more after the backward.

    And for those of FSDP1: see :func:`refuse_flattened`.
    """
    refuse_flattened(params)
    given = set(map(id, params))
    for module, group in _gathered_groups():
        if any(id(held.unsharded_param) in given for held in group.fsdp_params):
            raise ValueError(
                "params must be the shards that fully_shard made, got weights that a forward gathered from them: "
                f"call reshard() of the {type(module).__name__} before model.parameters()."
            )


def refuse_flattened(params: Collection[Tensor]) -> None:
    """Raise ValueError for FSDP1's, plain tensors with a part of the weights: their norm would be another on each rank.

    FSDP1 may also take them after the optimizer was made, as accelerate does.
    """
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise ValueError(
            "params must not be those of FullyShardedDataParallel (FSDP1): shard with fully_shard instead."
        )


def _gathered_groups() -> Iterator[tuple[FSDPModule, Any]]:
    """All FSDP2 modules whose weights are gathered now; torch has no public way to them from a parameter."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if not group.is_sharded:
                    yield module, group
