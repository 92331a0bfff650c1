"""Ways to a perturbed point and back: sam_core's, a plain loop, and pytorch_optimizer's if it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_core import SAM

MODELS = ("resnet50", "vit_b_16", "mobilenet_v3_large")
RHO = 0.05


class Resting(torch.optim.Optimizer):
    """A base optimizer that does nothing."""

    def __init__(self, params: Any, lr: float = 0.1, foreach: bool | None = None) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def make_parameters(name: str, device: str) -> list[nn.Parameter]:
    """Parameters of a torchvision model's shapes, with gradients."""
    import torchvision

    with torch.device("meta"):
        shapes = [p.shape for p in torchvision.models.get_model(name).parameters()]
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def competitors(params: list[nn.Parameter], **options: Any) -> dict[str, Callable[[], object]]:
    """Ways to the perturbed point and back, by name; options are those of our ``SAM``."""
    return {
        "sam_core": partial(ours, SAM(params, Resting, rho=RHO, **options)),
        "loop": partial(loop_steps, params),
        **peer(params),
    }


def ours(optimizer: SAM) -> None:
    """To the perturbed point and back."""
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


def peer(params: list[nn.Parameter]) -> dict[str, Callable[[], object]]:
    """pytorch_optimizer's SAM by its name; nothing where it is not installed."""
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
