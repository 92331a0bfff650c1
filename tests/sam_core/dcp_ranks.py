"""What each rank of test_dcp.py runs: torchrun --standalone --nproc-per-node 2 or 4 dcp_ranks.py save|load DIRECTORY.

All see the same global batches, each rank its part of them; every loss is a mean, and engines average gradients.
"""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sam_cases import BASES, METHODS

Case = tuple[str, str, str]  # method, base optimizer, and where MSAM is saved: outside at_weights() or inside
CASES: list[Case] = [(method, base, "outside") for method in METHODS for base in BASES]
CASES += [("msam", base, "inside") for base in BASES]
REMEMBERING = {"friendlysam": "average", "momentumsam": "average", "looksam": "flat_grad", "msam": "weight"}
DDP_CASES: list[Case] = [(method, "adamw", "outside") for method in METHODS]
FULL_CASES: list[Case] = [(method, "adamw", "outside") for method in REMEMBERING]  # by way of full tensors on rank 0
#: Under DistributedDataParallel each rank perturbs along its own gradient, which no other number of ranks repeats.
LOCAL_CASES: list[Case] = [("efficientsam", "adamw", "outside")]
OPTIONS = {"efficientsam": {"sample_ratio": 1.0}}  # or each rank would choose among samples of its own
NUM_BEFORE, NUM_AFTER = 3, 3  # LookSAM, k = 2, is saved when it has a g_v and takes it up at once


def build(case: Case, engine: str = "plain", *, fresh: bool = False) -> tuple[nn.Module, Any]:
    """Model and optimizer; fresh ones have other weights, rho and learning rate: what is not loaded must show."""
    method, base, _ = case
    torch.manual_seed(1 if fresh else 0)
    model: nn.Module = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Linear(3, 2)
    ).double()
    if engine == "fsdp2":
        fully_shard(model[2])  # 3 rows: with 4 ranks the last one has none
        fully_shard(model)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    options = {**BASES[base][1], **OPTIONS.get(method, {}), **({"lr": 123.0, "rho": 7.0} if fresh else {})}
    return model, METHODS[method](model.parameters(), BASES[base][0], **options)


def train(model: nn.Module, optimizer: Any, first: int, num_steps: int) -> None:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64).chunk(size)[rank]
        targets = torch.randint(2, (8,), generator=generator).chunk(size)[rank]

        def losses(indices=None, inputs=inputs, targets=targets):
            chosen = slice(None) if indices is None else indices
            return nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen], reduction="none")

        def closure(losses=losses):
            losses().mean().backward()

        optimizer.step(losses if optimizer.takes_sample_losses else closure)


def weights(model: nn.Module) -> list[Tensor]:
    """As they are, MSAM's moved ones too; whole."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def clean_weights(model: nn.Module, optimizer: Any) -> list[Tensor]:
    with optimizer.at_weights():
        return weights(model)


def place(optimizer: Any, name: str) -> Any:
    return optimizer.at_weights() if name == "inside" else nullcontext()


def save(model: nn.Module, optimizer: Any, path: Path, *, where: str, asynchronously: bool = False) -> None:
    with place(optimizer, where):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if asynchronously:
            dcp.async_save(state, checkpoint_id=path).result()
        else:
            dcp.save(state, checkpoint_id=path)


def load(model: nn.Module, optimizer: Any, path: Path, *, where: str, **options: Any) -> None:
    with place(optimizer, where):
        model_state, optimizer_state = get_state_dict(model, optimizer, options=StateDictOptions(**options))
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(**options),
        )


def resume(case: Case, engine: str, path: Path) -> dict[str, list[Tensor]]:
    """Load, MSAM where it was not saved, and train on."""
    model, optimizer = build(case, engine, fresh=True)
    load(model, optimizer, path, where="inside" if case[2] == "outside" else "outside")
    loaded = weights(model)
    train(model, optimizer, NUM_BEFORE, NUM_AFTER)
    return {"loaded": loaded, "final": clean_weights(model, optimizer)}


def save_and_go_on(case: Case, engine: str, directory: Path) -> dict[str, list[Tensor]]:
    """The run that is not interrupted."""
    model, optimizer = build(case, engine)
    train(model, optimizer, 0, NUM_BEFORE)
    path, asynchronously = name(directory, case, engine), case == ("friendlysam", "sgd", "outside")
    save(model, optimizer, path, where=case[2], asynchronously=asynchronously)
    loaded = weights(model)
    train(model, optimizer, NUM_BEFORE, NUM_AFTER)
    return {"loaded": loaded, "final": clean_weights(model, optimizer)}


def pass_on_whole(case: Case, *, broadcast: bool) -> dict[str, list[Tensor]]:
    """Through ``full_state_dict`` into a fresh sharded optimizer, from rank 0 alone or from every rank."""
    model, optimizer = build(case, "fsdp2")
    train(model, optimizer, 0, NUM_BEFORE)
    options = StateDictOptions(full_state_dict=True, cpu_offload=broadcast)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    other, resumed = build(case, "fsdp2", fresh=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(other, model_state, options=options)
    set_optimizer_state_dict(other, resumed, optimizer_state, options=options)
    loaded = weights(other)
    train(other, resumed, NUM_BEFORE, NUM_AFTER)
    return {"loaded": loaded, "final": clean_weights(other, resumed)}


def initialise(case: Case) -> bool:
    """Whether weights stay where they are when torch makes the state of a fresh optimizer."""
    model, optimizer = build(case, "fsdp2")
    before = weights(model)
    get_optimizer_state_dict(model, optimizer)
    return all(map(torch.equal, weights(model), before)) and bool(optimizer.state)


def name(directory: Path, case: Case, engine: str) -> Path:
    return directory / "-".join((*case, engine))


def main(task: str, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, dict[Case, Any]]
    if task == "save":
        results = {
            "fsdp2": {case: save_and_go_on(case, "fsdp2", directory) for case in CASES},
            "resumed": {case: resume(case, "fsdp2", name(directory, case, "fsdp2")) for case in CASES},
            "ddp": {case: save_and_go_on(case, "ddp", directory) for case in DDP_CASES},
            "ddp resumed": {case: resume(case, "ddp", name(directory, case, "ddp")) for case in LOCAL_CASES},
        }
        results["whole"] = {case: pass_on_whole(case, broadcast=False) for case in FULL_CASES}
        results["broadcast"] = {case: pass_on_whole(case, broadcast=True) for case in FULL_CASES}
        results["initialised"] = {case: initialise(case) for case in CASES}
    else:
        results = {"resumed": {case: resume(case, "fsdp2", name(directory, case, "fsdp2")) for case in CASES}}
    torch.save(results, directory / f"{task}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
