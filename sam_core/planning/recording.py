"""What a step really takes, to hold estimates against: the memory it allocates, the collectives it calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_core.planning.communication import KINDS, ring_bytes


@dataclass
class MemoryRecord:
    """Bytes on the CPU that a block had allocated and not freed; filled by :func:`record_memory` when it ends."""

    levels: list[tuple[int, int]] = field(default_factory=list)  # (nanoseconds, bytes from then on)
    spans: list[tuple[str, int, int]] = field(default_factory=list)  # (name, nanoseconds at its begin, at its end)

    @property
    def final(self) -> int:
        """Bytes alive at the end of the block."""
        return self.levels[-1][1] if self.levels else 0

    def peak(self, name: str | None = None, *, outside: str | None = None) -> int:
        """Most bytes alive.

        Args:
            name: only while a ``torch.profiler.record_function`` of that name was open; None: at any time.
            outside: only while none of that name was open.
        """
        inside, left_out = self._spans(name), self._spans(outside)
        counted = [
            level
            for time, level in self.levels
            if (name is None or _within(time, inside)) and not _within(time, left_out)
        ]
        return max(counted, default=0)

    def _spans(self, name: str | None) -> list[tuple[int, int]]:
        return [(begin, end) for span, begin, end in self.spans if span == name]


def _within(time: int, spans: list[tuple[int, int]]) -> bool:
    return any(begin <= time <= end for begin, end in spans)


@contextmanager
def record_memory() -> Iterator[MemoryRecord]:
    """Within the block every allocation on the CPU is noted, in C++ as well.

    Tensors made before count as nothing, and must not be freed in it: make the model within the block. What another
    thread frees, as gloo's do, is not seen. On CUDA ``torch.cuda.max_memory_allocated`` tells as much.

    Example:
        >>> with record_memory() as record:
        ...     kept = torch.zeros(1000)
        ...     with torch.profiler.record_function("shift"):
        ...         moved = kept.clone()
        ...     del moved
        >>> record.final, record.peak("shift")
        (4000, 8000)
    """
    record = MemoryRecord()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield record
    changes = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.is_user_annotation():
            record.spans.append((event.name(), event.start_ns(), event.end_ns()))
    level = 0
    for time, num_bytes in sorted(changes, key=lambda change: change[0]):
        level += num_bytes
        record.levels.append((time, level))


class Collective(NamedTuple):
    """One call: its kind, a name that :func:`ring_bytes` knows, and the bytes of the whole tensor."""

    kind: str
    num_bytes: int

    def bytes_sent(self, num_ranks: int) -> float:
        """Bytes that each rank sends over a ring."""
        return ring_bytes(self.kind, self.num_bytes, num_ranks)


@contextmanager
def record_collectives() -> Iterator[list[Collective]]:
    """Within the block every collective that this rank calls is noted, those of DDP and FSDP2 as well.

    Example:
        >>> with record_collectives() as collectives:
        ...     torch.ones(3).sum()  # nobody to talk to
        tensor(3.)
        >>> collectives
        []
    """
    recorder = _Recorder()
    with recorder:
        yield recorder.collectives


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.name().split("::")[1].strip("_").replace("allreduce", "all_reduce")
            kind = next((kind for kind in KINDS if name.replace("allgather", "all_gather").startswith(kind)), None)
            if kind is not None:
                self.collectives.append(Collective(kind, max(map(_num_bytes, (*args, result)))))
        return result


def _num_bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
