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
from sam_core.sharpness._loss import BatchLoss, ParameterLoss, Params, grads_by, parameter_loss

Multiply = Callable[[Params, bool], Params]

_KEPT_BYTES = 2**28  # of the graphs of a loader's batches, about
_FEW_ENTRIES = 500_000  # so many are multiplied at once, where it is calls that take the time and not arithmetic


class Hessian:
    """H as a linear operator: ``hessian @ v`` is H v, exactly; made by :func:`hessian_operator`.

    For one batch the graph of the gradient is kept, so that a product costs one more backward through it, less than two
    gradients; for a loader too, from the second product on, if the graphs of all batches take less than about 256 MB.
    Else each product runs over the loader, and a block of vectors [n, k] once.

    Attributes:
        num_entries: the number n of entries of all trainable parameters.
        like: a tensor [0] on the device and of the dtype of vectors that suit H.
        num_together: vectors of a block that are multiplied at once: several where n is small.

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
        self._kept: list[tuple[int, Multiply]] = []
        self._room, self._wants_graphs = _KEPT_BYTES, False
        self.num_together = max(1, min(32, _FEW_ENTRIES // loss.num_entries))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H V for vectors [n] or [n, k], in the order of ``model.parameters()``; shaped like V."""
        if vectors.ndim not in (1, 2) or len(vectors) != self.num_entries:
            shape = f"[{self.num_entries}] or [{self.num_entries}, k]"
            raise ValueError(f"vector must have shape {shape}, got {list(vectors.shape)}.")
        rows = vectors.reshape(self.num_entries, -1).T.contiguous()
        products: list[Tensor] = []
        total = 0
        for size, multiply in self._multipliers():
            total += size
            parts = [part for chunk in rows.split(self.num_together) for part in self._multiplied(multiply, chunk)]
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

    def _multiplied(self, multiply: Multiply, rows: Tensor) -> list[Tensor]:
        """H v for the rows v [k, n]."""
        if len(rows) == 1:
            return [self._loss.flatten(multiply(self._loss.unflatten(rows[0]), False))]
        return [*self._loss.flatten(multiply(self._loss.unflatten(rows), True))]

    def _multipliers(self) -> Iterator[tuple[int, Multiply]]:
        """For each batch its size and v -> H_i v."""
        if self._kept:
            yield from self._kept
            return
        kept: list[tuple[int, Multiply]] = []
        for size, loss in self._loss.batches():
            if self._wants_graphs:
                self._room -= _graph_bytes(loss, self._loss.params)
            multiply = _multiplier(loss, self._loss.params)
            if self._loss.has_one_batch or (self._wants_graphs and self._room > 0):
                kept.append((size, multiply))
            else:
                kept.clear()
            yield size, multiply
        self._kept, self._wants_graphs = kept, self._room > 0  # of a loader only in the second pass: there may be none


def _graph_bytes(loss: BatchLoss, params: Params) -> int:
    """About what the graph of the gradient takes: three times that of the loss, and the gradient."""
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> None:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing):
        ParameterLoss.graph(loss, params)
    return 3 * sum(storages.values()) + sum(2 * param.nbytes for param in params.values())


def _multiplier(loss: BatchLoss, params: Params) -> Multiply:
    """V -> H V. As H is symmetric, reverse over reverse will do; more operations have it than forward over reverse."""
    leaves, value = ParameterLoss.graph(loss, params)
    grads = grads_by(value, leaves, create_graph=True)
    curved = {name: slope for name, slope in grads.items() if slope.requires_grad}  # elsewhere the loss is linear

    def multiply(pieces: Params, together: bool) -> Params:
        if not curved:
            return {name: torch.zeros_like(piece) for name, piece in pieces.items()}
        products = torch.autograd.grad(
            [*curved.values()],
            [*leaves.values()],
            [pieces[name] for name in curved],
            retain_graph=True,
            is_grads_batched=together,
            materialize_grads=True,
        )
        # Where nothing depends on a leaf, its zeros have no axis for the vectors.
        return {name: product.expand_as(pieces[name]) for name, product in zip(leaves, products, strict=True)}

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
