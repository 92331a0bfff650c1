"""Lanczos: a symmetric operator's spectrum from products with it (Lanczos 1950; thick restarts: Wu and Simon 2000).

Axes: n entries, m basis vectors, k eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]

_CHECK_EVERY = 5  # products between looks at the small eigenproblem


class Eigenpairs(NamedTuple):
    """Eigenvalues found, the wanted end first.

    Attributes:
        eigenvalues: lambda [k], float64 on the CPU.
        eigenvectors: v [n, k], orthonormal, on the operator's device and in its dtype.
        residuals: ||H v - lambda v|| [k]: an eigenvalue of H lies within this distance of lambda.
        num_products: products with the operator that it took.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0, -2.0]))
        >>> pairs = find_eigenpairs(
        ...     matrix.mv, matrix[0], 3, 2, "largest", torch.Generator(), basis_size=3, max_products=3, tol=0.0
        ... )
        >>> pairs.eigenvalues.round(decimals=4), pairs.num_products
        (tensor([3., 1.], dtype=torch.float64), 3)
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    num_products: int


def draw_vector(num_entries: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal vector [n], drawn in float64 on the CPU: the same on every device and for every dtype."""
    return torch.randn(num_entries, generator=generator, dtype=torch.float64).to(like)


def find_eigenpairs(
    multiply: Multiply,
    like: Tensor,
    num_entries: int,
    num_eigenvalues: int,
    which: str,
    generator: torch.Generator,
    *,
    basis_size: int,
    max_products: int,
    tol: float,
) -> Eigenpairs:
    """Lanczos with full orthogonalisation; when the basis is full its best Ritz vectors are kept and it goes on.

    Where the basis spans an invariant subspace another random vector is added, so that multiple eigenvalues are found.

    Args:
        multiply: v [n] -> H v [n], H symmetric.
        like: tensor on the device and of the dtype of the vectors.
        num_entries: n.
        num_eigenvalues: k, in [1, n].
        which: "largest" or "smallest" algebraically, or "magnitude".
        generator: of the random vectors, on the CPU.
        basis_size: most basis vectors in memory, > k unless it is n.
        max_products: most products, >= k.
        tol: enough when all residuals are at most this share of the largest |lambda| in the basis.

    Returns:
        The pairs, good or not: see their residuals.
    """
    size = min(basis_size, num_entries)
    basis_mn = torch.zeros(size, num_entries, dtype=like.dtype, device=like.device)
    small_mm = torch.zeros(size, size, dtype=torch.float64)
    num_known, num_products, num_exhausted = 0, 0, 0
    vector_n = _new_direction(basis_mn[:0], generator)
    while True:
        basis_mn[num_known] = vector_n
        num_known += 1
        known_mn, known_mm = basis_mn[:num_known], small_mm[:num_known, :num_known]
        product_n = multiply(vector_n)
        num_products += 1
        rest_n, length, coefficients_m = orthogonalize(product_n, known_mn)
        known_mm[:, -1] = known_mm[-1] = coefficients_m
        exhausted = length <= 10 * torch.finfo(like.dtype).eps * max(float(known_mm.abs().max()), length)
        num_exhausted += exhausted

        last = num_products >= max_products or num_known == num_entries or num_exhausted > num_eigenvalues
        full = num_known == size
        if num_known >= num_eigenvalues and (last or full or num_products % _CHECK_EVERY == 0):
            values_m, vectors_mm = _sorted_eigh(known_mm, which)
            residuals_m = length * vectors_mm[-1].abs() * (not exhausted)
            wanted = slice(0, num_eigenvalues)
            good = num_exhausted == 0 and bool(residuals_m[wanted].max() <= tol * values_m.abs().max())
            if last or good:
                ritz_kn = vectors_mm[:, wanted].T.to(known_mn) @ known_mn
                return Eigenpairs(values_m[wanted], ritz_kn.T, residuals_m[wanted], num_products)
            if full:
                num_known = min(num_eigenvalues + (size - num_eigenvalues) // 2, size - 1)
                basis_mn[:num_known] = vectors_mm[:, :num_known].T.to(known_mn) @ known_mn
                small_mm = torch.zeros_like(small_mm)
                small_mm[:num_known, :num_known] = torch.diag(values_m[:num_known])
        vector_n = _new_direction(basis_mn[:num_known], generator) if exhausted else rest_n / length


def tridiagonalize(multiply: Multiply, start: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """T of V^T H V = T for the Krylov basis V of a vector, by full orthogonalisation.

    Args:
        multiply: v [n] -> H v [n], H symmetric.
        start: first vector [n], not zero.
        num_steps: m, most basis vectors, in [1, n]; fewer where they span an invariant subspace.

    Returns:
        T's eigenvalues [m] and the squared first entries of its eigenvectors [m], float64 on the CPU: nodes and weights
        of a quadrature for v^T f(H) v / ||v||^2 (Golub and Welsch 1969).
    """
    basis_mn = torch.zeros(num_steps, len(start), dtype=start.dtype, device=start.device)
    small_mm = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    vector_n = start / torch.linalg.vector_norm(start)
    for step in range(num_steps):
        basis_mn[step] = vector_n
        rest_n, length, coefficients_m = orthogonalize(multiply(vector_n), basis_mn[: step + 1])
        small_mm[step, step] = coefficients_m[-1]
        num_known = step + 1
        if length <= 10 * torch.finfo(start.dtype).eps * max(float(small_mm.abs().max()), length):
            break
        if num_known < num_steps:
            small_mm[step + 1, step] = small_mm[step, step + 1] = length
            vector_n = rest_n / length
    values_m, vectors_mm = torch.linalg.eigh(small_mm[:num_known, :num_known])
    return values_m, vectors_mm[0].square()


def orthogonalize(vector_n: Tensor, basis_mn: Tensor) -> tuple[Tensor, float, Tensor]:
    """The part of a vector orthogonal to an orthonormal basis [n], its length, and the rest's coefficients [m].

    The last two basis vectors first: in Lanczos they hold nearly all there is to take away, and one pass over the whole
    basis is then enough. Where a pass takes away much another follows: one is not enough in floating point then, two
    are (Kahan; Parlett 1980, 6.9; the rule is that of Daniel et al. 1976). Coefficients are float64 on the CPU.
    """
    length, coefficients_m = 0.0, torch.zeros(len(basis_mn), dtype=torch.float64)
    for part in (slice(-2, None), slice(None), slice(None)):
        before, share = length, basis_mn[part] @ vector_n
        vector_n = torch.addmv(vector_n, basis_mn[part].T, share, alpha=-1)
        coefficients_m[part] += share.to("cpu", torch.float64)
        length = float(torch.linalg.vector_norm(vector_n))
        if length > before / math.sqrt(2) > 0:
            break
    return vector_n, length, coefficients_m


def _new_direction(basis_mn: Tensor, generator: torch.Generator) -> Tensor:
    vector_n = draw_vector(basis_mn.shape[1], basis_mn, generator)
    vector_n, length, _ = orthogonalize(vector_n / torch.linalg.vector_norm(vector_n), basis_mn)
    return vector_n / length


def _sorted_eigh(small_mm: Tensor, which: str) -> tuple[Tensor, Tensor]:
    values_m, vectors_mm = torch.linalg.eigh(small_mm)
    keys_m = {"largest": values_m, "smallest": -values_m, "magnitude": values_m.abs()}[which]
    order_m = keys_m.argsort(descending=True)
    return values_m[order_m], vectors_mm[:, order_m]
