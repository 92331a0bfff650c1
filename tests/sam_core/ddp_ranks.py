"""What every rank of test_ddp.py does: run all cases under DistributedDataParallel, write what it saw to its own file.

torchrun --standalone --nproc-per-node 2 ddp_ranks.py FOLDER [CASE ...]
"""

from __future__ import annotations

import copy
import io
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp_cases import LOOP_METHODS, LOOPS, PASSES, SAMPLE_LOSSES, STEPS, Branched, Normed, batch_of, build, uses_second
from sam_cases import BASES, METHODS, copies, make_batch, make_closure, make_model, method_class
from sam_core import make_closure as make_batch_closure
from sam_core.training import check_ranks_agree, train_sam_distributed

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def clean(optimizer, model: nn.Module) -> list[Tensor]:
    with optimizer.at_weights():
        return copies(model)


def train(method, base="sgd", *, local=True, model=None, warm=False, options=None, **ddp_options) -> dict[str, Any]:
    """The weights after each step, where the model keeps them and clean ones."""
    model = make_model() if model is None else model
    ddp = DDP(model, **ddp_options)
    if warm:
        ddp(make_batch()[0]).sum().backward()
    optimizer = build(method, ddp.parameters(), base, **(options or {}))
    seen: dict[str, Any] = {"weights": [], "clean": [], "losses": []}
    for step in range(STEPS):
        if isinstance(model, Branched):
            model.uses_second = uses_second(step, RANK)
        closure = make_closure(ddp, batch_of(step, RANK), method=method)
        loss = optimizer.step(closure, ascent_context=ddp.no_sync if local else None)
        seen["losses"].append(loss.detach())
        seen["weights"].append(copies(model))
        seen["clean"].append(clean(optimizer, model))
    seen["agree"] = refusal(lambda: check_ranks_agree(optimizer))
    return seen


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


# Steps ----------------------------------------------------------------------------------------------------------------


@case
def steps():
    return {
        (method, base, local): train(method, base, local=local)
        for method in METHODS
        for base in BASES
        for local in (True, False)
    }


@case
def engine_options():
    frozen = make_model()
    frozen[0].bias.requires_grad_(False)
    several_buckets = {"bucket_cap_mb": 1e-5}
    kinds: dict[str, dict[str, Any]] = {
        "bucket views": {"gradient_as_bucket_view": True, **several_buckets},
        "static graph": {"static_graph": True, "warm": True},
        "static graph, bucket views": {"static_graph": True, "warm": True, "gradient_as_bucket_view": True},
        "look for unused": {"find_unused_parameters": True},
        "clipped": {"options": {"max_grad_norm": 0.05}},
        "frozen": {"model": frozen},
    }
    return {
        (kind, method): train(method, **{**options, "model": copy.deepcopy(options.get("model"))})
        for kind, options in kinds.items()
        for method in METHODS
    }


@case
def unused():
    return {
        (method, local): train(method, local=local, model=Branched(), find_unused_parameters=True)
        for method in METHODS
        for local in (True, False)
    }


@case
def halves():
    """The two-step form, its first backward under no_sync."""
    seen = {}
    for method in ("sam", "asam"):
        model = make_model()
        ddp = DDP(model)
        optimizer = build(method, ddp.parameters())
        for step in range(STEPS):
            closure = make_closure(ddp, batch_of(step, RANK))
            with ddp.no_sync():
                closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        seen[method] = copies(model)
    return seen


@case
def recomputed():
    """MemoryEfficientSAM with activations that are forgotten, and a step as usual."""
    seen = []
    for forgets in (True, False):
        model = Normed()
        ddp = DDP(model)
        optimizer = build("memoryefficientsam", model.parameters())
        for step in range(STEPS):
            batch = batch_of(step, RANK)
            if forgets:
                optimizer.step_with_checkpointing(
                    ddp, *batch, cross_entropy, modules=[model.layers], ascent_context=ddp.no_sync
                )
            else:
                optimizer.step(make_batch_closure(ddp, [batch], cross_entropy, optimizer), ascent_context=ddp.no_sync)
        seen.append(copies(model) + [buffer.clone() for buffer in model.buffers()])
    return seen


