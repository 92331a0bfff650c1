"""Whole weights that FSDP2 keeps from a forward: given up when their shards are written, or the next forward uses them.

A forward without a backward leaves the weights of the root, and of all modules with ``reshard_after_forward=False``,
gathered, and the next forward does not gather them again. So would an evaluation or a metric between the passes of a
step make the second gradient be taken at w, or the next step at w + perturbation.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch import Tensor

from sam_core._dtensors import all_plain


def forget_gathered(params: Collection[Tensor]) -> None:
    """Let the next forward gather these parameters anew; does nothing for those that no ``fully_shard`` holds.

    Torch has no public way from a parameter to the module that gathers it.
    """
    if all_plain(params) or "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    written = set(map(id, params))
    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule) and any(
            not group.is_sharded and any(id(held.sharded_param) in written for held in group.fsdp_params)
            for group in module._get_fsdp_state()._fsdp_param_groups
        ):
            module.reshard()
