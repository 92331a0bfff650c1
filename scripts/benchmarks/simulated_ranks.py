"""One process as rank 0 of many: collectives are called as ever, and answer as if the other ranks held the same.

For counting what a rank of a large job calls and allocates, not for what it computes: a sum over ranks answers as their
mean. It stands on torch's own "fake" backend, which talks to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def simulated_ranks(num_ranks: int) -> Iterator[None]:
    """Within the block this process is rank 0 of ``num_ranks``, with DDP and FSDP2 as usual."""
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        with _SameEverywhere():  # type: ignore[no-untyped-call]
            yield
    finally:
        dist.destroy_process_group()


class _SameEverywhere(TorchDispatchMode):
    """Fills what the fake backend leaves empty."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d.allreduce_.default:  # DDP asks for a result, and the fake backend has none
            done: Any = torch.futures.Future()
            done.set_result(args[0])
            return args[0], _create_work_from_future(done).boxed()
        if func is torch.ops.c10d._allgather_base_.default:
            whole, part = args[:2]
            whole.view(-1, part.numel()).copy_(part.clone().view(1, -1))
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            part, whole = args[:2]
            part.copy_(whole.view(-1, part.numel())[0].clone().view_as(part))
        return result
