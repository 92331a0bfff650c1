"""Bytes that training takes on each rank, before the first run: parameters, gradients, moments, the method's copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sam_core._checks import check_count, check_in
from sam_core.planning.costs import BASE_OPTIMIZERS, DTYPES, SHARDINGS, method_costs


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank, activations apart; made by :func:`estimate_memory`.

    Args:
        num_params: parameters of the whole model, over all ranks.
        parameters: the rank's parameters.
        gradients: one set of their gradients.
        base_state: the base optimizer's moments.
        method_state: what the method keeps between steps.
        buckets: DDP's copy of the gradients.
        perturbation: the method's copies while the second closure runs.
        compute: while a closure runs, beyond the gradients: FSDP2's unsharded units, autocast's copies.
        temporaries: at most, while weights move or the base optimizer steps; the activations are gone by then.
    """

    num_params: int
    parameters: int
    gradients: int
    base_state: int
    method_state: int
    buckets: int
    perturbation: int
    compute: int
    temporaries: int

    @property
    def resident(self) -> int:
        """Bytes from step to step, gradients included: they stay until the next closure."""
        return self.parameters + self.gradients + self.base_state + self.method_state + self.buckets

    @property
    def in_closure(self) -> int:
        """Most bytes while a closure runs; activations come on top."""
        return self.resident + self.perturbation + self.compute

    @property
    def in_step(self) -> int:
        """Most bytes outside the closures."""
        return self.resident + self.temporaries

    @property
    def peak(self) -> int:
        """Most bytes of all, activations apart."""
        return max(self.in_closure, self.in_step)

    @property
    def peak_per_parameter(self) -> float:
        """Bytes on each rank for each parameter of the whole model."""
        return self.peak / self.num_params


