"""The Hessian H of the loss over the parameters: products without forming it (Pearlmutter 1994), and H itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from sam_core._checks import check_count
from sam_core.sharpness._loss import ParameterLoss, Params, parameter_loss


class Hessian:
    """H as a linear operator: ``hessian @ v`` is H v, exactly; made by :func:`hessian_operator`.

    For one batch the graph of the gradient is kept, so that a product costs one more backward through it, less than two
    gradients; for a loader each product runs over all batches, and a block of vectors [n, k] over all of them once.

    Attributes:
        num_entries: the number n of entries of all trainable parameters.
    """

    def __init__(self, loss: ParameterLoss) -> None:
        self.num_entries = loss.num_entries
        self.like = loss.like
        self._loss = loss
        self._kept: Callable[[Params], tuple[Params]] | None = None

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H V for vectors [n] or [n, k], in the order of ``model.parameters()``; shaped like V."""
        if vectors.ndim not in (1, 2) or len(vectors) != self.num_entries:
            shape = f"[{self.num_entries}] or [{self.num_entries}, k]"
            raise ValueError(f"vector must have shape {shape}, got {list(vectors.shape)}.")
        columns = vectors.reshape(self.num_entries, -1).unbind(1)
        pieces = [self._loss.unflatten(column) for column in columns]
        products, total = [torch.zeros_like(column) for column in columns], 0
        for size, multiply in self._multipliers():
            total += size
            for product, piece in zip(products, pieces, strict=True):
                with torch.no_grad():  # or the product would carry a graph of its own
                    product.add_(self._loss.flatten(multiply(piece)[0]).to(product), alpha=size)
        return torch.stack([product / total for product in products], dim=1).reshape(vectors.shape)

    def dense(self, chunk_size: int = 64) -> Tensor:
        """H itself [n, n], exactly symmetric; ``chunk_size`` rows are computed at once."""
        basis = torch.eye(self.num_entries, dtype=self.like.dtype, device=self.like.device)
        rows, total = torch.zeros_like(basis), 0
        for size, multiply in self._multipliers():

            def row(unit: Tensor, multiply: Any = multiply) -> Tensor:
                return self._loss.flatten(multiply(self._loss.unflatten(unit))[0])

            with torch.no_grad():
                rows.add_(vmap(row, chunk_size=chunk_size)(basis), alpha=size)
            total += size
        return (rows + rows.T) / (2 * total)

    def _multipliers(self) -> Iterator[tuple[int, Callable[[Params], tuple[Params]]]]:
        """For each batch its size and v -> H_i v."""
        if self._kept is not None:
            yield 1, self._kept
            return
        for size, loss in self._loss.batches():
            # H is symmetric, so reverse over reverse will do; more operations have it than forward over reverse.
            multiply = vjp(grad(loss), self._loss.params)[1]
            if self._loss.has_one_batch:
                self._kept = multiply
            yield size, multiply


@contextmanager
def hessian_operator(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any = None
) -> Iterator[Hessian]:
    """Gives the Hessian of the loss at the present weights, as a linear operator, within the block.

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, or a tuple for ``model(*inputs)``; or, with targets None, a loader that gives such
            (inputs, targets), the same ones each time.
        targets: what loss_fn takes; None for a loader.

    Raises:
        ValueError: for no trainable parameter, a loss that is not a scalar, or a loader without a batch.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)  # loss (w . x)^2: H = 2 x x^T
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> with hessian_operator(model, loss_fn, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 1)) as hessian:
        ...     hessian @ torch.eye(2)
        tensor([[18.,  0.],
                [ 0.,  0.]])
    """
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        yield Hessian(loss)


def compute_hessian_vector_product(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, vector: Tensor
) -> Tensor:
    """H v, exactly, at the cost of about two gradients.

    The model is measured in eval mode, over the parameters that require a gradient, and left exactly as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor.
        inputs: a tensor, or a tuple for ``model(*inputs)``; or, with targets None, a loader that gives such
            (inputs, targets), the same ones each time.
        targets: what loss_fn takes; None for a loader.
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
    """The whole Hessian H, for small models: the truth that estimates are held against.

    Args:
        model: any module; measured in eval mode, over the parameters that require a gradient, and left as found.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, or, with targets None, a loader.
        targets: what loss_fn takes; None for a loader.
        max_entries: the largest n that is computed; H has n^2 entries.
        chunk_size: rows computed at once, >= 1; each keeps activations of its own.

    Returns:
        H [n, n], exactly symmetric, in the order of ``model.parameters()``.

    Raises:
        ValueError: for more than max_entries entries, a bad option, no trainable parameter, or a loss that is not a
            scalar.

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
