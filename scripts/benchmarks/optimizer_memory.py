"""Count what each method keeps in memory beyond the base optimizer, and what checkpointing saves on a deep model.

Copies of the parameters: tensors that are alive because of the optimizer, between steps and while the closure runs.
Then the peak of the activations that a backward pass keeps, and the time, of SAM and of MemoryEfficientSAM on a ViT.

For example: python scripts/benchmarks/optimizer_memory.py
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ascent_competitors import interleaved
from optimizer_steps import make_vit, relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from _common import run
from sam_core import METHODS, SAM, MemoryEfficientSAM


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16, help="blocks of the ViT")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=["wall", "processor"], help="processor: on a busy machine")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    print(f"{'optimizer':<19} {'between steps':>13} {'in the step':>11}   copies of the parameters")
    for method in METHODS:
        between, within = count_copies(method)
        print(f"{method:<19} {between:>13.2f} {within:>11.2f}", flush=True)

    inputs, targets = torch.randn(arguments.batch, 3, 32, 32), torch.randint(10, (arguments.batch,))
    steps: dict[str, Callable[[], object]] = {}
    for name, kind in (("sam", SAM), ("memoryefficientsam", MemoryEfficientSAM)):
        torch.manual_seed(0)
        model = make_vit(arguments.depth)
        steps[name] = partial(_step, kind(model.parameters(), torch.optim.SGD, lr=1e-3), model, inputs, targets)
    clock = time.process_time if arguments.clock == "processor" else time.perf_counter
    rounds = interleaved(steps, arguments.rounds, clock=clock)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    print(f"\nViT of {arguments.depth} blocks, batch of {arguments.batch}")
    for name in steps:
        peak, time_ratio = peaks[name] / peaks["sam"], relative(rounds[name], rounds["sam"])
        print(f"{name:<19} peak {peaks[name] / 2**20:>6.0f} MiB   peak / SAM {peak:.2f}   time / SAM {time_ratio:.2f}")


def count_copies(method: str) -> tuple[float, float]:
    """Copies of the parameters alive because of a method, between steps and at most while its closure runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 10))
    inputs, targets = torch.randn(4, 256), torch.randint(10, (4,))
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
    optimizer: Any = METHODS[method](model.parameters(), torch.optim.SGD, **options)
    size = sum(p.numel() for p in model.parameters())
    within = []

    def others() -> float:
        known = {id(p) for p in model.parameters()} | {id(p.grad) for p in model.parameters()}
        known |= {id(value) for state in optimizer.state.values() for value in state.values()}
        known |= {id(inputs), id(targets)}
        gc.collect()
        alive = {id(t): t.numel() for t in gc.get_objects() if type(t) is Tensor and id(t) not in known}
        return sum(alive.values()) / size

    def closure(indices: Tensor | None = None) -> Tensor:
        within.append(others())
        chosen = slice(None) if indices is None else indices
        losses = cross_entropy(model(inputs[chosen]), targets[chosen], reduction="none")
        if optimizer.takes_sample_losses:
            return losses
        torch.autograd.backward(losses.mean())
        return losses.mean().detach()

    for _ in range(2):
        optimizer.step(closure)
    start = others()
    optimizer.step(closure)
    return start, max(within)


def peak_bytes(step: Callable[[], object]) -> int:
    """Largest sum of what a step has allocated and not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    level, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak


def _step(optimizer: SAM, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    if isinstance(optimizer, MemoryEfficientSAM):
        blocks = [m for m in model.modules() if type(m).__name__ == "EncoderBlock"]
        optimizer.step_with_checkpointing(model, inputs, targets, cross_entropy, modules=blocks)
        return

    def closure() -> Tensor:
        loss = cross_entropy(model(inputs), targets)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)


if __name__ == "__main__":
    raise SystemExit(main())
