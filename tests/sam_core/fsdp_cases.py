"""Training that runs sharded by FSDP2 as well as in one process: what the ranks of test_fsdp.py do, and its truth.

Each rank has its own half of the batch and FSDP2 averages the gradients; one process takes the whole batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import sam_core
from sam_cases import BASES, DEFAULTS, METHODS
from sam_core import _tensors

#: Each method under FSDP2: "", it works as in one process, or in what it differs; what does not work raises.
FSDP2 = dict.fromkeys(DEFAULTS, "") | {
    "efficientsam": "The first backward is whole, not that of the drawn weights; each rank chooses among its samples.",
}
NUM_STEPS = 4
#: (method, base optimizer, variant); what a variant is, see shard() and train().
CASES = [
    *((method, base, "plain") for method in METHODS for base in BASES),
    *((method, "sgd", "kept") for method in METHODS),
    *((method, "adamw", "clipped") for method in ("sam", "wsam", "gsam", "looksam", "msam")),
    *((method, "sgd", variant) for method in ("sam", "asam") for variant in ("accumulated", "mixed", "offloaded")),
    *((method, "adamw", "mixed") for method in ("gsam", "friendlysam", "msam")),
    *((method, "sgd", variant) for method in ("sam", "gsam") for variant in ("scaled", "unfreed")),
    *((method, "sgd", "reloaded") for method in ("sam", "msam")),
    *((method, "sgd", "m_sharpness") for method in ("sam", "asam")),
]
FOUR_RANK_METHODS = ("sam", "asam", "gsam", "looksam", "friendlysam", "msam")
HSDP_CASES = [(method, "sgd", "plain") for method in FOUR_RANK_METHODS]
TENSOR_PARALLEL_CASES = [(method, "sgd", "tensor_parallel") for method in FOUR_RANK_METHODS]


class Net(nn.Module):
    """Sharded unevenly (5 rows), into nothing (1 row), frozen, tied and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied, self.unused = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.last = nn.Linear(4, 1)
        self.block[0].bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.tied(torch.tanh(self.first(inputs))))
        again = nn.functional.linear(self.block(hidden), self.tied.weight)
        return self.last(torch.tanh(again)).mean(1)


class Halves(sam_core.EfficientSAM):
    """EfficientSAM in one process that chooses its samples as two ranks do: each among its own half."""

    def _select(self, closure, losses):
        both = (closure() - losses).chunk(2)
        chosen = [rises.topk(-(-len(rises) // 2)).indices.sort().values for rises in both]
        return torch.cat([chosen[0], chosen[1] + len(both[0])])


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def make_batch(step: int, rank: int | None) -> tuple[Tensor, Tensor]:
    """The batch of a step, or a rank's part of it: of 4 ranks, two and two see the same."""
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 5), (8,)))
    return (inputs, targets) if rank is None else (inputs.chunk(2)[rank % 2], targets.chunk(2)[rank % 2])


def shard(model: nn.Module, variant: str = "plain", mesh=None) -> None:
    """Two FSDP units.

    ``kept``: weights stay gathered after a forward; ``unfreed``: also after the backward; ``mixed``: the root's own
    parameters stay plain tensors; ``offloaded``: shards are kept on the CPU; ``tensor_parallel``: the first layer
    is cut by the second dimension of the mesh as well.
    """
    if variant == "tensor_parallel":
        parallelize_module(model.first, mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))
        mesh = mesh["data"]
    options = {"mesh": mesh, "reshard_after_forward": False if variant == "kept" else None}
    if variant == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    fully_shard(model.block, **options)
    if variant != "mixed":
        fully_shard(model, **options)
    if variant == "unfreed":
        model.set_reshard_after_backward(False)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def backward(loss: Tensor, params: list[Tensor]) -> None:
    """As usual; and the mean over ranks of gradients that FSDP2 does not look after."""
    loss.backward()
    for param in params:
        if dist.is_initialized() and param.grad is not None and not isinstance(param.grad, DTensor):
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()


def differentiate(losses, part: Tensor, size: int) -> Tensor:
    loss = losses(part).sum() / size
    loss.backward()
    return loss


