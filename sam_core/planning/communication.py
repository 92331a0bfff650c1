"""Bytes and collectives of a training step on each rank, and what they make of its time: by counting passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sam_core._checks import check_count, check_in, check_nonnegative, check_positive
from sam_core.planning.costs import DTYPES, method_costs
from sam_core.planning.memory import check_ranks, check_units

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


def ring_bytes(kind: str, num_bytes: float, num_ranks: int) -> float:
    """Bytes that each rank sends in one collective over a ring of N ranks.

        all_reduce  2 (N - 1) / N B;    all_gather, reduce_scatter and, on average, broadcast  (N - 1) / N B

    Args:
        kind: a name of :data:`KINDS`.
        num_bytes: B, of the whole tensor: what is reduced, or what is gathered from all ranks.
        num_ranks: N >= 1.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> ring_bytes("all_reduce", 100, num_ranks=4)
        150.0
    """
    check_in("kind", kind, KINDS)
    check_nonnegative("num_bytes", num_bytes)
    check_count("num_ranks", num_ranks, at_least=1)
    return (2 if kind == "all_reduce" else 1) * num_bytes * (num_ranks - 1) / num_ranks


@dataclass(frozen=True, kw_only=True)
class CommunicationEstimate:
    """What a rank sends in one step, the mean over LookSAM's k; made by :func:`estimate_communication`.

    Args:
        num_ranks: processes.
        passes: forward and backward passes a step, in units of a whole one.
        quiet_passes: what those of them cost that do not communicate, in units of a whole one.
        synchronised_passes: how many communicate.
        all_reduced: bytes of the tensors that are all-reduced.
        all_gathered: bytes of the tensors that are all-gathered.
        reduce_scattered: bytes of the tensors that are reduce-scattered.
        num_collectives: collectives on parameters or gradients.
        num_scalars: all-reduces of a single number, for norms over shards.
    """

    num_ranks: int
    passes: float
    quiet_passes: float
    synchronised_passes: float
    all_reduced: float
    all_gathered: float
    reduce_scattered: float
    num_collectives: float
    num_scalars: float

    @property
    def bytes_sent(self) -> float:
        """Bytes that each rank sends over a ring, the single numbers apart."""
        gathered = ring_bytes("all_gather", self.all_gathered, self.num_ranks)
        reduced = ring_bytes("all_reduce", self.all_reduced, self.num_ranks)
        return gathered + reduced + ring_bytes("reduce_scatter", self.reduce_scattered, self.num_ranks)

    def step_seconds(self, *, pass_seconds: float, bytes_per_second: float) -> tuple[float, float]:
        """Time of a step if communication hides behind the computing of its pass as well as it can, and if not at all.

            sum over passes of max(compute, bytes / bandwidth),    sum over passes of compute + bytes / bandwidth

        Bandwidth only: neither the latency of a collective, which grows with the ranks, nor stragglers, nor the base
        optimizer's step. A pass costs the same on any number of ranks: the batch of a rank is fixed (weak scaling).

        Args:
            pass_seconds: a forward and a backward on one rank's batch, >= 0.
            bytes_per_second: what a rank sends, > 0.

        Returns:
            The two times in seconds.

        Raises:
            ValueError: for a bad option.

        Example:
            >>> sam = estimate_communication(10**9, "sam", sharding="ddp", num_ranks=64)
            >>> [round(seconds, 2) for seconds in sam.step_seconds(pass_seconds=0.5, bytes_per_second=25e9)]
            [1.0, 1.31]
        """
        check_nonnegative("pass_seconds", pass_seconds)
        check_positive("bytes_per_second", bytes_per_second)
        sending = self.bytes_sent / bytes_per_second
        quiet = self.quiet_passes * pass_seconds
        hidden = quiet + max((self.passes - self.quiet_passes) * pass_seconds, sending)
        return hidden, self.passes * pass_seconds + sending


def estimate_communication(
    num_params: int,
    method: str,
    *,
    sharding: str,
    num_ranks: int,
    ascent: str = "local",
    param_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    num_units: int = 1,
    root_params: int = 0,
    bucket_bytes: int = 25 * 2**20,
    k: int = 5,
) -> CommunicationEstimate:
    """What a rank sends in one step: the bytes of a pass times the passes that are synchronised.

        DDP     a pass all-reduces the gradients, P b bytes, in buckets
        FSDP2   a pass gathers each unit's parameters twice, the root's once, and reduce-scatters all gradients:
                (2 (P - R) + R) c + P r bytes

    Under DDP with a local ascent SAM, ASAM and MemoryEfficientSAM synchronise one pass of two, as plain training does,
    and EfficientSAM always; GSAM, WSAM, FriendlySAM and MomentumSAM both, LookSAM 1 + 1/k, MSAM one. Under FSDP2 every
    pass gathers and reduces, EfficientSAM's forward without graph gathers the units once more, and each norm or product
    over the parameters agrees on one number.

    Not counted: DDP's broadcasts of buffers (such as batch normalisation's) before a forward, and padding where a
    tensor's first dimension is not a multiple of the ranks.

    Args:
        num_params: P >= 1.
        method: a name of :data:`sam_core.METHODS`, or "base" for the base optimizer alone.
        sharding: "none", "ddp" or "fsdp".
        num_ranks: processes, >= 1; 1 for "none".
        ascent: "local": under DDP the first pass stays on its rank if the method allows it (``ascent_context=
            ddp_model.no_sync``); "synchronised": it does not. Under FSDP2 the ascent is always global.
        param_dtype: of parameters and gradients, b bytes.
        compute_dtype: of FSDP2's ``MixedPrecisionPolicy(param_dtype=...)``, c bytes; None: param_dtype.
        reduce_dtype: of FSDP2's ``MixedPrecisionPolicy(reduce_dtype=...)``, r bytes; None: compute_dtype.
        num_units: modules given to ``fully_shard``, the outermost apart, >= 1.
        root_params: R, what only the outermost ``fully_shard`` takes.
        bucket_bytes: DDP's ``bucket_cap_mb`` in bytes. The count of collectives is that of full buckets: real ones end
            with a whole tensor, and by default the first is smaller.
        k: LookSAM's.

    Returns:
        The parts and their sums.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> for method in ("base", "sam", "gsam"):
        ...     estimate = estimate_communication(10**9, method, sharding="ddp", num_ranks=64)
        ...     print(method, round(estimate.bytes_sent / 1e9, 2), "GB")
        base 7.88 GB
        sam 7.88 GB
        gsam 15.75 GB
    """
    check_count("num_params", num_params, at_least=1)
    check_in("ascent", ascent, ("local", "synchronised"))
    check_in("param_dtype", param_dtype, DTYPES)
    check_in("compute_dtype", compute_dtype, (None, *DTYPES))
    check_in("reduce_dtype", reduce_dtype, (None, *DTYPES))
    check_ranks(sharding, num_ranks)
    check_count("num_units", num_units, at_least=1)
    check_units("none", num_params, 0, root_params)
    check_count("bucket_bytes", bucket_bytes, at_least=1)
    costs = method_costs(method, k=k)

    whole_passes = 1 + costs.second_passes
    gathers = sharding == "fsdp" and num_ranks > 1
    reduces = sharding == "ddp" and num_ranks > 1
    local = costs.always_local or (costs.local_ascent and ascent == "local")
    synchronised = 0.0 if num_ranks == 1 else 1.0 if reduces and local else whole_passes
    loud = 0.0 if num_ranks == 1 else costs.second_pass if reduces and local else costs.passes
    width = (compute_dtype or param_dtype).itemsize
    reduced = (reduce_dtype or compute_dtype or param_dtype).itemsize
    one = num_params * param_dtype.itemsize
    num_roots = 1 if root_params else 0
    forwards = costs.choosing_forwards if gathers else 0
    gathered = synchronised * (2 * num_params - root_params) + forwards * (num_params - root_params)
    calls = 3 * num_units + 2 * num_roots if gathers else math.ceil(one / bucket_bytes) if reduces else 0
    return CommunicationEstimate(
        num_ranks=num_ranks,
        passes=costs.passes,
        quiet_passes=costs.passes - loud,
        synchronised_passes=synchronised,
        all_reduced=synchronised * one if reduces else 0.0,
        all_gathered=gathered * width if gathers else 0.0,
        reduce_scattered=synchronised * num_params * reduced if gathers else 0.0,
        num_collectives=synchronised * calls + forwards * num_units,
        num_scalars=costs.norms if gathers else 0.0,
    )
