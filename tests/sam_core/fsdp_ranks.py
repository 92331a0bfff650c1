"""What each rank of test_fsdp.py runs: torchrun --standalone --nproc-per-node 2 fsdp_ranks.py DIRECTORY."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fsdp_cases import (
    CASES,
    HSDP_CASES,
    TENSOR_PARALLEL_CASES,
    full,
    make_batch,
    make_net,
    shard,
    train,
    train_half,
    train_normed,
)
from sam_cases import METHODS
from sam_core import _tensors

PASSES = [(method, number) for method in METHODS for number in (1, 2) if (method, number) != ("msam", 2)]


def build(method: str, **options: Any):
    """An optimizer over sharded parameters, and a function that makes its closure; ``spoil``: factors of its losses."""
    model = make_net()
    shard(model)
    options |= {"k": 1} if method == "looksam" else {}
    optimizer = METHODS[method](list(model.parameters()), torch.optim.SGD, lr=0.1, momentum=0.9, **options)

    def make(rank: int, spoil: tuple[float, ...] = (1.0, 1.0)):
        factors = iter(spoil)
        inputs, targets = make_batch(0, rank)

        def losses(indices=None):
            chosen = slice(None) if indices is None else indices
            factor = next(factors) if torch.is_grad_enabled() else 1.0
            return (model(inputs[chosen]) - targets[chosen]) ** 2 * factor

        def closure():
            losses().mean().backward()

        return losses if optimizer.takes_sample_losses else closure

    return optimizer, make


def clean(optimizer) -> list[Tensor]:
    with optimizer.at_weights():
        return [full(p) for group in optimizer.param_groups for p in group["params"]]


def count_collectives(method: str) -> dict[str, int]:
    """Collectives of one step, and the largest tensor that an all-reduce of ours takes."""
    optimizer, make = build(method)
    optimizer.step(make(0))  # FSDP2 sets itself up, MSAM has a momentum from here on
    with CommDebugMode() as mode, mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        optimizer.step(make(0))
    counts = {str(operation).split(".")[-1]: number for operation, number in mode.get_comm_counts().items()}
    return counts | {"largest": max(call.args[0].numel() for call in all_reduce.call_args_list)}


def skip(method: str, bad_pass: int, rank: int) -> dict[str, Any]:
    """A loss that is not finite on rank 1 alone."""
    optimizer, make = build(method, nonfinite="skip")
    optimizer.step(make(rank))
    before = clean(optimizer)
    spoil = [1.0, 1.0]
    spoil[bad_pass - 1] = float("nan") if rank == 1 else 1.0
    optimizer.step(make(rank, tuple(spoil)))
    same = all(map(torch.equal, before, clean(optimizer)))
    optimizer.nonfinite = "raise"
    try:
        optimizer.step(make(rank, tuple(spoil)))
        message = ""
    except FloatingPointError as error:
        message = str(error)
    return {
        "skipped": optimizer.num_skipped,
        "message": message,
        "same": same and all(map(torch.equal, before, clean(optimizer))),
    }


def overflow(bad_pass: int, rank: int) -> dict[str, Any]:
    """An infinite gradient in rank 1's shard alone, with a loss scaler."""
    optimizer, make = build("sam")
    scaler, before, calls = torch.amp.GradScaler("cpu", init_scale=1024.0), clean(optimizer), []
    param = optimizer.param_groups[0]["params"][0]

    def closure():
        make(rank, (float(scaler.scale(torch.ones(()))),))()
        calls.append(1)
        if len(calls) == bad_pass and rank == 1:
            param.grad.to_local().fill_(torch.inf)

    optimizer.step(closure, grad_scaler=scaler)
    scaler.update()
    same = all(map(torch.equal, before, clean(optimizer)))
    return {"scale": scaler.get_scale(), "skipped": optimizer.num_skipped, "same": same}


def refuse(method: str, rank: int) -> str:
    """The error of a first pass on this rank's own gradient."""
    optimizer, make = build(method)
    try:
        optimizer.step(make(rank), ascent_context=nullcontext)
    except ValueError as error:
        return str(error)
    return ""


def compute_arithmetic(rank: int) -> dict[str, Any]:
    """Sums and entrywise operations beside those on whole float64 tensors, over every kind of placement at once."""
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    placements = [Shard(0), Shard(1), Replicate(), Shard(0), Partial(), None]
    shapes = [(5, 3), (2, 3), (4,), (1, 2), (3, 2), (3,)]

    def draw(size: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        whole = [(torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype) for shape in shapes]
        split = [
            tensor if kind is None else distribute_tensor(tensor, mesh, [kind])
            for tensor, kind in zip(whole, placements, strict=True)
        ]
        return whole, split

    pairs = []
    for size, dtype in ((1.0, torch.float64), (1e25, torch.float32), (1e-30, torch.float32), (1e-3, torch.bfloat16)):
        (whole, split), (others, split_others) = draw(size, dtype), draw(1.0, dtype)
        shuffled = [
            other if kind is None else other.redistribute(mesh, [Replicate() if kind == Shard(0) else Shard(0)])
            for other, kind in zip(split_others, placements, strict=True)
        ]
        pairs.append((_tensors.norm(split), _tensors.norm(whole)))
        for right in (split_others, shuffled):
            pairs.append((torch.tensor(_tensors.dot(split, right)), torch.tensor(_tensors.dot(whole, others))))
            pairs += zip(map(full, _tensors.multiply(split, right)), _tensors.multiply(whole, others), strict=True)
        moved = _tensors.clone([x for x, kind in zip(split, placements, strict=True) if kind != Partial()])
        _tensors.add_(moved, [y for y, kind in zip(shuffled, placements, strict=True) if kind != Partial()], alpha=0.5)
        summed = map(partial(torch.add, alpha=0.5), whole, others)
        pairs += zip(
            map(full, moved), [z for z, k in zip(summed, placements, strict=True) if k != Partial()], strict=True
        )
    bad = [torch.full((1,), float("nan") if rank == 1 else 1.0)]
    bad_norm = _tensors.norm([DTensor.from_local(bad[0], mesh, [Shard(0)])])
    return {"pairs": pairs, "bad": bad_norm}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    if world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["train"] = {case: train(*case, rank=rank, mesh=mesh) for case in HSDP_CASES}
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        results["train"] |= {case: train(*case, rank=rank // 2, mesh=mesh) for case in TENSOR_PARALLEL_CASES}
    else:
        results["train"] = {case: train(*case, rank=rank) for case in CASES}
        results["counts"] = {method: count_collectives(method) for method in METHODS}
        results["skips"] = {case: skip(*case, rank=rank) for case in PASSES}
        results["overflows"] = {bad_pass: overflow(bad_pass, rank) for bad_pass in (1, 2)}
        results["refusals"] = {method: refuse(method, rank) for method in METHODS}
        results["normed"] = {method: train_normed(method, rank) for method in ("sam", "memoryefficientsam")}
        results["arithmetic"] = compute_arithmetic(rank)
        results["half"] = train_half(rank)
    torch.save(results, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