def train(method: str, base: str, variant: str, rank: int | None = None, mesh=None) -> dict[str, list]:
    """Weights and gradient norms of all steps: on this rank's shards, or for rank None in one process."""
    model = make_net()
    if rank is not None:
        shard(model, variant, mesh)
    params = list(model.parameters())  # once: while weights are gathered, the model's are others
    options = BASES[base][1] | ({"max_grad_norm": 0.05} if variant == "clipped" else {})
    build = METHODS[method]
    if method == "efficientsam" and rank is None:
        build = partial(Halves, **DEFAULTS[method])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=variant == "scaled")
    optimizer = build(params, BASES[base][0], **options)
    seen: dict[str, list] = {"weights": [], "norms": []}
    for step in range(NUM_STEPS):
        inputs, targets = make_batch(step, rank)

        def losses(indices=None, inputs=inputs, targets=targets):
            chosen = slice(None) if indices is None else indices
            return (model(inputs[chosen]) - targets[chosen]) ** 2

        def closure(losses=losses, inputs=inputs):
            parts = torch.arange(len(inputs)).chunk(2 if variant == "accumulated" else 1)
            for number, part in enumerate(parts, start=1):
                if rank is not None and variant == "accumulated":
                    model.set_requires_gradient_sync(number == len(parts))
                backward(scaler.scale(losses(part).sum() / len(inputs)), params)
            if variant == "kept":  # a metric; it leaves the weights of this point gathered
                with torch.no_grad():
                    losses()

        if variant == "m_sharpness":  # two parts, each of a quarter of either rank's samples
            parts = torch.arange(len(inputs)).reshape(-1, 2, 2).transpose(0, 1).flatten(1)
            optimizer.step_m_sharpness([partial(differentiate, losses, part, len(inputs)) for part in parts])
        else:
            optimizer.step(losses if optimizer.takes_sample_losses else closure, grad_scaler=scaler)
        scaler.update()
        seen["norms"].append(float(_tensors.norm([p.grad for p in params if p.grad is not None])))
        with optimizer.at_weights(), torch.no_grad():
            seen["weights"].append([full(p) for p in params])
            if variant == "kept":  # an evaluation; it leaves the clean weights gathered
                losses()
        if variant == "reloaded" and step == 1:
            reload(model, rank is not None)
    return seen


def reload(model: nn.Module, sharded: bool) -> None:
    """Write the first weights into the model, as a checkpoint is loaded."""
    saved = {name: value / 2 for name, value in make_net().state_dict().items()}
    if sharded:
        set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(saved)


def train_normed(method: str, rank: int | None = None) -> dict[str, Any]:
    """As :func:`train`, with batch normalisation; MemoryEfficientSAM by its own step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    if rank is not None:
        fully_shard(model[0])
        fully_shard(model)
    params = list(model.parameters())
    optimizer = METHODS[method](params, torch.optim.SGD, lr=0.1)
    loss_fn = nn.functional.mse_loss
    for step in range(NUM_STEPS):
        halves = [(inputs, inputs[:, :3]) for inputs, _ in (make_batch(step, half) for half in range(2))]
        mine = halves if rank is None else halves[rank : rank + 1]
        if method == "memoryefficientsam":
            optimizer.step_with_checkpointing(model, *mine[0], loss_fn)
        else:
            optimizer.step(sam_core.make_closure(model, mine, loss_fn, optimizer))
    return {"weights": [full(p) for p in params], "num_batches": model[1].num_batches_tracked}


def train_half(rank: int) -> dict[str, Any]:
    """SAM over AdamW with bfloat16 weights and activations; the shards and the reduction are float32."""
    model = make_net().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    params = list(model.parameters())
    optimizer, moves = sam_core.SAM(params, torch.optim.AdamW, rho=0.1, lr=0.01), []
    for step in range(NUM_STEPS):
        clean = [full(p) for p in params]

        def closure(step=step, clean=clean):
            moves.append([full(p) - w for p, w in zip(params, clean, strict=True)])
            inputs, targets = make_batch(step, rank)
            nn.functional.mse_loss(model(inputs.float()).float(), targets.float()).backward()

        optimizer.step(closure)
    return {"weights": [full(p) for p in params], "radii": [float(_tensors.norm(move)) for move in moves]}
