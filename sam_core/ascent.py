"""Where the worst neighbour of w lies: e = rho T^2 g / ||T g|| (Foret et al. 2021, eq. 2; Kwon et al. 2021, eq. 5).

To first order it maximises the loss in the ball ||T^-1 e|| <= rho. A rule says what T is for one parameter group; the
norm ||T g|| runs over all groups, so that per-group radii share one direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sam_core import _tensors
from sam_core._checks import check_nonnegative


@dataclass(frozen=True, kw_only=True)
class L2Ascent:
    """Euclidean ball, T = 1: e = rho g / ||g|| (Foret et al. 2021, eq. 2).

    Args:
        rho: radius in parameter units, >= 0.
        maximize: the objective is maximised, so its worst neighbour is the lowest: e points along -g.

    Example:
        >>> L2Ascent(rho=0.05).stretch([torch.tensor([3.0])], [torch.tensor([2.0])])  # T g
        [tensor([3.])]
    """

    rho: float
    maximize: bool = False

    def __post_init__(self) -> None:
        check_nonnegative("rho", self.rho)

    def stretch(self, tensors: list[Tensor], params: list[Tensor], foreach: bool | None = None) -> list[Tensor]:
        """T x for tensors x that belong to the parameters: here x itself."""
        return tensors


@dataclass(frozen=True, kw_only=True)
class AdaptiveAscent(L2Ascent):
    """Ball that scales with the weights, T = |w| + eta: e = rho T^2 g / ||T g|| (Kwon et al. 2021, eq. 5).

    Rescaling a layer of a ReLU network and undoing it in the next one does not change it.

    Args:
        rho: radius relative to the weights, >= 0.
        eta: added to |w| so that zero weights move too, in parameter units, >= 0.

    Example:
        >>> AdaptiveAscent(rho=0.5, eta=1.0).stretch([torch.tensor([3.0])], [torch.tensor([-2.0])])  # T g
        [tensor([9.])]
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nonnegative("eta", self.eta)

    def stretch(self, tensors: list[Tensor], params: list[Tensor], foreach: bool | None = None) -> list[Tensor]:
        """(|w| + eta) x, entry by entry; half types as float32."""
        magnitudes = _tensors.absolute(params, foreach=foreach)
        if self.eta:
            _tensors.shift_(magnitudes, self.eta, foreach=foreach)
        return _tensors.multiply(tensors, magnitudes, foreach=foreach)


class Move(NamedTuple):
    """Part of a perturbation, not multiplied out: each parameter moves by ``factor * direction``."""

    params: list[Tensor]
    directions: list[Tensor]
    factor: float | Tensor  # a tensor [] if the host is not to wait for it


@torch.no_grad()
def find_moves(
    rules: Sequence[L2Ascent],
    grads: Sequence[list[Tensor]],
    params: Sequence[list[Tensor]],
    *,
    norm: Tensor | None = None,
    foreach: bool | None = None,
    wait: bool = True,
) -> list[Move]:
    """The perturbation of :func:`compute_perturbation` in factors, T^2 g times rho / ||T g||: for T = 1, no copy of g.

    Args:
        rules: one a parameter group.
        grads: for each group its gradients g, one a parameter.
        params: for each group its parameters w.
        norm: ||g|| over all groups, if known: it spares a look at g where T = 1 in all of them.
        foreach: fuse the operations; None: where possible.
        wait: wait for the norm; if False, factors are tensors and nothing here looks at a value, as graphs need it.

    Returns:
        One move a group; factor 0 where the whole gradient is zero.
    """
    stretched = [
        rule.stretch(group_grads, group_params, foreach)
        for rule, group_grads, group_params in zip(rules, grads, params, strict=True)
    ]
    together = [tensor for tensors in stretched for tensor in tensors]
    if norm is None or any(isinstance(rule, AdaptiveAscent) for rule in rules):
        norm = _tensors.norm(together, foreach=foreach, wait=wait)
    length = float(norm) if wait else norm
    # A subnormal length would make rho / length infinite in the tensors' dtype, and infinity times zero is NaN.
    dtypes = {tensor.dtype for tensor in together}
    limit = min((torch.finfo(torch.promote_types(dtype, torch.float32)).max for dtype in dtypes), default=0.0)

    def factor(rule: L2Ascent) -> float | Tensor:
        if isinstance(length, Tensor):
            size: float | Tensor = (rule.rho / length).clamp(max=limit).masked_fill(length == 0, 0.0)
        else:
            size = min(rule.rho / length, limit) if length != 0 else 0.0
        return -size if rule.maximize else size

    return [
        Move(group_params, rule.stretch(tensors, group_params, foreach), factor(rule))
        for rule, tensors, group_params in zip(rules, stretched, params, strict=True)
    ]


@torch.no_grad()
def compute_perturbation(
    rules: Sequence[L2Ascent],
    grads: Sequence[list[Tensor]],
    params: Sequence[list[Tensor]],
    *,
    foreach: bool | None = None,
) -> list[list[Tensor]]:
    """Perturbation e = rho T^2 g / ||T g||; zero where the whole gradient is zero.

    Args:
        rules: one a parameter group.
        grads: for each group its gradients g, one a parameter.
        params: for each group its parameters w.
        foreach: fuse the operations; None: where possible.

    Returns:
        For each group its perturbation, shaped like the parameters, in parameter units.

    Example:
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> compute_perturbation([L2Ascent(rho=1.0)], [[g]], [[w]])
        [[tensor([0.6000, 0.8000])]]
    """
    moves = find_moves(rules, grads, params, foreach=foreach)
    return [_tensors.scale(move.directions, move.factor, foreach=foreach) for move in moves]
