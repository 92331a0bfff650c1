"""Models, closures and the slow truth of a SAM step that the tests of sam_core share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import sam_core

DEFAULTS = {
    "sam": {"rho": 0.1},
    "asam": {"rho": 0.5, "eta": 0.01},
    "gsam": {"rho": 0.1, "alpha": 0.3, "rho_min": 0.0},
    "wsam": {"rho": 0.1, "gamma": 0.7},
    "wsam_coupled": {"rho": 0.1, "gamma": 0.7, "decouple": False},
    "friendlysam": {"rho": 0.1, "sigma": 0.8, "lmbda": 0.6},
    "looksam": {"rho": 0.1, "k": 2, "alpha": 0.4},
    "efficientsam": {"rho": 0.1, "perturbation_ratio": 0.5, "sample_ratio": 0.5},
    "momentumsam": {"rho": 0.1, "perturbation_momentum": 0.6},
    "msam": {"rho": 0.2},
    "memoryefficientsam": {"rho": 0.1},
}


def method_class(method: str) -> type[sam_core.OptimizerWrapper]:
    return sam_core.METHODS[method.removesuffix("_coupled")]


def _builder(method: str) -> Callable[..., sam_core.OptimizerWrapper]:
    return lambda params, base, **options: method_class(method)(params, base, **{**DEFAULTS[method], **options})


METHODS = {method: _builder(method) for method in DEFAULTS}
TWO_PASS = [method for method in DEFAULTS if method not in ("msam", "efficientsam")]  # those with both step forms
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def make_batch(seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (16,), generator=generator)


def make_closure(
    model: nn.Module, batch: tuple[Tensor, Tensor] | None = None, *, method: str = "sam", scaler=None
) -> Callable[..., Tensor]:
    """The closure that a method wants: one that calls backward, or one that returns each sample's loss."""
    inputs, targets = batch if batch is not None else make_batch()

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def sample_losses(indices: Tensor | None = None) -> Tensor:
        chosen = slice(None) if indices is None else indices
        return nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen], reduction="none")

    return sample_losses if method_class(method).takes_sample_losses else closure


def copies(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def true_perturbation(params: list[Tensor], grads: list[Tensor], rho: float, eta: float | None) -> list[Tensor]:
    """e = rho T^2 g / ||T g|| by hand; eta None: T = 1."""
    t = [torch.ones_like(p) if eta is None else p.abs() + eta for p in params]
    length = sum(((a * g) ** 2).sum() for a, g in zip(t, grads, strict=True)).sqrt()
    return [rho * a**2 * g / length for a, g in zip(t, grads, strict=True)]
