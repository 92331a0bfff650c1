"""The loss along random directions that are normalised by filter (Li et al. 2018, section 4)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam_core._checks import check_count, check_in, check_positive
from sam_core.sharpness._loss import ParameterLoss, Params, check_finite_loss, parameter_loss
from sam_core.sharpness.lanczos import draw_vector
from sam_core.sharpness.plot import plot_landscape


@dataclass(frozen=True, kw_only=True)
class LossLandscape:
    """The loss on a line or a plane through w.

    Attributes:
        coordinates: steps along each direction [p], from -radius to radius; 0 is w.
        losses: [p] for one direction, [p, p] for two: first axis, first direction. float64.

    Example:
        >>> line = LossLandscape(coordinates=torch.tensor([-1.0, 0.0, 1.0]), losses=torch.tensor([3.0, 1.0, 2.0]))
        >>> line.rise
        tensor([2., 0., 1.])
    """

    coordinates: Tensor
    losses: Tensor

    @property
    def rise(self) -> Tensor:
        """The losses less that at w, shaped alike."""
        middle = len(self.coordinates) // 2
        return self.losses - self.losses[(middle,) * self.losses.ndim]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: a curve, or contour lines with w in the middle. Needs matplotlib.

        Raises:
            ImportError: without matplotlib.
        """
        plot_landscape(self, path)


def compute_loss_landscape(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    *,
    num_directions: int = 2,
    radius: float = 1.0,
    num_points: int = 21,
    normalization: str = "filter",
    directions: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> LossLandscape:
    """L(w + a d) on a line, or L(w + a d_1 + b d_2) on a plane.

        filter-normalised:  d_f <- d_f ||w_f|| / ||d_f|| for each row f of a weight; 0 for biases and norm layers

    so that a step means the same share of each filter, and landscapes of networks that differ by a rescaling of their
    layers look alike. The model is measured in eval mode, over the parameters that require a gradient, and left exactly
    as found.

    Args:
        model: any module.
        loss_fn: maps (model output, targets) to a scalar tensor, the mean over samples.
        inputs: a tensor, a tuple for ``model(*inputs)``, a mapping for ``model(**inputs)``; or a loader that gives such
            (inputs, targets), or mappings alone, the same ones each time.
        targets: what loss_fn takes; None for a loader.
        num_directions: 1 or 2.
        radius: largest step, > 0; 1 moves a filter by its own length.
        num_points: points along each direction, odd, >= 3: the middle one is w.
        normalization: "filter", or "none" to take directions as they are.
        directions: ``num_directions`` vectors [n] to use, e.g. eigenvectors; None: random normal ones.
        generator: of the directions, on the CPU; None: a fixed one. The global random state is not touched.

    Returns:
        Coordinates [p] and losses [p] or [p, p].

    Raises:
        ValueError: for a bad option, no trainable parameter, or a loss that is not a scalar.
        FloatingPointError: where the loss at the weights is NaN or infinite.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)  # loss w^2 at w = 2; the only filter moves by +-2
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> loss_fn = lambda outputs, targets: (outputs - targets).square().mean()
        >>> data = torch.ones(1, 1), torch.zeros(1, 1)
        >>> compute_loss_landscape(model, loss_fn, *data, num_directions=1, num_points=3).losses.sort().values
        tensor([ 0.,  4., 16.], dtype=torch.float64)
    """
    check_in("num_directions", num_directions, (1, 2))
    check_positive("radius", radius)
    check_count("num_points", num_points, at_least=3)
    if num_points % 2 == 0:
        raise ValueError(f"num_points must be odd, so that the middle one is w, got {num_points!r}.")
    check_in("normalization", normalization, ("filter", "none"))
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    with parameter_loss(model, loss_fn, inputs, targets) as loss:
        if directions is None:
            directions = [draw_vector(loss.num_entries, loss.like, generator) for _ in range(num_directions)]
        _check_directions(directions, num_directions, loss)
        moves = [loss.unflatten(direction) for direction in directions]
        if normalization == "filter":
            moves = [_filter_normalized(move, loss.params) for move in moves]
        coordinates = torch.linspace(-radius, radius, num_points, dtype=torch.float64)
        coordinates[num_points // 2] = 0.0
        steps = torch.cartesian_prod(*[coordinates] * num_directions).reshape(-1, num_directions).tolist()
        losses = torch.tensor([loss.value(_moved(loss.params, moves, step)) for step in steps], dtype=torch.float64)
        check_finite_loss(float(losses[len(losses) // 2]))
        return LossLandscape(coordinates=coordinates, losses=losses.reshape([num_points] * num_directions))


def _check_directions(directions: Sequence[Tensor], num_directions: int, loss: ParameterLoss) -> None:
    shapes = [list(direction.shape) for direction in directions]
    if shapes != [[loss.num_entries]] * num_directions:
        raise ValueError(f"directions must be {num_directions} vectors [{loss.num_entries}], got shapes {shapes}.")


def _filter_normalized(move: Params, params: Params) -> Params:
    normalized = {}
    for name, direction in move.items():
        if direction.ndim <= 1:
            normalized[name] = torch.zeros_like(direction)
            continue
        filters, weights = direction.flatten(1), params[name].flatten(1)
        lengths = filters.norm(dim=1, keepdim=True).clamp_min(torch.finfo(filters.dtype).tiny)
        normalized[name] = (filters * (weights.norm(dim=1, keepdim=True) / lengths)).reshape(direction.shape)
    return normalized


def _moved(params: Params, moves: Sequence[Params], steps: Sequence[float]) -> Params:
    moved = dict(params)
    for move, step in zip(moves, steps, strict=True):
        moved = {name: param.add(move[name], alpha=step) for name, param in moved.items()}
    return moved