@case
def compiled():
    model = make_model()
    ddp = torch.compile(DDP(model), backend="eager")
    optimizer = build("sam", model.parameters())
    train_sam_distributed(ddp, [batch_of(step, RANK) for step in range(STEPS)], optimizer)
    return copies(model)


@case
def resumed():
    """Two steps, a file, another model and optimizer, two more steps; and the whole run.

    DDP makes its buckets anew after its first backward, whence sums of three and more ranks are taken in another order.
    """
    seen = {}
    for method in METHODS:
        for base in BASES:
            file = None
            for part in (range(2), range(2, STEPS)):
                model = make_model()
                optimizer = build(method, model.parameters(), base)
                if file is not None:
                    file.seek(0)
                    saved = torch.load(file)
                    model.load_state_dict(saved["model"])
                    optimizer.load_state_dict(saved["optimizer"])
                ddp = DDP(model)
                ddp(make_batch()[0]).sum().backward()
                for step in part:
                    closure = make_closure(ddp, batch_of(step, RANK), method=method)
                    optimizer.step(closure, ascent_context=ddp.no_sync)
                file = io.BytesIO()
                with optimizer.at_weights():
                    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            seen[method, base] = clean(optimizer, model), train(method, base, warm=True)["clean"][-1]
    return seen


@case
def zero_redundancy():
    """Each rank has the base optimizer's state of some parameters; a file of all of it, after half of the steps."""
    seen = {}
    for method in METHODS:
        state, weights = None, None
        for part in (range(2), range(2, STEPS)):
            model = make_model()
            ddp = DDP(model)
            base, options = BASES["adamw"]
            optimizer = METHODS[method](ddp.parameters(), ZeroRedundancyOptimizer, optimizer_class=base, **options)
            if state is not None:
                nn.utils.vector_to_parameters(weights, model.parameters())
                optimizer.load_state_dict(state)

            def train_part(ddp=ddp, optimizer=optimizer, part=part, method=method):
                for step in part:
                    closure = make_closure(ddp, batch_of(step, RANK), method=method)
                    optimizer.step(closure, ascent_context=ddp.no_sync)

            seen[method, "message"] = refusal(train_part)
            if seen[method, "message"] != "none":
                break
            optimizer.base_optimizer.consolidate_state_dict()
            file = [optimizer.state_dict() if RANK == 0 else None]
            dist.broadcast_object_list(file)
            state, weights = file[0], nn.utils.parameters_to_vector(model.parameters()).detach()
        seen[method] = copies(model)
    return seen


# Bad gradients --------------------------------------------------------------------------------------------------------


def spoiler(bad_call: int) -> Callable[[], float]:
    """A factor of losses: infinite on the last rank, in the numbered call of those that build a graph."""
    calls: list[int] = []

    def factor() -> float:
        calls.extend([1] if torch.is_grad_enabled() else [])
        return float("inf") if RANK == RANKS - 1 and torch.is_grad_enabled() and len(calls) == bad_call else 1.0

    return factor


@case
def nonfinite():
    seen = {}
    for method, bad_pass in PASSES:
        for answer in ("skip", "raise", "scaler"):
            for local in (True, False):
                seen[method, bad_pass, answer, local] = take_bad_step(method, bad_pass, answer, local)
    return seen


