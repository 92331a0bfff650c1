"""The slow truth of every method: its formulas written down step by step, in float64, with torch.autograd.grad alone.

A reference keeps w in the parameters of its model and steps a plain base optimizer; nothing of sam_core runs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sam_cases import make_batch

List = list[Tensor]


class Reference:
    """Straight formulas over one batch; ``rho`` and the method's options as the optimizer has them."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer, max_grad_norm=None, **options) -> None:
        self.model, self.base, self.max_grad_norm, self.options = model, base, max_grad_norm, options
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.memory: dict[str, object] = {}
        self.steps = 0
        self.lr = base.param_groups[0]["lr"]

    def __getattr__(self, name: str) -> float:
        return self.options[name]

    @property
    def w(self) -> List:
        return [p.detach().clone() for p in self.params.values()]

    def sample_losses(self, values: List, chosen=slice(None)) -> Tensor:
        inputs, targets = make_batch()
        weights = dict(zip(self.params, values, strict=True))
        outputs = torch.func.functional_call(self.model, weights, (inputs[chosen],))
        return nn.functional.cross_entropy(outputs, targets[chosen], reduction="none")

    def grad(self, values: List, chosen=slice(None)) -> List:
        leaves = [v.detach().clone().requires_grad_() for v in values]
        return list(torch.autograd.grad(self.sample_losses(leaves, chosen).mean(), leaves))

    def clip(self, grads: List) -> List:
        if self.max_grad_norm is None:
            return grads
        return times(min(1.0, self.max_grad_norm / (norm(grads) + 1e-6)), grads)  # torch's guard against a zero norm

    def step_base(self, grads: List) -> None:
        for param, grad in zip(self.params.values(), self.clip(grads), strict=True):
            param.grad = grad.clone()
        self.base.step()

    def step(self, method: str) -> Tensor:
        """One step; returns the loss where its first gradient is taken."""
        loss = self.sample_losses(moved_out(self) if method == "msam" else self.w).mean().detach()
        STEPS[method](self)
        self.steps += 1
        return loss


def norm(xs: List) -> Tensor:
    return sum((x**2).sum() for x in xs).sqrt()


def inner(xs: List, ys: List) -> Tensor:
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


def times(a, xs: List) -> List:
    return [a * x for x in xs]


def plus(xs: List, ys: List) -> List:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def minus(xs: List, ys: List) -> List:
    return plus(xs, times(-1, ys))


def unit(xs: List) -> List:
    return times(1 / norm(xs), xs)


def sam(r: Reference) -> None:
    r.step_base(r.grad(plus(r.w, times(r.rho, unit(r.grad(r.w))))))


def asam(r: Reference) -> None:
    g, t = r.grad(r.w), [w.abs() + r.eta for w in r.w]
    length = norm([a * b for a, b in zip(t, g, strict=True)])
    r.step_base(r.grad(plus(r.w, [r.rho * a**2 * b / length for a, b in zip(t, g, strict=True)])))


def gsam(r: Reference) -> None:
    g = r.grad(r.w)
    radius = r.rho_min + (r.rho - r.rho_min) * r.base.param_groups[0]["lr"] / r.lr
    g_s = r.grad(plus(r.w, times(radius, unit(g))))
    g_perp = minus(g, times(inner(g, g_s) / inner(g_s, g_s), g_s))
    assert abs(inner(g_perp, g_s)) < 1e-12
    r.step_base(minus(g_s, times(r.alpha, g_perp)))


def wsam_coupled(r: Reference) -> None:
    g, a = r.grad(r.w), r.gamma / (1 - r.gamma)
    g_s = r.grad(plus(r.w, times(r.rho, unit(g))))
    r.step_base(plus(times(a, g_s), times(1 - a, g)))


def wsam(r: Reference) -> None:
    g, a = r.grad(r.w), r.gamma / (1 - r.gamma)
    g_s = r.grad(plus(r.w, times(r.rho, unit(g))))
    r.step_base(g)
    for param, rise in zip(r.params.values(), minus(r.clip(g_s), r.clip(g)), strict=True):
        param.data -= r.base.param_groups[0]["lr"] * a * rise


def friendlysam(r: Reference) -> None:
    g, m = r.grad(r.w), r.memory.get("m")
    d = g if m is None else minus(g, times(r.sigma, m))
    r.memory["m"] = g if m is None else plus(times(r.lmbda, m), times(1 - r.lmbda, g))
    r.step_base(r.grad(plus(r.w, times(r.rho, unit(d)))))


def looksam(r: Reference) -> None:
    g = r.grad(r.w)
    if r.steps % r.k == 0:
        g_s = r.grad(plus(r.w, times(r.rho, unit(g))))
        r.memory["g_v"] = minus(g_s, times(inner(g_s, g) / inner(g, g), g))
        r.step_base(g_s)
    else:
        r.step_base(plus(g, times(r.alpha * norm(g), unit(r.memory["g_v"]))))


def efficientsam(r: Reference) -> None:
    count, start = len(r.w), torch.randint(len(r.w), (), generator=torch.Generator().manual_seed(r.steps))
    drawn = [(start + i) % count for i in range(math.ceil(r.perturbation_ratio * count))]
    g = [x if i in drawn else torch.zeros_like(x) for i, x in enumerate(r.grad(r.w))]
    w_e = plus(r.w, times(r.rho, unit(g)))
    rises = (r.sample_losses(w_e) - r.sample_losses(r.w)).detach()
    chosen = rises.argsort(descending=True)[: math.ceil(r.sample_ratio * len(rises))]
    r.step_base(r.grad(w_e, chosen))


def momentumsam(r: Reference) -> None:
    g, m, b = r.grad(r.w), r.memory.get("m"), r.perturbation_momentum
    r.memory["m"] = g if m is None else plus(times(b, m), times(1 - b, g))
    r.step_base(r.grad(plus(r.w, times(r.rho, unit(r.memory["m"])))))


def moved_out(r: Reference) -> List:
    """w - rho v / ||v||, v the momentum of the base optimizer."""
    states = [r.base.state.get(p, {}) for p in r.params.values()]
    v = [s["exp_avg"] if "exp_avg" in s else s.get("momentum_buffer") for s in states]
    return r.w if v[0] is None else minus(r.w, times(r.rho, unit(v)))


def msam(r: Reference) -> None:
    r.step_base(r.grad(moved_out(r)))


STEPS: dict[str, Callable[[Reference], None]] = {
    "sam": sam,
    "memoryefficientsam": sam,
    "asam": asam,
    "gsam": gsam,
    "wsam": wsam,
    "wsam_coupled": wsam_coupled,
    "friendlysam": friendlysam,
    "looksam": looksam,
    "efficientsam": efficientsam,
    "momentumsam": momentumsam,
    "msam": msam,
}
