"""What a function asks of the device, counted by torch.profiler: operators, kernel launches, copies, waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Counts of one call; all but operators are 0 on a CPU.

    Args:
        operators: aten operators that Python called, those within another one left out.
        launches: kernels that the host started.
        copies: memory copied or filled by the driver.
        waits: times the host waited for a stream; the profiler's own waits for the whole device are left out.
    """

    operators: int
    launches: int
    copies: int
    waits: int


def count_calls(function: Callable[[], object], device: str) -> Calls:
    """Counts of one call, after one that warms up."""
    function()
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        function()
    events: list[Any] = list(profiler.events() or ())
    # Events of the device bear the kernels' names, not these: they belong to the host, whose calls are counted.
    names = [event.name for event in events]
    return Calls(
        operators=sum(
            name.startswith("aten::") and not _within_operator(e) for name, e in zip(names, events, strict=True)
        ),
        launches=sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for name in names),
        copies=sum(name.startswith(("cudaMemcpy", "cudaMemset")) for name in names),
        waits=sum(name.startswith(("cudaStreamSynchronize", "cudaEventSynchronize")) for name in names),
    )


def _within_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return parent is not None