def take_bad_step(method: str, bad_pass: int, answer: str, local: bool) -> dict[str, Any]:
    model = make_model()
    ddp = DDP(model)
    optimizer = build(method, ddp.parameters(), "adamw", nonfinite="skip" if answer == "skip" else "raise")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if answer == "scaler" else None
    context = ddp.no_sync if local else None

    def step(number: int, bad_call: int = 0) -> None:
        inputs, targets = batch_of(number, RANK)
        factor = spoiler(bad_call)

        def sample_losses(indices: Tensor | slice | None = None) -> Tensor:
            indices = slice(None) if indices is None else indices
            return SAMPLE_LOSSES(ddp(inputs[indices]), targets[indices]) * factor()

        def closure() -> Tensor:
            loss = sample_losses().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        taken = sample_losses if method_class(method).takes_sample_losses else closure
        optimizer.step(taken, grad_scaler=scaler, ascent_context=context)

    for number in range(2):  # so that LookSAM's second pass is due again
        step(number)
        if scaler is not None:
            scaler.update()
    before, moments = clean(optimizer, model), copy.deepcopy(optimizer.base_optimizer.state_dict()["state"])
    message = refusal(lambda: step(2, bad_pass))
    if scaler is not None:
        scaler.update()
    after, moments_after = clean(optimizer, model), optimizer.base_optimizer.state_dict()["state"]
    kept = all(
        torch.equal(moments[number][name], value)
        for number, values in moments_after.items()
        for name, value in values.items()
    )
    num_skipped, scale = optimizer.num_skipped, None if scaler is None else scaler.get_scale()
    step(3)
    return {
        "agree": refusal(lambda: check_ranks_agree(optimizer)),
        "message": message,
        "num_skipped": num_skipped,
        "scale": scale,
        "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and kept,
        "moved": not torch.equal(after[0], clean(optimizer, model)[0]),
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    }


@case
def nonfinite_part():
    """m-sharpness with one bad part on one rank."""
    seen = {}
    for bad_call in range(1, 5):
        for answer in ("skip", "raise", "scaler"):
            model = make_model()
            ddp = DDP(model)
            optimizer = build("sam", ddp.parameters(), nonfinite="skip" if answer == "skip" else "raise")
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if answer == "scaler" else None
            factor, before = spoiler(bad_call), copies(model)

            def part(number: int, ddp=ddp, scaler=scaler, factor=factor):
                inputs, targets = batch_of(number, RANK)

                def closure() -> Tensor:
                    loss = cross_entropy(ddp(inputs), targets) * factor()
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    return loss

                return closure

            parts = [part(0), part(1)]
            message = refusal(
                lambda o=optimizer, d=ddp, s=scaler, p=parts: o.step_m_sharpness(p, grad_scaler=s, no_sync=d.no_sync)
            )
            if scaler is not None:
                scaler.update()
            seen[bad_call, answer] = {
                "message": message,
                "num_skipped": optimizer.num_skipped,
                "scale": None if scaler is None else scaler.get_scale(),
                "same": all(torch.equal(a, b) for a, b in zip(before, copies(model), strict=True)),
            }
    return seen


# The loop -------------------------------------------------------------------------------------------------------------


@case
def loop():
    seen = {}
    for kind, options in LOOPS.items():
        for method in LOOP_METHODS[kind]:
            for scaled in (False, True):
                model = make_model()
                optimizer = build(method, model.parameters())
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
                loader = [batch_of(step, RANK) for step in range(STEPS)]
                ddp = DDP(model)
                assert train_sam_distributed(ddp, loader, optimizer, "cpu", grad_scaler=scaler, **options) is ddp
                seen[kind, method, scaled] = clean(optimizer, model)
    model = make_model()
    optimizer = build("efficientsam", model.parameters())
    loader = iter([batch_of(step, RANK) for step in range(STEPS)])  # without a length
    train_sam_distributed(DDP(model), loader, optimizer, loss_fn=SAMPLE_LOSSES)
    seen["local", "efficientsam", False] = copies(model)
    return seen


@case
def running_statistics():
    seen = {}
    for method in METHODS:
        for kind in ("local", "sync"):
            if (method, kind) == ("efficientsam", "sync"):
                continue
            model = Normed()
            loss_fn = SAMPLE_LOSSES if method == "efficientsam" else cross_entropy
            loader = [batch_of(step, RANK) for step in range(STEPS)]
            optimizer = build(method, model.parameters())
            train_sam_distributed(DDP(model), loader, optimizer, loss_fn=loss_fn, **LOOPS[kind])
            seen[method, kind] = [buffer.clone() for buffer in model.buffers()]
    model = Normed()
    ddp = DDP(model, forward_sync_buffers=False)
    train_sam_distributed(ddp, [batch_of(0, RANK)], build("sam", model.parameters()))
    seen["kept apart"] = [buffer.clone() for buffer in model.buffers()]
    return seen


