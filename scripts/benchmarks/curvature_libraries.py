"""The same questions about a Hessian, asked of sam_core and, where installed, curvlinops and hessian-eigenthings.

Axes: n trainable entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_core.sharpness import (
    compute_hessian_trace,
    compute_spectral_density,
    compute_top_eigenvalues,
    hessian_operator,
)

Batches = Sequence[tuple[Tensor, Tensor]]
TOLERANCE = 1e-3  # of residuals of eigenpairs, relative to the largest eigenvalue


class Library(Protocol):
    """What is asked; vectors are [n]."""

    def product(self, vector: Tensor) -> Tensor:
        """H v."""

    def top(self, k: int, num_products: int) -> Tensor:
        """The k largest eigenvalues [k], falling; ``num_products`` is what sam_core took."""

    def trace(self, method: str, num_products: int, seed: int) -> float:
        """The trace by "hutchinson" or "hutch++"."""

    def density(self, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
        """Nodes and weights [num_steps] of one run of stochastic Lanczos quadrature."""


def libraries(model: nn.Module, batches: Batches, stack: ExitStack) -> dict[str, Library]:
    """Those that are installed, by name, all for the mean cross entropy over batches of equal size."""
    found: dict[str, Library] = {"sam_core": Ours(model, batches, stack)}
    for name, kind in (("curvlinops", Curvlinops), ("hessian-eigenthings", Eigenthings)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # curvlinops uses torch.jit.script
                found[name] = kind(model, batches)
        except ImportError:
            print(f"{name} is not installed")
    return found


class Ours:
    """sam_core: one batch as a batch, several as a loader."""

    def __init__(self, model: nn.Module, batches: Batches, stack: ExitStack) -> None:
        data: tuple[Any, Any] = batches[0] if len(batches) == 1 else (batches, None)
        self._arguments = (model, cross_entropy, *data)
        self._hessian = stack.enter_context(hessian_operator(*self._arguments))
        self.num_products = 0

    def product(self, vector: Tensor) -> Tensor:
        return self._hessian @ vector

    def top(self, k: int, num_products: int) -> Tensor:
        pairs = compute_top_eigenvalues(*self._arguments, k, tol=TOLERANCE)
        self.num_products = pairs.num_products
        return pairs.eigenvalues

    def trace(self, method: str, num_products: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return compute_hessian_trace(*self._arguments, num_products, method=method, generator=generator).value

    def density(self, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        found = compute_spectral_density(*self._arguments, num_runs=1, num_steps=num_steps, generator=generator)
        return found.nodes[0], found.weights[0]


class Curvlinops:
    """curvlinops; eigenvalues by ARPACK in scipy, as its documentation advises."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        import curvlinops

        self._operator = curvlinops.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
        )

    def product(self, vector: Tensor) -> Tensor:
        return self._operator @ vector  # type: ignore[no-any-return]

    def top(self, k: int, num_products: int) -> Tensor:
        from scipy.sparse.linalg import eigsh

        values = eigsh(self._operator.to_scipy(), k=k, which="LA", tol=TOLERANCE, return_eigenvectors=False)
        return torch.as_tensor(values.copy()).double().sort(descending=True).values

    def trace(self, method: str, num_products: int, seed: int) -> float:
        import curvlinops

        torch.manual_seed(seed)
        function = curvlinops.hutchpp_trace if method == "hutch++" else curvlinops.hutchinson_trace
        return float(function(self._operator, num_products))

    def density(self, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        torch.manual_seed(seed)
        values, vectors = fast_lanczos(self._operator, num_steps)
        return values.double(), vectors[0].double().square()


class Eigenthings:
    """hessian-eigenthings; its Lanczos takes a fixed number of steps: as many as sam_core found enough."""

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        import hessian_eigenthings as library

        self._library = library
        self._operator = library.HessianOperator(model, batches, library.supervised_loss(cross_entropy))

    def product(self, vector: Tensor) -> Tensor:
        return self._operator.matvec(vector)  # type: ignore[no-any-return]

    def top(self, k: int, num_products: int) -> Tensor:
        found = self._library.lanczos(self._operator, k=k, max_iter=num_products, which="LA", seed=0)
        return found.eigenvalues.double()  # type: ignore[no-any-return]

    def trace(self, method: str, num_products: int, seed: int) -> float:
        return float(self._library.trace(self._operator, num_matvecs=num_products, method=method, seed=seed).estimate)

    def density(self, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
        found = self._library.spectral_density(
            self._operator, num_runs=1, lanczos_steps=num_steps, num_grid_points=1000, seed=seed
        )
        return found.raw_eigenvalues[0].double(), found.raw_weights[0].double()
