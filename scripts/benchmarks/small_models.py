"""Small models that estimates are held against: what a few steps of a method really allocate, and really send."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from sam_core import METHODS, OptimizerWrapper
from sam_core.planning import Collective, record_collectives, record_memory

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.01}),
    "sgd_momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw_amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {"weight_decay": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"weight_decay": 0.01}),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.01}),
}
K = 2  # of LookSAM
FULL_PRECISION = MixedPrecisionPolicy()


class Measured(NamedTuple):
    """The sums of :class:`sam_core.planning.MemoryEstimate`, as they were."""

    resident: int
    in_closure: int
    in_step: int

    @property
    def peak(self) -> int:
        """Most bytes of all."""
        return max(self.in_closure, self.in_step)


class Block(nn.Module):
    """h + tanh(h U^T) D, with matrices [hidden, width] both, so that their rows divide among many ranks."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(hidden, width) * hidden**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """[B, width] to [B, width]."""
        return states + torch.tanh(states @ self.up.T) @ self.down


class LanguageModel(nn.Module):
    """Blocks between an embedding and a head that share one matrix: sharded, it is a transformer without attention."""

    def __init__(self, depth: int, width: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.unit_params = 2 * width * hidden
        self.root_params = vocabulary * width

    def forward(self, tokens: Tensor) -> Tensor:
        """[B] token numbers to [B, vocabulary] scores."""
        states = self.embedding(tokens)
        for block in self.blocks:
            states = block(states)
        scores: Tensor = states @ self.embedding.weight.T
        return scores


def matrices(depth: int = 24, width: int = 128, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A stack of equal matrices, whose activations on a few samples are nothing beside them."""
    model = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(depth)])
    for param in model.parameters():
        nn.init.normal_(param, std=width**-0.5)  # gradients of a size that needs no second look
    return model


def build(method: str, base: str, params: Any, **options: Any) -> Any:
    """The method over a base optimizer, or the base optimizer alone."""
    kind, base_options = OPTIMIZERS[base]
    if method == "base":
        return kind(params, lr=1e-6, **base_options, **options)
    if method == "looksam":
        options = {"k": K, **options}
    return METHODS[method](params, kind, lr=1e-6, **base_options, **options)


def make_step(
    optimizer: Any, losses: Callable[[], Tensor], context: Any = None, scaler: torch.amp.GradScaler | None = None
) -> Callable[[], object]:
    """One training step, for the profiler a "step" with "closure"s in it; ``losses()`` gives one loss a sample [B]."""

    def closure(indices: Tensor | None = None) -> Tensor:
        with record_function("closure"):
            values = losses() if indices is None else losses()[indices]
            if getattr(optimizer, "takes_sample_losses", False):
                return values
            torch.autograd.backward(values.mean() if scaler is None else scaler.scale(values.mean()))
            return values.detach()

    def step() -> None:
        with record_function("step"):
            if isinstance(optimizer, OptimizerWrapper):
                optimizer.step(closure, ascent_context=context, grad_scaler=scaler)
                if scaler is not None:
                    scaler.update()
            else:
                optimizer.zero_grad()
                closure()
                optimizer.step()

    return step


def measure_memory(make: Callable[[], tuple[Callable[[], object], object]], *, num_steps: int = K + 1) -> Measured:
    """Bytes that a few steps take.

    Args:
        make: builds model and optimizer; returns a step, and whatever must stay alive between steps.
        num_steps: how many, >= 1.
    """
    gc.disable()  # what other runs have left must not be freed within
    try:
        with record_memory() as record:
            step, kept = make()
            for _ in range(num_steps):
                step()
                with record_function("between"):
                    torch.empty(1)
            del step, kept
    finally:
        gc.enable()
    return Measured(record.peak("between"), record.peak("closure"), record.peak("step", outside="closure"))


def measure_single(method: str, base: str, **options: Any) -> Measured:
    """Bytes on one device."""
    return measure_memory(partial(_make_single, method, base, **options))


def _make_single(
    method: str,
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    foreach: bool = True,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> tuple[Callable[[], object], object]:
    model = matrices(dtype=dtype)
    inputs = torch.randn(2, 128, dtype=dtype)
    optimizer = build(method, base, model.parameters(), foreach=foreach, **options)

    def losses() -> Tensor:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            outputs: Tensor = model(inputs)
        return outputs.float().square().mean(1)

    return make_step(optimizer, losses, scaler=scaler), (model, optimizer)


def make_distributed(
    method: str,
    base: str,
    sharding: str,
    model: LanguageModel,
    *,
    local: bool = True,
    foreach: bool | None = None,
    policy: MixedPrecisionPolicy = FULL_PRECISION,
    **ddp_options: Any,
) -> tuple[Callable[[], object], object]:
    """A training step of a model over all ranks, by DDP or FSDP2; ``local``: under DDP the first pass stays at home."""
    engine: Any = model
    if sharding == "fsdp":
        for module in (*model.blocks, model):
            fully_shard(module, mp_policy=policy)
    else:
        engine = DistributedDataParallel(model, **ddp_options)
    tokens = torch.arange(2)
    optimizer = build(method, base, engine.parameters(), foreach=foreach)

    def losses() -> Tensor:
        return cross_entropy(engine(tokens).float(), tokens, reduction="none")

    context = engine.no_sync if sharding == "ddp" and local else None
    return make_step(optimizer, losses, context), (engine, optimizer)


def count_collectives(step: Callable[[], object], *, num_steps: int = K) -> list[Collective]:
    """What a step calls, over ``num_steps`` of them, once the first two have settled what DDP decides then."""
    for _ in range(2 * K):
        step()
    with record_collectives() as collectives:
        for _ in range(num_steps):
            step()
    return collectives
