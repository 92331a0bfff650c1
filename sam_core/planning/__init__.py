"""What training with a method takes, before the first run: bytes on each rank, bytes between ranks, passes."""

from sam_core.planning.communication import CommunicationEstimate, estimate_communication, ring_bytes
from sam_core.planning.costs import BASE_OPTIMIZERS, METHOD_NAMES, MethodCosts, method_costs
from sam_core.planning.memory import MemoryEstimate, estimate_memory
from sam_core.planning.recording import (
    Collective,
    MemoryRecord,
    record_collectives,
    record_memory,
)

__all__ = [  # noqa: RUF022, grouped as a table of contents
    # Estimates
    "estimate_memory",
    "MemoryEstimate",
    "estimate_communication",
    "CommunicationEstimate",
    "ring_bytes",
    "method_costs",
    "MethodCosts",
    "METHOD_NAMES",
    "BASE_OPTIMIZERS",
    # Measurements
    "record_memory",
    "MemoryRecord",
    "record_collectives",
    "Collective",
]
