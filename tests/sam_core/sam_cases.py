"""Models, closures and the slow truth of a SAM step that the tests of sam_core share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sam_core import ASAM, SAM

METHODS = {
    "sam": lambda params, base, **options: SAM(params, base, **{"rho": 0.1, **options}),
    "asam": lambda params, base, **options: ASAM(params, base, **{"rho": 0.5, "eta": 0.01, **options}),
}
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


def make_closure(model: nn.Module, batch: tuple[Tensor, Tensor] | None = None) -> Callable[[], Tensor]:
    inputs, targets = batch if batch is not None else make_batch()

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return closure


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


def true_step(
    model: nn.Module, base: torch.optim.Optimizer, rho: float, eta: float | None, max_grad_norm=None
) -> Tensor:
    """One step by torch.autograd.grad and new tensors; returns the loss at w."""
    inputs, targets = make_batch()
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}

    def loss_at(values: list[Tensor]) -> Tensor:
        weights = dict(zip(params, values, strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (inputs,)), targets)

    w = [p.detach().clone().requires_grad_() for p in params.values()]
    loss = loss_at(w)
    e = true_perturbation([p.detach() for p in w], list(torch.autograd.grad(loss, w)), rho, eta)
    moved = [(p + d).detach().requires_grad_() for p, d in zip(w, e, strict=True)]
    for param, grad in zip(params.values(), torch.autograd.grad(loss_at(moved), moved), strict=True):
        param.grad = grad
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm)
    base.step()
    return loss.detach()
