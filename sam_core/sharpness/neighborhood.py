"""Sharpness near w: how far the loss rises within a radius, max_{||T^-1 e|| <= rho} L(w + e) - L(w).

One SAM step finds it to first order (Foret et al. 2021, eq. 2); projected gradient ascent looks harder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_in, check_nonnegative
from sam_core.ascent import AdaptiveAscent, L2Ascent, compute_perturbation
from sam_core.sharpness._loss import ParameterLoss, Params, check_finite_loss, parameter_loss
from sam_core.sharpness.lanczos import draw_vector


def compute_sam_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.0,
) -> float:
    """How far the loss rises in one SAM step:  L(w + rho g / ||g||) - L(w),  g = grad L(w).

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found. For a
    convex loss the value is at least 0; in general the one step may miss the maximum.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time: then L is the mean over all of them.
        targets: what loss_fn takes; None for a loader.
        rho: radius in parameter units, relative if adaptive, >= 0.
        adaptive: measure the radius relative to the weights, as ASAM: e = rho T^2 g / ||T g||, T = |w| + eta.
        eta: added to |w| if adaptive, in parameter units, >= 0.

    Returns:
        The rise, in units of the loss.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss at the weights is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # loss w^2 at w = 1: from 1 to 1.5^2
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> compute_sam_sharpness(model, loss_fn, torch.ones(1, 1), torch.zeros(1, 1), rho=0.5)
        1.25
    """
    rule = _rule(rho, adaptive, eta)
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        return _one_step_rise(loss, rule)


def compute_m_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    rho: float = 0.05,
    *,
    m: int | None = None,
    adaptive: bool = False,
    eta: float = 0.0,
) -> float:
    """Mean rise of the loss of m samples in a SAM step of their own (Foret et al. 2021, section 4.1).

        sum_i (n_i / n) [L_i(w + e_i) - L_i(w)],    e_i = rho grad L_i(w) / ||grad L_i(w)||,  n_i <= m

    It is what SAM on batches, or on several devices, makes small. The model is measured in eval mode, over the
    parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        rho: radius in parameter units, relative if adaptive, >= 0.
        m: samples that share a step, >= 1; batches are cut along the first axis. None: whole batches.
        adaptive: measure the radius relative to the weights, as :func:`compute_sam_sharpness`.
        eta: added to |w| if adaptive, in parameter units, >= 0.

    Returns:
        The mean rise, in units of the loss.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss at the weights is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # two samples that pull at w = 0 in opposite directions
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> inputs, targets = torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
        >>> squared = torch.nn.functional.mse_loss
        >>> compute_m_sharpness(model, squared, inputs, targets, rho=0.5)  # together w = 0 is their minimum
        0.0
        >>> compute_m_sharpness(model, squared, inputs, targets, rho=0.5, m=1)  # 1.5^2 - 1
        1.25
    """
    rule = _rule(rho, adaptive, eta)
    if m is not None:
        check_count("m", m, at_least=1)
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        rises = [(size, _one_step_rise(part, rule)) for size, part in loss.parts(m)]
        return math.fsum(size * rise for size, rise in rises) / sum(size for size, _ in rises)


def compute_worst_case_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    rho: float = 0.05,
    *,
    norm: str = "l2",
    adaptive: bool = False,
    eta: float = 0.0,
    num_steps: int = 20,
    num_restarts: int = 0,
    generator: torch.Generator | None = None,
) -> float:
    """The largest rise that projected gradient ascent finds in the ball ||T^-1 e||_p <= rho; at least one SAM step's.

    In u = T^-1 e it steps along the steepest direction of the norm (T g / ||T g||_2, or sign T g), projects back, and
    halves the step where the loss did not rise. The first step is that of :func:`compute_sam_sharpness`, to the rim.
    It is a lower bound of the maximum, as every attack is.

    Args:
        model: any module; measured in eval mode, over the parameters that require a gradient, and left as found.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time: then one e is sought for all.
        targets: what loss_fn takes; None for a loader.
        rho: radius, >= 0; in parameter units, relative to the weights if adaptive.
        norm: "l2", or "linf": every entry moves by at most rho, or rho (|w| + eta) if adaptive.
        adaptive: T = |w| + eta (Kwon et al. 2021; Andriushchenko et al. 2023), else T = 1.
        eta: added to |w| if adaptive, in parameter units, >= 0.
        num_steps: gradients from each start, >= 1.
        num_restarts: further starts, at random points of the ball, >= 0.
        generator: of the starts, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        The rise, in units of the loss, >= 0: w is in the ball.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss at the weights is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2 at w = 0: g = 0, so one SAM step sees nothing
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> data = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 1)
        >>> compute_sam_sharpness(model, loss_fn, *data, rho=0.5)
        0.0
        >>> round(compute_worst_case_sharpness(model, loss_fn, *data, rho=0.5, num_restarts=1), 4)  # 4 rho^2
        1.0
    """
    rule = _rule(rho, adaptive, eta)
    check_in("norm", norm, ("l2", "linf"))
    check_count("num_steps", num_steps, at_least=1)
    check_count("num_restarts", num_restarts)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        ball = _Ball(loss, rule, norm)
        best = _one_step_rise(loss, rule)  # its neighbour is in the box as well
        for restart in range(num_restarts + 1):
            best = max(best, ball.climb(ball.draw(generator) if restart else None, num_steps))
        return best


class _Ball:
    """The neighbourhood ||u||_p <= rho of w + T u, and ascent in it; points u are vectors [n]."""

    def __init__(self, loss: ParameterLoss, rule: L2Ascent, norm: str) -> None:
        self.loss, self.rule, self.norm = loss, rule, norm
        self.center = loss.like.new_zeros(loss.num_entries)
        self.at_w, self.grad = self._look(self.center)

    def climb(self, start: Tensor | None, num_steps: int) -> float:
        """The largest rise over w met on the way up from a point, or from w."""
        point, value, grad = self.center, self.at_w, self.grad
        if start is not None:
            point, (value, grad) = start, self._look(start)
        step = self.rule.rho
        for _ in range(num_steps):
            length = torch.linalg.vector_norm(grad)
            if step == 0 or length == 0:
                break
            direction = grad / length if self.norm == "l2" else grad.sign()
            candidate = self._project(point + step * direction)
            candidate_value, candidate_grad = self._look(candidate)
            if candidate_value > value:
                point, value, grad = candidate, candidate_value, candidate_grad
            else:
                step /= 2
        return value - self.at_w

    def draw(self, generator: torch.Generator) -> Tensor:
        """A random point: uniform in direction on the rim for l2, uniform in the box for linf."""
        point = draw_vector(self.loss.num_entries, self.loss.like, generator)
        if self.norm == "l2":
            return torch.div(self.rule.rho * point, torch.linalg.vector_norm(point))
        return self.rule.rho * torch.erf(point / math.sqrt(2))

    def _look(self, point: Tensor) -> tuple[float, Tensor]:
        """The loss at w + T u, and its gradient by u."""
        moves = self._stretch(self.loss.unflatten(point))
        value, grads = self.loss.value_and_grad({name: p + moves[name] for name, p in self.loss.params.items()})
        return _or_infinite(value), self.loss.flatten(self._stretch(grads))

    def _stretch(self, pieces: Params) -> Params:
        stretched = self.rule.stretch([*pieces.values()], [*self.loss.params.values()])
        return dict(zip(pieces, stretched, strict=True))

    def _project(self, point: Tensor) -> Tensor:
        if self.norm == "linf":
            return point.clamp(-self.rule.rho, self.rule.rho)
        return point * min(1.0, self.rule.rho / max(float(torch.linalg.vector_norm(point)), 1e-300))


def _rule(rho: float, adaptive: bool, eta: float) -> L2Ascent:
    check_in("adaptive", adaptive, (True, False))
    check_nonnegative("eta", eta)
    return AdaptiveAscent(rho=rho, eta=eta) if adaptive else L2Ascent(rho=rho)


def _one_step_rise(loss: ParameterLoss, rule: L2Ascent) -> float:
    at_w, grads = loss.value_and_grad(loss.params)
    check_finite_loss(at_w)
    (perturbation,) = compute_perturbation([rule], [[*grads.values()]], [[*loss.params.values()]])
    moves = zip(loss.params.items(), perturbation, strict=True)
    return _or_infinite(loss.value({name: param + move for (name, param), move in moves})) - at_w


def _or_infinite(value: float) -> float:
    """A loss that is NaN overflowed on its way."""
    return math.inf if math.isnan(value) else value
