"""Time what SAM adds to a step beside its second pass: to the perturbed point and back, on real sets of parameters.

Side by side in one run: sam_core, a plain loop over the parameters, pytorch_optimizer if it is installed (foreach on),
and the time of moving 10 parameter-sizes of memory. The base optimizer does nothing.

For example: python scripts/benchmarks/optimizer_ascent.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from _common import run
from sam_core import SAM

MODELS = ("resnet50", "vit_b_16", "mobilenet_v3_large")
RHO = 0.05


class Resting(torch.optim.Optimizer):
    """A base optimizer that does nothing."""

    def __init__(self, params: Any, lr: float = 0.1, foreach: bool | None = None) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="e.g. cpu or cuda (default: cpu)")
    return run(parser, _time, argv)


def _time(arguments: argparse.Namespace) -> None:
    print(f"{'model':<20} {'tensors':>7} {'params':>8}  best ms, and relative to moving 10 parameter-sizes")
    for name in arguments.models:
        params = make_parameters(name, arguments.device)
        flat = torch.zeros(sum(p.numel() for p in params), device=arguments.device)
        other = torch.ones_like(flat)
        competitors: dict[str, Callable[[], object]] = {
            "moving 10 sizes": partial(_move, flat, other),
            "sam_core": partial(_ours, SAM(params, Resting, rho=RHO)),
            "loop": partial(loop_steps, params),
            **_peer(params),
        }
        rounds = interleaved(competitors, arguments.repeats, arguments.device)
        times = {competitor: min(seconds) for competitor, seconds in rounds.items()}
        for competitor, seconds in times.items():
            ratio = seconds / times["moving 10 sizes"]
            count = f"{name:<20} {len(params):>7} {flat.numel() / 1e6:>6.1f} M"
            print(f"{count}  {competitor:<17} {1000 * seconds:>8.1f} {ratio:>6.2f}")


def make_parameters(name: str, device: str) -> list[nn.Parameter]:
    """Parameters of a torchvision model's shapes, with gradients."""
    import torchvision

    with torch.device("meta"):
        shapes = [p.shape for p in torchvision.models.get_model(name).parameters()]
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _move(target: Tensor, source: Tensor) -> None:
    for _ in range(5):  # each reads one size and writes one
        target.copy_(source)


def _ours(optimizer: SAM) -> None:
    optimizer.first_step()
    optimizer.restore()


@torch.no_grad()
def loop_steps(params: list[nn.Parameter]) -> None:
    """SAM as it is usually written, one parameter after the other."""
    grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
    scale = RHO / (torch.stack([g.norm() for g in grads]).norm() + 1e-12)
    backup = []
    for param, grad in zip(params, grads, strict=True):
        backup.append(param.clone())
        param.add_(grad * scale)
    for param, weight in zip(params, backup, strict=True):
        param.copy_(weight)


def _peer(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    try:
        import pytorch_optimizer
    except ImportError:
        return {}
    peer = pytorch_optimizer.SAM(params, Resting, rho=RHO, foreach=True)

    def steps() -> None:
        peer.first_step()
        peer.second_step()  # back, and the base optimizer's step, which does nothing

    return {"pytorch_optimizer": steps}


def interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, called in turn so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            started = clock()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if number > 0:  # the first round warms up
                times[name].append(clock() - started)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
