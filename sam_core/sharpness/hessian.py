"""Products with the Hessian H of the loss over the parameters, without forming it (Pearlmutter 1994)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from sam_core.sharpness._loss import Params, parameter_loss


def compute_hessian_vector_product(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, vector: Tensor
) -> Tensor:
    """H v, exactly, at the cost of about two gradients.

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, or a tuple for ``model(*inputs)``.
        targets: what loss_fn takes.
        vector: v [n]; the n entries of all trainable parameters in the order of ``model.parameters()``.

    Returns:
        H v, [n].

    Raises:
        ValueError: for a vector of another shape, no trainable parameter, or a loss that is not a scalar.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> inputs, targets = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> compute_hessian_vector_product(model, loss_fn, inputs, targets, torch.tensor([1.0, 1.0]))
        tensor([18.,  0.])
    """
    with parameter_loss(model, loss_fn, inputs, targets) as (loss, params):
        num_entries = sum(param.numel() for param in params.values())
        if vector.shape != (num_entries,):
            raise ValueError(f"vector must have shape [{num_entries}], got {list(vector.shape)}.")
        # H is symmetric, so reverse over reverse will do; more operations have it than forward over reverse.
        multiply = vjp(grad(loss), params)[1]
        product: Params = multiply(_unflatten(vector, params))[0]
        return torch.cat([product[name].reshape(-1) for name in params])


def _unflatten(vector: Tensor, params: Params) -> Params:
    """Cut a vector [n] into pieces shaped, typed and placed like the parameters."""
    pieces = torch.split(vector.detach(), [param.numel() for param in params.values()])
    return {
        name: piece.reshape(param.shape).to(param) for (name, param), piece in zip(params.items(), pieces, strict=True)
    }