@case
def logged():
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sam_core.training.distributed")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    model = make_model()
    optimizer = build("sam", model.parameters(), lr=0.0)
    train_sam_distributed(DDP(model), [batch_of(step, RANK) for step in range(2)], optimizer)
    logger.removeHandler(handler)
    return records


@case
def sharded():
    """FSDP2, whose ascent is that of the common batch."""
    model = make_model()
    fully_shard(model)
    optimizer = build("sam", model.parameters())
    loader = [batch_of(step, RANK) for step in range(STEPS)]
    message = refusal(lambda: train_sam_distributed(model, loader, optimizer))
    train_sam_distributed(model, loader, optimizer, sync_ascent=True)
    agree = refusal(lambda: check_ranks_agree(model))
    return {"weights": [p.full_tensor().detach() for p in model.parameters()], "message": message, "agree": agree}


@case
def refusals():
    def trained(loader=None, method="sam", wrap=DDP, **options) -> str:
        model = make_model()
        optimizer = build(method, model.parameters())
        loader = [batch_of(0, RANK)] if loader is None else loader
        return refusal(lambda: train_sam_distributed(wrap(model), loader, optimizer, **options))

    batches = [batch_of(step, RANK) for step in range(RANK + 1)]
    return {
        "not parallel": trained(wrap=lambda model: model),
        "lengths": trained(batches),
        "no lengths": trained(iter(batches)),
        "empty": trained([]),
        "device": trained(device="meta"),
        "sync and m": trained(sync_ascent=True, m_sharpness=True),
        "sync and samples": trained(method="efficientsam", sync_ascent=True, loss_fn=SAMPLE_LOSSES),
        "mean for samples": trained(method="efficientsam"),
        "samples and parts": trained(
            [batch_of(0, RANK)] * 2, method="efficientsam", accumulation_steps=2, loss_fn=SAMPLE_LOSSES
        ),
        "m of gsam": trained(method="gsam", m_sharpness=True),
        "static": trained(wrap=partial(DDP, static_graph=True)),
        "static, sync": trained(wrap=partial(DDP, static_graph=True), sync_ascent=True),
        "static, gsam": trained(method="gsam", wrap=partial(DDP, static_graph=True)),
        "static, parts": trained(wrap=partial(DDP, static_graph=True), sync_ascent=True, accumulation_steps=2),
        "static, samples": refusal(lambda: train("efficientsam", static_graph=True, local=False)),
    }


# What ranks agree on --------------------------------------------------------------------------------------------------


@case
def changed():
    """Weights and buffers that a hook changes on one rank; and those that the model was told to leave alone."""
    seen = {}
    for kind in ("found", "ignored"):
        model = Normed()
        if kind == "ignored":
            DDP._set_params_and_buffers_to_ignore_for_model(model, ["layers.1.running_mean", "layers.0.weight"])
        optimizer = build("sam", model.parameters())
        ddp = DDP(model)

        def drift(optimizer, args, kwargs, model=model):
            with torch.no_grad():
                model.layers[0].weight.add_(RANK)

        optimizer.base_optimizer.register_step_post_hook(drift)
        seen[kind] = refusal(lambda d=ddp, o=optimizer: train_sam_distributed(d, [batch_of(0, RANK)], o))
        seen[kind, "mean"] = model.layers[1].running_mean.clone()
    return seen


