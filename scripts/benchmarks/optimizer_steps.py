"""Time a training step of every method relative to the base optimizer's, on a small ViT and ResNet-20.

Passes are counted in batches: forwards with a graph, forwards without. A round is five steps, so that it holds one
whole cycle of LookSAM with k = 5; methods take turns, and what counts is the median over rounds of the ratio to the
base optimizer in the same round.

For example: python scripts/benchmarks/optimizer_steps.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ascent_competitors import interleaved
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _common import run
from sam_core import METHODS, MemoryEfficientSAM

STEPS_A_ROUND = 5
OPTIONS: dict[str, dict[str, Any]] = {"looksam": {"k": 5}, "wsam": {"decouple": True}}
MOST = {"sam": 2.05, "looksam": 1.25, "msam": 1.05, "efficientsam": 1.75}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--base", default="SGD", choices=["SGD", "AdamW"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clock", default="wall", choices=["wall", "processor"], help="processor: on a busy machine")
    parser.add_argument("--device", default="cpu", help="e.g. cpu or cuda (default: cpu)")
    return run(parser, _time, argv)


def make_vit(depth: int = 4) -> nn.Module:
    """A ViT of width 192 for pictures of 32 x 32 in patches of 4 x 4."""
    from torchvision.models import VisionTransformer

    sizes: dict[str, Any] = {"num_layers": depth, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 384, "num_classes": 10}
    model: nn.Module = VisionTransformer(32, 4, **sizes)
    return model


class Block(nn.Module):
    """Basic block of a ResNet (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=outputs // inputs, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2) if outputs != inputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs, H, W] to [B, outputs, H', W']."""
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.shortcut(x) + self.second_norm(self.second(y)))


def make_resnet() -> nn.Module:
    """ResNet-20 for pictures of 32 x 32 (He et al. 2016, section 4.2)."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(*pair) for pair in pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"small-vit": make_vit, "resnet-20": make_resnet}


def _time(arguments: argparse.Namespace) -> None:
    print(f"{'model':<14} {'optimizer':<19} {'forward':>8} {'no graph':>8}  time / {arguments.base}  at most")
    for name in arguments.models:
        make = MODELS[name]
        inputs = torch.randn(arguments.batch, 3, 32, 32, device=arguments.device)
        targets = torch.randint(10, (arguments.batch,), device=arguments.device)
        steppers = {method: Stepper(method, make, inputs, targets, arguments.base) for method in arguments.methods}
        steppers = {"base": Stepper(None, make, inputs, targets, arguments.base), **steppers}
        rounds = interleaved(
            {method: partial(stepper.steps, STEPS_A_ROUND) for method, stepper in steppers.items()},
            arguments.rounds,
            arguments.device,
            time.process_time if arguments.clock == "processor" else time.perf_counter,
        )
        for method, stepper in steppers.items():
            ratio = f"{relative(rounds[method], rounds['base']):.2f}"
            passes = f"{stepper.passes(True):>8.2f} {stepper.passes(False):>8.2f}"
            print(f"{name:<14} {method:<19} {passes} {ratio:>11} {MOST.get(method, ''):>10}", flush=True)


def relative(times: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio of two times of the same round."""
    return statistics.median(time / other for time, other in zip(times, base, strict=True))


class Stepper:
    """Trains its own copy of a model on one batch and counts what passes through it."""

    def __init__(
        self, method: str | None, make: Callable[[], nn.Module], inputs: Tensor, targets: Tensor, base: str
    ) -> None:
        torch.manual_seed(0)
        self.model = make().to(inputs.device)
        self.inputs, self.targets = inputs, targets
        self.samples = {True: 0, False: 0}
        self.num_steps = 0
        self.model.register_forward_pre_hook(self._count)
        kind = getattr(torch.optim, base)
        options: dict[str, Any] = {"lr": 1e-3, **({"momentum": 0.9} if base == "SGD" else {})}
        self.optimizer: Any = (
            kind(self.model.parameters(), **options)
            if method is None
            else METHODS[method](self.model.parameters(), kind, **OPTIONS.get(method, {}), **options)
        )

    def steps(self, number: int) -> None:
        """Train for some steps."""
        for _ in range(number):
            if isinstance(self.optimizer, MemoryEfficientSAM):
                blocks = [n for n, m in self.model.named_modules() if type(m).__name__ in ("EncoderBlock", "Block")]
                self.optimizer.step_with_checkpointing(
                    self.model, self.inputs, self.targets, cross_entropy, modules=blocks
                )
            elif getattr(self.optimizer, "takes_sample_losses", False):
                self.optimizer.step(self._sample_losses)
            else:
                self.optimizer.step(self._closure)
            self.num_steps += 1

    def passes(self, graph: bool) -> float:
        """Forwards a step, in batches, with a graph or without."""
        return self.samples[graph] / (self.num_steps * len(self.targets))

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.inputs), self.targets)
        torch.autograd.backward(loss)
        return loss

    def _sample_losses(self, indices: Tensor | None = None) -> Tensor:
        chosen = slice(None) if indices is None else indices
        return cross_entropy(self.model(self.inputs[chosen]), self.targets[chosen], reduction="none")

    def _count(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self.samples[torch.is_grad_enabled()] += len(arguments[0])


if __name__ == "__main__":
    raise SystemExit(main())
