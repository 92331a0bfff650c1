"""Sharpness near w: max_{||e|| <= rho} L(w + e) - L(w), to first order (Foret et al. 2021, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sam_core.ascent import L2Ascent, compute_perturbation
from sam_core.sharpness._loss import parameter_loss


def compute_sam_sharpness(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, rho: float = 0.05
) -> float:
    """How far the loss rises in one SAM step:  L(w + rho g / ||g||) - L(w),  g = grad L(w).

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found. For a
    convex loss the value is at least 0; in general the one step may miss the maximum.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, or a tuple for ``model(*inputs)``.
        targets: what loss_fn takes.
        rho: radius in parameter units, >= 0.

    Returns:
        The rise, in units of the loss.

    Raises:
        ValueError: for a bad rho, no trainable parameter, or a loss that is not a scalar.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # loss w^2 at w = 1: from 1 to 1.5^2
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> compute_sam_sharpness(model, loss_fn, torch.ones(1, 1), torch.zeros(1, 1), rho=0.5)
        1.25
    """
    rule = L2Ascent(rho=rho)
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        loss_at_w, grads = loss.value_and_grad(loss.params)
        (perturbation,) = compute_perturbation([rule], [list(grads.values())], [list(loss.params.values())])
        moves = zip(loss.params.items(), perturbation, strict=True)
        return loss.value({name: param + move for (name, param), move in moves}) - loss_at_w
