"""Eigenvalues of the Hessian: the one of largest magnitude, the ends of the spectrum, and what a report needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_in, check_nonnegative
from sam_core.sharpness.hessian import Hessian, hessian_operator
from sam_core.sharpness.lanczos import Eigenpairs, draw_vector, find_eigenpairs
from sam_core.sharpness.trace import draw_quadratic_forms, mean_and_error

ENDS = ("largest", "smallest", "magnitude")


def power_iteration_top_eigenvalue(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    n_iterations: int = 100,
    tol: float = 1e-6,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """The Hessian's eigenvalue of largest magnitude, with its sign:  v <- H v / ||H v||,  sign(v . H v) ||H v||.

    ||H v|| never exceeds the true magnitude and never falls from one iteration to the next. It is nearer than the
    usual v . H v, and right where eigenvalues +a and -a compete, when v . H v may be anything between the two.
    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.
    :func:`compute_top_eigenvalues` needs fewer products. Source: von Mises and Pollaczek-Geiringer 1929.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        n_iterations: most products with the Hessian, >= 1.
        tol: stop when the magnitude changes by less than this share of itself, >= 0.
        generator: source of the first v, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        The eigenvalue, in loss per squared parameter unit; 0.0 for a zero Hessian.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> inputs, targets = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> power_iteration_top_eigenvalue(model, loss_fn, inputs, targets)
        18.0
    """
    check_count("n_iterations", n_iterations, at_least=1)
    check_nonnegative("tol", tol)
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        vector = draw_vector(hessian.num_entries, hessian.like, _generator(generator))
        vector, eigenvalue = vector / torch.linalg.vector_norm(vector), 0.0
        for _ in range(n_iterations):
            product = hessian @ vector
            length = float(torch.linalg.vector_norm(product))
            if length == 0:
                return 0.0
            converged = abs(length - abs(eigenvalue)) <= tol * length
            eigenvalue = math.copysign(length, float(vector @ product))
            if converged:
                break
            vector = product / length
        return eigenvalue


def compute_top_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    k: int = 5,
    *,
    which: str = "largest",
    tol: float = 1e-3,
    max_products: int = 300,
    basis_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The k eigenvalues at one end of the Hessian's spectrum, H v = lambda v, with eigenvectors and residuals.

    By Lanczos (1950) with full orthogonalisation and thick restarts (Wu and Simon 2000).

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        k: number of eigenvalues, >= 1; at most n, the number of trainable entries, are found.
        which: "largest" or "smallest" algebraically, or "magnitude".
        tol: enough when every residual is at most this share of the largest magnitude seen, >= 0. Eigenvalues are then
            good to its square, where they are well apart.
        max_products: most products with the Hessian, >= k.
        basis_size: most vectors [n] kept in memory, > k; None: 2 k + 20.
        generator: source of the first vector, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        ``eigenvalues`` [k] from the wanted end inwards, in loss per squared parameter unit, ``eigenvectors`` [n, k],
        ``residuals`` ||H v - lambda v|| [k] and ``num_products``; where ``max_products`` was too small the residuals
        say how good they are.

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> inputs, targets = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> compute_top_eigenvalues(model, loss_fn, inputs, targets, k=1).eigenvalues.round(decimals=4)
        tensor([18.], dtype=torch.float64)
    """
    check_count("k", k, at_least=1)
    check_in("which", which, ENDS)
    check_nonnegative("tol", tol)
    check_count("max_products", max_products, at_least=k)
    if basis_size is not None:
        check_count("basis_size", basis_size, at_least=k + 1)
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        return _top(hessian, k, which, _generator(generator), tol, max_products, basis_size)


def compute_hessian_sharpness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    top_k: int = 5,
    *,
    num_trace_products: int = 100,
    max_dense: int = 1_000,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """The usual measures of the Hessian in one report: the ends of its spectrum, its trace, its Frobenius norm.

    Eigenvalues by Lanczos (:func:`compute_top_eigenvalues`), the trace and ||H||_F^2 = E ||H v||^2 (v with independent
    signs) from the same random products (Hutchinson 1989). A small Hessian is taken whole: all is then exact. The model
    is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        top_k: number of eigenvalues, >= 1; at most n are given.
        num_trace_products: products for trace and Frobenius norm, >= 2.
        max_dense: largest n, the number of trainable entries, of a Hessian that is taken whole, >= 0.
        generator: source of the vectors, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        ``max_eigenvalue`` (algebraically largest), ``top_k_eigenvalues`` (list, falling), ``trace`` and
        ``frobenius_norm`` as floats, in loss per squared parameter unit; besides these ``min_eigenvalue``, and
        ``trace_standard_error`` (0 if exact).

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> inputs, targets = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> report = compute_hessian_sharpness(model, loss_fn, inputs, targets)
        >>> {name: report[name] for name in ("max_eigenvalue", "trace", "frobenius_norm")}
        {'max_eigenvalue': 18.0, 'trace': 18.0, 'frobenius_norm': 18.0}
    """
    check_count("top_k", top_k, at_least=1)
    check_count("num_trace_products", num_trace_products, at_least=2)
    check_count("max_dense", max_dense)
    generator = _generator(generator)
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        if hessian.num_entries <= max_dense:
            values = torch.linalg.eigvalsh(hessian.dense().double()).flip(0)
            smallest, trace, error = float(values[-1]), float(values.sum()), 0.0
            frobenius = float(torch.linalg.vector_norm(values))
        else:
            values = _top(hessian, top_k, "largest", generator).eigenvalues
            smallest = float(_top(hessian, 1, "smallest", generator).eigenvalues[0])
            forms, squares = draw_quadratic_forms(hessian, num_trace_products, generator)
            trace, error = mean_and_error(forms)
            frobenius = math.sqrt(float(squares.mean()))
    return {
        "max_eigenvalue": float(values[0]),
        "top_k_eigenvalues": values[:top_k].tolist(),
        "trace": trace,
        "frobenius_norm": frobenius,
        "min_eigenvalue": smallest,
        "trace_standard_error": error,
    }


def _top(
    hessian: Hessian,
    k: int,
    which: str,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_products: int = 300,
    basis_size: int | None = None,
) -> Eigenpairs:
    return find_eigenpairs(
        hessian.__matmul__,
        hessian.like,
        hessian.num_entries,
        min(k, hessian.num_entries),
        which,
        generator,
        basis_size=basis_size if basis_size is not None else 2 * k + 20,
        max_products=max_products,
        tol=tol,
    )


def _generator(generator: torch.Generator | None) -> torch.Generator:
    return generator if generator is not None else torch.Generator().manual_seed(0)
