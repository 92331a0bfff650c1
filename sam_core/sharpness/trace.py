"""The trace of the Hessian from random products (Hutchinson 1989; Hutch++: Meyer, Musco, Musco and Woodruff 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_in
from sam_core.sharpness.hessian import Hessian, hessian_operator


class Estimate(NamedTuple):
    """A mean of random draws.

    Attributes:
        value: the estimate.
        standard_error: its standard deviation, estimated from the draws; 0 if exact.
        num_products: products with the Hessian, or evaluations of the loss, that it took.

    Example:
        >>> Estimate(value=20.0, standard_error=0.5, num_products=100)
        Estimate(value=20.0, standard_error=0.5, num_products=100)
    """

    value: float
    standard_error: float
    num_products: int


def compute_hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    num_products: int = 100,
    *,
    method: str = "hutch++",
    generator: torch.Generator | None = None,
) -> Estimate:
    """tr H, unbiased, with its standard error.

        "hutchinson"   mean of g^T H g,  g of independent signs
        "hutch++"      tr Q^T H Q + mean of g^T P H P g,  Q an orthonormal basis of H S, S and g of signs, P = 1 - Q Q^T

    Hutch++ takes the large eigenvalues exactly, which for losses are few, and estimates the rest; it keeps two sets of
    ``num_products / 3`` vectors in memory. Hutchinson keeps one vector. The model is measured in eval mode, over the
    parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        num_products: most products with the Hessian, >= 2, for "hutch++" >= 6.
        method: "hutch++" or "hutchinson".
        generator: source of the vectors, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        ``value`` and ``standard_error`` in loss per squared parameter unit, and ``num_products``.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> trace = compute_hessian_trace(model, loss_fn, torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1))
        >>> round(trace.value, 4), trace.standard_error
        (20.0, 0.0)
    """
    check_in("method", method, ("hutch++", "hutchinson"))
    check_count("num_products", num_products, at_least=6 if method == "hutch++" else 2)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        if method == "hutchinson":
            forms, _ = draw_quadratic_forms(hessian, num_products, generator)
            return Estimate(*mean_and_error(forms), num_products)
        return _hutch_plus_plus(hessian, num_products // 3, generator)


def draw_quadratic_forms(hessian: Hessian, num_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """g^T H g and ||H g||^2 [num_draws] for vectors g of independent signs; their means are tr H and ||H||_F^2."""
    forms, squares = [], []
    for start in range(0, num_draws, hessian.num_together):
        shape = (min(hessian.num_together, num_draws - start), hessian.num_entries)
        signs = draw_signs(shape, hessian.like, generator).T
        products = hessian @ signs
        forms.append((signs * products).sum(dim=0).cpu())
        squares.append(products.square().sum(dim=0).cpu())
    return torch.cat(forms).double(), torch.cat(squares).double()


def draw_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal probability, drawn on the CPU."""
    return torch.randint(2, shape, generator=generator).mul_(2).sub_(1).to(like)


def mean_and_error(draws: Tensor) -> tuple[float, float]:
    """Mean of independent draws [m], m >= 2, and its standard error."""
    return float(draws.mean()), float(draws.std()) / math.sqrt(len(draws))


def _hutch_plus_plus(hessian: Hessian, num_vectors: int, generator: torch.Generator) -> Estimate:
    num_vectors = min(num_vectors, hessian.num_entries)
    shape = (num_vectors, hessian.num_entries)  # drawn transposed, so that each vector lies in one piece of memory
    basis = torch.linalg.qr(hessian @ draw_signs(shape, hessian.like, generator).T).Q
    known = float((basis * (hessian @ basis)).sum())
    if num_vectors == hessian.num_entries:
        return Estimate(known, 0.0, 2 * num_vectors)
    rest = draw_signs(shape, hessian.like, generator).T
    rest = rest - basis @ (basis.T @ rest)
    forms = (rest * (hessian @ rest)).sum(dim=0).cpu().double()
    mean, error = mean_and_error(forms)
    return Estimate(known + mean, error, 3 * num_vectors)