@case
def agreement():
    def differs(change: Callable[[nn.Module], None], values=lambda model, optimizer: model) -> str:
        model = Normed()
        optimizer = build("friendlysam", model.named_parameters())
        optimizer.step(make_batch_closure(model, [make_batch()], cross_entropy, optimizer))
        if RANK == RANKS - 1:
            with torch.no_grad():
                change(model, optimizer)
        return refusal(lambda: check_ranks_agree(values(model, optimizer)))

    def swap(model, optimizer):
        weight = model.layers[3].weight
        weight[0, :2] = weight[0, [1, 0]]

    def state(model, optimizer):
        optimizer.state[model.layers[0].bias]["momentum_buffer"][3] += 1e-12

    def average(model, optimizer):
        optimizer._method_state[model.layers[3].bias]["average"][0] *= 1 + 1e-15

    def the_optimizer(model, optimizer):
        return optimizer

    one = torch.ones(3)
    kinds = [one.bool(), one.half(), one.bfloat16(), one.cdouble(), one.to(torch.uint8), torch.ones(()), torch.ones(0)]
    signed = [*kinds, torch.tensor(0.0 if RANK == 0 else -0.0)]
    own_pair = dist.new_group([0, 1])
    elsewhere = torch.tensor(0.0 if RANK < 2 else 1.0)
    return {
        "equal": differs(lambda model, optimizer: None),
        "equal optimizer": differs(lambda model, optimizer: None, the_optimizer),
        "swapped": differs(swap),
        "two": differs(lambda model, optimizer: (swap(model, optimizer), model.layers[1].running_mean.add_(1))),
        "state": differs(state, the_optimizer),
        "average": differs(average, the_optimizer),
        "kinds": refusal(lambda: check_ranks_agree(kinds)),
        "negative zero": refusal(lambda: check_ranks_agree(signed)),
        "no tensors": refusal(lambda: check_ranks_agree([])),
        "group": refusal(lambda: check_ranks_agree([elsewhere], own_pair)) if RANK < 2 else "none",
    }


# Communication --------------------------------------------------------------------------------------------------------


def counting(calls, bucket):  # torch refuses annotations that are strings
    """DDP's own all-reduce, counted in bytes."""
    buffer = bucket.buffer()
    calls.append(buffer.numel() * buffer.element_size())
    return dist.all_reduce(buffer.div_(RANKS), async_op=True).get_future().then(lambda done: done.value()[0])


@case
def communication():
    """All-reduces of gradients a batch: calls, one a bucket, and bytes, in sizes of the model."""
    seen = {}

    def count(run: Callable[[DDP, Any, list], None], method: str) -> tuple[float, float]:
        model = make_model()
        ddp, calls = DDP(model, bucket_cap_mb=1e-4), list[int]()
        ddp.register_comm_hook(calls, counting)
        optimizer = build(method, ddp.parameters()) if method else None
        for _ in range(2):  # buckets are made anew after the first backward
            calls.clear()
            ddp(make_batch()[0]).sum().backward()
        calls.clear()
        run(ddp, optimizer, [batch_of(step, RANK) for step in range(STEPS)])
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return len(calls) / STEPS, sum(calls) / size / STEPS

    def plainly(ddp, optimizer, batches):
        for batch in batches:
            ddp.zero_grad()
            make_closure(ddp, batch)()

    def by_hand(ddp, optimizer, batches, method, context):
        for batch in batches:
            optimizer.step(make_closure(ddp, batch, method=method), ascent_context=ddp.no_sync if context else None)

    def by_loop(ddp, optimizer, batches, **options):
        train_sam_distributed(ddp, batches, optimizer, **options)

    seen["plain", None] = count(plainly, "")
    for method in METHODS:
        for local in (True, False):
            seen[method, local] = count(partial(by_hand, method=method, context=local), method)
    for kind, options in LOOPS.items():
        seen["loop", kind] = count(partial(by_loop, **options), "sam")
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    RANK, RANKS = dist.get_rank(), dist.get_world_size()
    chosen = sys.argv[2:] or CASES
    results = {name: CASES[name]() for name in chosen}
    torch.save(results, Path(sys.argv[1]) / f"{RANK}.pt")
    dist.destroy_process_group()