def estimate_memory(
    num_params: int,
    method: str,
    base_optimizer: str = "adamw",
    *,
    param_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    sharding: str = "none",
    num_ranks: int = 1,
    unit_params: int = 0,
    root_params: int = 0,
    foreach: bool | None = None,
    gradient_as_bucket_view: bool = False,
    grad_scaler: bool = False,
    k: int = 5,
    perturbation_ratio: float = 0.5,
) -> MemoryEstimate:
    """Bytes that training takes on each rank, activations apart.

    With n parameters on this rank (all of them; under FSDP2 num_params / num_ranks), b bytes each:

        resident    n b (parameters + gradients 1 + base state + method state) + n b for DDP's buckets
        in closure  resident + n b (backup of the weights, and the gradient at w for GSAM, WSAM, LookSAM) + compute
        in step     resident + the larger of: what the move to w + e makes, what the base optimizer's step makes

    SAM keeps a backup of the weights, EfficientSAM that of its share. ASAM makes |w|, T g and T^2 g for a moment,
    FriendlySAM g - sigma m, WSAM g_s - g, each beside what it keeps; MSAM and the averages keep one copy between steps,
    LookSAM g_v but not before a SAM step. Averages and |w| of half types are float32. Under DDP with gradients as views
    of the buckets, a local first pass has gradients of its own.

    FSDP2, with units of U parameters and R in the root, which stays whole from the forward to the end of the backward
    (c bytes a parameter in computing, r in reducing):

        compute = max(2 R c + U (3 c + r) - 2 U b / N,  4 R c + U r)

    In the middle of the backward: the root and its head's gradient; a unit and its gradients, the next one's gathered
    parameters, and the last one's gradients on their way. At its end, if one matrix is both head and embedding: the
    root, its two gradients and their sum.

    Autocast keeps n c of cast weights in the forward, n b of gradients come in the backward: compute is what the first
    exceed the second by. (If the backward runs within the autocast block, both are alive.)

    The estimate leaves out what is one number or one tensor, such as step counts and the temporaries of a loop.

    Args:
        num_params: parameters of the whole model, >= 1.
        method: a name of :data:`sam_core.METHODS`, or "base" for the base optimizer alone.
        base_optimizer: a name of :data:`sam_core.planning.BASE_OPTIMIZERS`.
        param_dtype: of parameters, gradients and moments; float32 also for mixed precision with master weights.
        compute_dtype: of autocast, or of FSDP2's ``MixedPrecisionPolicy(param_dtype=...)``; None: param_dtype.
        reduce_dtype: of FSDP2's ``MixedPrecisionPolicy(reduce_dtype=...)``; None: compute_dtype, as for FSDP2 itself.
        sharding: "none", "ddp" (``DistributedDataParallel``) or "fsdp" (``fully_shard``, resharding after forward).
        num_ranks: processes, >= 1; 1 for "none".
        unit_params: parameters of the largest module given to ``fully_shard``; needed for "fsdp".
        root_params: those that only the outermost ``fully_shard`` takes, such as embeddings.
        foreach: fused lists in the base optimizer's step; None: as torch chooses on a GPU, not for FSDP2's parameters.
        gradient_as_bucket_view: DDP's option.
        grad_scaler: a loss scaler is in use; the first step then makes unscaled gradients of its own.
        k: LookSAM's.
        perturbation_ratio: EfficientSAM's.

    Returns:
        The parts in bytes, rounded up, and their sums.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> for method in ("base", "sam", "gsam"):  # a billion parameters, each of 64 ranks holds a 64th
        ...     estimate = estimate_memory(10**9, method, sharding="fsdp", num_ranks=64, unit_params=40_000_000)
        ...     print(method, round(estimate.peak / 2**30, 2), "GiB")
        base 0.82 GiB
        sam 0.88 GiB
        gsam 0.94 GiB
    """
    check_count("num_params", num_params, at_least=1)
    check_in("base_optimizer", base_optimizer, tuple(BASE_OPTIMIZERS))
    check_in("param_dtype", param_dtype, DTYPES)
    check_in("compute_dtype", compute_dtype, (None, *DTYPES))
    check_in("reduce_dtype", reduce_dtype, (None, *DTYPES))
    check_in("foreach", foreach, (None, True, False))
    check_in("gradient_as_bucket_view", gradient_as_bucket_view, (True, False))
    check_in("grad_scaler", grad_scaler, (True, False))
    check_ranks(sharding, num_ranks)
    check_units(sharding, num_params, unit_params, root_params)
    costs = method_costs(method, k=k, perturbation_ratio=perturbation_ratio)

    num_held = num_params / num_ranks if sharding == "fsdp" else num_params
    one = num_held * param_dtype.itemsize
    state_copies, step_copies = BASE_OPTIMIZERS[base_optimizer]
    fused = foreach if foreach is not None else sharding != "fsdp"

    ascent = costs.ascent.num_bytes(num_held, param_dtype)
    if sharding == "ddp" and gradient_as_bucket_view and costs.local_ascent:
        ascent += one  # the first pass's own gradients, beside the buckets
    if grad_scaler and costs.second_passes > 0 and not costs.keeps_gradient:
        ascent += one
    update = costs.update.num_bytes(num_held, param_dtype)
    descent = costs.held.num_bytes(num_held, param_dtype) + (step_copies * one if fused else 0)

    width = (compute_dtype or param_dtype).itemsize
    if sharding == "fsdp" and num_ranks > 1:
        reduced = (reduce_dtype or compute_dtype or param_dtype).itemsize
        middle = unit_params * (3 * width + reduced - 2 * param_dtype.itemsize / num_ranks)
        compute = max(2 * root_params * width + middle, 4 * root_params * width + unit_params * reduced)
    else:
        compute = max(0, num_held * width - one) if compute_dtype not in (None, param_dtype) else 0

    return MemoryEstimate(
        num_params=num_params,
        parameters=math.ceil(one),
        gradients=math.ceil(one),
        base_state=math.ceil(state_copies * one),
        method_state=math.ceil(costs.state.num_bytes(num_held, param_dtype)),
        buckets=math.ceil(one) if sharding == "ddp" and not gradient_as_bucket_view else 0,
        perturbation=math.ceil(costs.closure.num_bytes(num_held, param_dtype)),
        compute=math.ceil(compute),
        temporaries=math.ceil(max(ascent, update, descent)),
    )


def check_ranks(sharding: str, num_ranks: int) -> None:
    """Refuse an unknown sharding, or a number of ranks that it cannot have."""
    check_in("sharding", sharding, SHARDINGS)
    check_count("num_ranks", num_ranks, at_least=1)
    if sharding == "none" and num_ranks != 1:
        raise ValueError(f"num_ranks must be 1 without sharding, got {num_ranks!r}.")


def check_units(sharding: str, num_params: int, unit_params: int, root_params: int) -> None:
    """Refuse units that are larger than the model, or missing where the model is cut into them."""
    check_count("unit_params", unit_params, at_least=1 if sharding == "fsdp" else 0)
    check_count("root_params", root_params)
    if unit_params + root_params > num_params:
        raise ValueError(
            f"unit_params + root_params must be <= num_params = {num_params!r}, got {unit_params + root_params!r}."
        )
