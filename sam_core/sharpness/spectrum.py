"""Extreme eigenvalues of the Hessian from products with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_nonnegative
from sam_core.sharpness.hessian import compute_hessian_vector_product


def power_iteration_top_eigenvalue(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    n_iterations: int = 100,
    tol: float = 1e-6,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """The Hessian's eigenvalue of largest magnitude, with its sign:  v <- H v / ||H v||,  sign(v . H v) ||H v||.

    ||H v|| never exceeds the true magnitude and never falls from one iteration to the next. It is nearer than the
    usual v . H v, and right where eigenvalues +a and -a compete, when v . H v may be anything between the two.
    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, or a tuple for ``model(*inputs)``.
        targets: what loss_fn takes.
        n_iterations: most products with the Hessian, >= 1.
        tol: stop when the magnitude changes by less than this share of itself, >= 0.
        generator: source of the first v, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        The eigenvalue; 0.0 for a zero Hessian.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> inputs, targets = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> power_iteration_top_eigenvalue(model, loss_fn, inputs, targets)
        18.0
    """
    check_count("n_iterations", n_iterations, at_least=1)
    check_nonnegative("tol", tol)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    params = [param for param in model.parameters() if param.requires_grad]
    # Drawn in float64 on the CPU: the same start on every device and for every dtype.
    start = torch.randn(sum(param.numel() for param in params), generator=generator, dtype=torch.float64)
    vector = (start / start.norm()).to(params[0]) if params else start

    eigenvalue = 0.0
    for _ in range(n_iterations):
        product = compute_hessian_vector_product(model, loss_fn, inputs, targets, vector)
        length = float(torch.linalg.vector_norm(product))
        if length == 0:
            return 0.0
        converged = abs(length - abs(eigenvalue)) <= tol * length
        eigenvalue = math.copysign(length, float(vector @ product))
        if converged:
            break
        vector = product / length
    return eigenvalue
