"""Measure the optimizers on a GPU: launches and milliseconds of the ascent, CUDA graphs of whole steps, float16.

1. To the perturbed point and back on a real model's parameters: sam_core, with and without a look at the norm, a plain
   loop, pytorch_optimizer if it is installed.
2. A whole step, both passes and the base optimizer's, as one CUDA graph (nonfinite="ignore"): how far its weights are
   from those of steps in Python, and the time of both.
3. Training with float16 autocast and a GradScaler that starts too high: losses, skipped steps, scales.

Without a GPU it says so and ends; --device cpu runs what needs none, and counts operators instead of launches.

For example: python scripts/benchmarks/optimizer_gpu.py
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ascent_competitors import MODELS, RHO, Resting, competitors, interleaved, make_parameters, ours
from profiled_calls import count_calls
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _common import run
from sam_core import METHODS, SAM
from sam_core.optimizers import GuardedOptimizer

#: Methods that look at no value, so that a CUDA graph can hold their steps.
CAPTURED: dict[str, dict[str, Any]] = {
    "sam": {},
    "asam": {"eta": 0.01},
    "wsam": {},
    "friendlysam": {},
    "momentumsam": {},
    "memoryefficientsam": {},
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "capturable": True}),
}
NUM_WARMUP = 3  # steps before a capture: they make the moments, and choose kernels


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success and without a GPU, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--steps", type=int, default=60, help="of the trainings in float16, and in graphs (default: 60)"
    )
    parser.add_argument("--width", type=int, default=512, help="of the layers that are trained (default: 512)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: nothing was measured.")
        return
    device = arguments.device
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'}")
    print(f"\n{'to w + e and back':<40} {'operators':>9} {'launches':>8} {'copies':>6} {'waits':>5} {'best ms':>8}")
    for name in arguments.models:
        params = make_parameters(name, device)
        contestants = ascents(params)
        times = interleaved(contestants, arguments.repeats, device)
        for competitor, function in contestants.items():
            calls = count_calls(function, device)
            counts = f"{calls.operators:>9} {calls.launches:>8} {calls.copies:>6} {calls.waits:>5}"
            print(f"{name:<19} {competitor:<20} {counts} {1000 * min(times[competitor]):>8.2f}")
    if device == "cuda":
        warnings.filterwarnings("ignore", ".*capturable=True")  # that it costs time where no graph is captured
        print(f"\n{'a step as a CUDA graph':<40} {'ms in Python':>12} {'ms replayed':>11} {'largest difference':>18}")
        for method in CAPTURED:
            for base in BASES:
                python, replayed, difference = compare_graph(method, base, arguments.width, arguments.steps)
                print(f"{method:<19} {base:<20} {1000 * python:>12.3f} {1000 * replayed:>11.3f} {difference:>18.1e}")
    print(f"\n{'float16':<19} {'first loss':>10} {'last loss':>10} {'skipped':>7} {'first, lowest, last scale':>32}")
    for method in METHODS:
        ran = train_half(method, device, arguments.steps, arguments.width)
        scales = f"{ran.scales[0]:>10.0f} {min(ran.scales):>10.0f} {ran.scales[-1]:>10.0f}"
        print(f"{method:<19} {ran.losses[0]:>10.4f} {ran.losses[-1]:>10.4f} {ran.num_skipped:>7} {scales:>32}")


def ascents(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """Ways to the perturbed point and back: those of the benchmark on a CPU, and ours without a look at the norm."""
    ignoring = SAM(params, Resting, rho=RHO, nonfinite="ignore")
    return {**competitors(params), 'sam_core, "ignore"': partial(ours, ignoring)}


# A task to train on ---------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A small classifier and its batch, always the same; whoever trains it copies new batches into these tensors."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def make_task(device: str, width: int) -> Task:
    """The same task in every call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    for param in model.parameters():
        bound = param.shape[-1] ** -0.5
        param.data.uniform_(-bound, bound, generator=generator)
    inputs = torch.randn(64, 32, generator=generator)
    targets = torch.randint(10, (64,), generator=generator)
    return Task(model.to(device), inputs.to(device), targets.to(device))


def make_optimizer(method: str, base: str, model: nn.Module, **options: Any) -> GuardedOptimizer:
    """The method over one of ``BASES``."""
    base_class, base_options = BASES[base]
    build: Any = METHODS[method]
    optimizer: GuardedOptimizer = build(model.parameters(), base_class, **base_options, **options)
    return optimizer


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record a step, after a few that are taken; the loss is written anew by each replay.

    The graph holds addresses, so the step must outlive it, with its optimizer. The step begins by giving up its
    gradients, so that the backward makes them within the graph, in its own memory.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(NUM_WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


def make_step(method: str, base: str, task: Task) -> Callable[[], Tensor]:
    """A whole step that looks at no value; returns its loss at w, detached."""
    optimizer = make_optimizer(method, base, task.model, nonfinite="ignore", max_grad_norm=1.0, **CAPTURED[method])

    def closure() -> Tensor:
        loss = cross_entropy(task.model(task.inputs), task.targets)
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss: Tensor = optimizer.step(closure)
        return loss

    return step


def compare_graph(method: str, base: str, width: int, num_steps: int) -> tuple[float, float, float]:
    """Best seconds of a step in Python and of a replay; largest difference of their weights after as many steps."""
    python_task, graph_task = make_task("cuda", width), make_task("cuda", width)
    python = make_step(method, base, python_task)
    captured = make_step(method, base, graph_task)  # held to the end: the graph uses its optimizer's moments
    graph, _ = capture(captured)
    for _ in range(NUM_WARMUP):
        python()
    contestants: dict[str, Callable[[], object]] = {"python": python, "replayed": graph.replay}
    times = interleaved(contestants, num_steps, "cuda")
    torch.cuda.synchronize()
    difference = max(
        float((ours - theirs).abs().max())
        for ours, theirs in zip(python_task.model.parameters(), graph_task.model.parameters(), strict=True)
    )
    return min(times["python"]), min(times["replayed"]), difference


# float16 --------------------------------------------------------------------------------------------------------------


class HalfRun(NamedTuple):
    """What a training in float16 did."""

    losses: list[float]  # at the weights w, in float16, before the first step and after each
    scales: list[float]  # before the first step, and after each
    num_skipped: int


def train_half(method: str, device: str, num_steps: int, width: int) -> HalfRun:
    """Train with float16 autocast; the scaler starts at 2^24, where gradients overflow, and doubles every 10 steps."""
    task = make_task(device, width)
    optimizer = make_optimizer(method, "sgd", task.model)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=10)

    def sample_losses(indices: Tensor | None = None) -> Tensor:
        chosen: Any = slice(None) if indices is None else indices
        with torch.autocast(device, dtype=torch.float16):
            return cross_entropy(task.model(task.inputs[chosen]), task.targets[chosen], reduction="none")

    def closure() -> Tensor:
        loss = sample_losses().mean()
        scaled: Tensor = scaler.scale(loss)
        scaled.backward()
        return loss.detach()

    def loss_at_weights() -> float:
        with torch.no_grad(), optimizer.at_weights():
            return float(sample_losses().mean())

    losses, scales = [loss_at_weights()], [scaler.get_scale()]
    for _ in range(num_steps):
        optimizer.step(sample_losses if optimizer.takes_sample_losses else closure, grad_scaler=scaler)
        scaler.update()
        losses.append(loss_at_weights())
        scales.append(scaler.get_scale())
    return HalfRun(losses, scales, optimizer.num_skipped)


if __name__ == "__main__":
    raise SystemExit(main())
