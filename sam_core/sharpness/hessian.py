"""The Hessian H of the loss over the parameters: products without forming it (Pearlmutter 1994), and H itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_core._checks import check_count
from sam_core.sharpness._loss import BatchLoss, ParameterLoss, Params, parameter_loss


class Hessian:
    """H as a linear operator: ``hessian @ v`` is H v, exactly; made by :func:`hessian_operator`.

    For one batch the graph of the gradient is kept, so that a product costs one more backward through it, less than two
    gradients; for a loader each product runs over all batches, and a block of vectors [n, k] over all of them once.

    Attributes:
        num_entries: the number n of entries of all trainable parameters.
        like: a tensor [0] on the device and of the dtype of vectors that suit H.

    Source: Pearlmutter 1994.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> with hessian_operator(model, loss_fn, torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1)) as hessian:
        ...     hessian.num_entries, hessian @ torch.ones(2)
        (2, tensor([24.,  8.]))
    """

    def __init__(self, loss: ParameterLoss) -> None:
        self.num_entries = loss.num_entries
        self.like = loss.like
        self._loss = loss
        self._kept: Callable[[Params], Params] | None = None

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H V for vectors [n] or [n, k], in the order of ``model.parameters()``; shaped like V."""
        if vectors.ndim not in (1, 2) or len(vectors) != self.num_entries:
            shape = f"[{self.num_entries}] or [{self.num_entries}, k]"
            raise ValueError(f"vector must have shape {shape}, got {list(vectors.shape)}.")
        columns = vectors.reshape(self.num_entries, -1).T.contiguous()
        pieces = [self._loss.unflatten(column) for column in columns]
        products: list[Tensor] = []
        total = 0
        for size, multiply in self._multipliers():
            total += size
            parts = [self._loss.flatten(multiply(piece)) for piece in pieces]
            if products:
                for product, part in zip(products, parts, strict=True):
                    product.add_(part, alpha=size)
            else:
                products = [part if size == 1 else part.mul_(size) for part in parts]
        result = products[0] if vectors.ndim == 1 else torch.stack(products).T
        result = result if total == 1 else result.div_(total)
        _check_finite(result)
        return result.to(vectors.device, torch.promote_types(vectors.dtype, result.dtype))

    def dense(self, chunk_size: int = 64) -> Tensor:
        """H itself [n, n], exactly symmetric; ``chunk_size`` rows are computed at once."""
        basis = torch.eye(self.num_entries, dtype=self.like.dtype, device=self.like.device)
        rows, total = torch.zeros_like(basis), 0
        for size, loss in self._loss.batches():
            multiply = vjp(grad(loss), self._loss.params)[1]

            def row(unit: Tensor, multiply: Any = multiply) -> Tensor:
                return self._loss.flatten(multiply(self._loss.unflatten(unit))[0])

            with torch.no_grad():
                rows.add_(vmap(row, chunk_size=chunk_size)(basis), alpha=size)
            total += size
        _check_finite(rows)
        return (rows + rows.T) / (2 * total)

    def _multipliers(self) -> Iterator[tuple[int, Callable[[Params], Params]]]:
        """For each batch its size and v -> H_i v."""
        if self._kept is not None:
            yield 1, self._kept
            return
        for size, loss in self._loss.batches():
            multiply = _multiplier(loss, self._loss.params)
            if self._loss.has_one_batch:
                self._kept = multiply
            yield size, multiply


def _multiplier(loss: BatchLoss, params: Params) -> Callable[[Params], Params]:
    """v -> H v. As H is symmetric, reverse over reverse will do; more operations have it than forward over reverse."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        value = loss(leaves)
        if not value.requires_grad:
            return lambda pieces: {name: torch.zeros_like(piece) for name, piece in pieces.items()}
        grads = torch.autograd.grad(value, [*leaves.values()], create_graph=True, materialize_grads=True)
    curved = {name: g for name, g in zip(leaves, grads, strict=True) if g.requires_grad}  # the loss is linear elsewhere

    def multiply(pieces: Params) -> Params:
        if not curved:
            return {name: torch.zeros_like(piece) for name, piece in pieces.items()}
        products = torch.autograd.grad(
            [*curved.values()],
            [*leaves.values()],
            [pieces[name] for name in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, products, strict=True))

    return multiply


def _check_finite(product: Tensor) -> None:
    if not bool(torch.isfinite(product.sum())):
        raise FloatingPointError("products with the Hessian must be finite, got NaN or infinity: is the loss finite?")


@contextmanager
def hessian_operator(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any = None
) -> Iterator[Hessian]:
    """Gives the Hessian of the loss at the present weights, as a linear operator, within the block.

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.

    Raises:
        ValueError: for no trainable parameter, a loss that is not a scalar, or a loader without a batch.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> with hessian_operator(model, loss_fn, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)) as hessian:
        ...     hessian @ torch.eye(2)
        tensor([[18.,  0.],
                [ 0.,  0.]])
    """
    # The fused kernels of attention have no second derivative.
    with parameter_loss(model, loss_fn, inputs, targets) as loss, sdpa_kernel(SDPBackend.MATH):
        yield Hessian(loss)


def compute_hessian_vector_product(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, vector: Tensor
) -> Tensor:
    """H v = d/dt grad L(w + t v) at t = 0, exactly, at the cost of about two gradients (Pearlmutter 1994).

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        vector: v [n]; the n entries of all trainable parameters in the order of ``model.parameters()``.

    Returns:
        H v, [n], in loss per squared parameter unit times the unit of v; of the wider type of vector and parameters.

    Raises:
        ValueError: for a vector of another shape, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> inputs, targets = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)
        >>> compute_hessian_vector_product(model, loss_fn, inputs, targets, torch.tensor([1.0, 1.0]))
        tensor([18.,  0.])
    """
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        if vector.shape != (hessian.num_entries,):
            raise ValueError(f"vector must have shape [{hessian.num_entries}], got {list(vector.shape)}.")
        return hessian @ vector


def compute_hessian(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    max_entries: int = 5_000,
    chunk_size: int = 64,
) -> Tensor:
    """The whole Hessian, H_ij = d2 L / dw_i dw_j, for small models: the truth that estimates are held against.

    Args:
        model: any module; measured in eval mode, over the parameters that require a gradient, and left as found.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        max_entries: the largest n that is computed; H has n^2 entries.
        chunk_size: rows computed at once, >= 1; each keeps activations of its own.

    Returns:
        H [n, n] in loss per squared parameter unit, exactly symmetric, in the order of ``model.parameters()``.

    Raises:
        ValueError: for more than max_entries entries, a bad option, no trainable parameter, or a loss that is not a
            scalar.
        FloatingPointError: where the loss, or a product with its Hessian, is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> compute_hessian(model, loss_fn, torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1))
        tensor([[18.,  6.],
                [ 6.,  2.]])
    """
    check_count("max_entries", max_entries, at_least=1)
    check_count("chunk_size", chunk_size, at_least=1)
    with hessian_operator(model, loss_fn, inputs, targets) as hessian:
        if hessian.num_entries > max_entries:
            raise ValueError(
                f"model must have at most max_entries = {max_entries} trainable entries, got {hessian.num_entries}; "
                "use products with the Hessian instead, or raise max_entries."
            )
        return hessian.dense(chunk_size)
