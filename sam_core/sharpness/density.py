"""The Hessian's spectral density by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017; Ghorbani et al. 2019).

Axes: r runs, m quadrature nodes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_positive
from sam_core.sharpness.hessian import hessian_operator
from sam_core.sharpness.lanczos import tridiagonalize
from sam_core.sharpness.plot import plot_density
from sam_core.sharpness.trace import draw_signs, mean_and_error


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """Where the Hessian's n eigenvalues lie: each run is a quadrature of their distribution.

    Attributes:
        nodes: [r, m], eigenvalue units, float64.
        weights: [r, m], >= 0, each row sums to 1; 0 at nodes that a run did not need.
        num_entries: n.
        num_products: products with the Hessian that it took.

    Example:
        >>> nodes, weights = torch.tensor([[0.0, 4.0]]).double(), torch.tensor([[0.75, 0.25]]).double()
        >>> density = SpectralDensity(nodes=nodes, weights=weights, num_entries=100, num_products=2)
        >>> density.mean(lambda eigenvalues: eigenvalues)  # tr H / n, from one run
        (1.0, nan)
        >>> density.evaluate(torch.tensor([4.0]), sigma=0.1).round(decimals=3)  # 0.25 / (sigma sqrt(2 pi))
        tensor([0.9970], dtype=torch.float64)
    """

    nodes: Tensor
    weights: Tensor
    num_entries: int
    num_products: int

    def mean(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """(1 / n) tr f(H) and its standard error over runs (NaN for one run); n times it estimates tr f(H)."""
        values_r = (self.weights * function(self.nodes)).sum(dim=1)
        return mean_and_error(values_r) if len(values_r) > 1 else (float(values_r), math.nan)

    def evaluate(self, points: Tensor, sigma: float) -> Tensor:
        """The density at points [p], convolved with a normal one of standard deviation sigma, > 0; integrates to 1.

        Args:
            points: eigenvalues.
            sigma: width of the convolution in eigenvalue units; a hundredth of the spectrum's width is usual.

        Returns:
            Density [p], per eigenvalue unit, float64.
        """
        check_positive("sigma", sigma)
        distances = (points.to(self.nodes)[:, None] - self.nodes.reshape(1, -1)) / sigma
        kernel = torch.exp(-distances.square() / 2) / (sigma * math.sqrt(2 * math.pi))
        return kernel @ self.weights.reshape(-1) / len(self.weights)

    def plot(self, path: str | os.PathLike[str], sigma: float | None = None) -> None:
        """Write a picture, on a logarithmic axis: density against eigenvalue. Needs matplotlib.

        Args:
            path: of the picture, e.g. a .png or .svg.
            sigma: as for :meth:`evaluate`; None: a hundredth of the spectrum's width.

        Raises:
            ImportError: without matplotlib.
        """
        plot_density(self, path, sigma)


def compute_spectral_density(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    num_runs: int = 4,
    num_steps: int = 60,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """How the eigenvalues of the Hessian are distributed.

    Each run starts Lanczos at a vector of random signs; the eigenvalues of its small matrix and the squared first
    entries of the eigenvectors are nodes and weights of a Gauss quadrature, exact for polynomials up to degree
    2 num_steps - 1 in the mean. The model is measured in eval mode, over the parameters that require a gradient, and
    left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        num_runs: independent starts, >= 1.
        num_steps: products a run and vectors [n] in memory, >= 1; at most n are taken.
        generator: source of the starts, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        A density to evaluate, to plot, or to take means of functions with.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T, eigenvalues 18 and 0
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> density = compute_spectral_density(model, loss_fn, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1))
        >>> round(density.mean(lambda eigenvalues: eigenvalues)[0], 4)  # tr H / 2
        9.0
    """
    check_count("num_runs", num_runs, at_least=1)
    check_count("num_steps", num_steps, at_least=1)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        num_steps = min(num_steps, hessian.num_entries)
        nodes, weights = torch.zeros(2, num_runs, num_steps, dtype=torch.float64)
        num_products = 0
        for run in range(num_runs):
            start = draw_signs((hessian.num_entries,), hessian.like, generator)
            found, shares = tridiagonalize(hessian.__matmul__, start, num_steps)
            nodes[run, : len(found)], weights[run, : len(found)] = found, shares
            num_products += len(found)
        return SpectralDensity(nodes=nodes, weights=weights, num_entries=hessian.num_entries, num_products=num_products)
