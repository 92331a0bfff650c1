"""ASAM: SAM in a neighbourhood that scales with the weights, T = |w| + eta (Kwon et al. 2021, Algorithm 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_core._checks import check_in
from sam_core.ascent import L2Ascent, Move, find_moves
from sam_core.optimizers.sam import SAM


class ASAM(SAM):
    """Adaptive Sharpness-Aware Minimization: e = rho T^2 g / ||T g||.

    T = |w| + eta scales every parameter, as in the paper. The authors' code scales those alone whose name contains
    "weight" (so norms too) and leaves the others, biases, at T = 1: that is ``weights_only``.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho, adaptive and eta of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius relative to the weights, >= 0; about ten times SAM's or more. 0 is the base optimizer.
        eta: added to |w| so that zero weights move too, in parameter units, >= 0; the paper uses 0.01.
        weights_only: T = 1 where the name does not contain "weight"; params must then come with names.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option, or weights_only without names.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        >>> optimizer = ASAM([w], torch.optim.SGD, rho=1.0, lr=0.1)
        >>> w.grad = torch.tensor([1.5, 4.0])  # T g = (3, 4), T^2 g = (6, 4)
        >>> optimizer.first_step()
        >>> w.data
        tensor([3.2000, 1.8000])
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 2.0,
        eta: float = 0.0,
        *,
        weights_only: bool = False,
        **kwargs: Any,
    ) -> None:
        check_in("weights_only", weights_only, (True, False))
        self.weights_only = weights_only
        super().__init__(params, base_optimizer, rho=rho, adaptive=True, eta=eta, **kwargs)
        if weights_only and any("param_names" not in group for group in self.param_groups):
            raise ValueError("weights_only needs names: pass model.named_parameters(), got parameters without names.")

    def _ascend(self, params: list[list[Tensor]], grads: list[list[Tensor]], norm: Tensor) -> list[Move]:
        if not self.weights_only:
            return super()._ascend(params, grads, norm)
        rules: list[L2Ascent] = []
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for group, group_params, group_grads in zip(self.param_groups, params, grads, strict=True):
            named = zip(group["params"], group["param_names"], strict=True)
            weights = {param for param, name in named if "weight" in name}
            pairs = list(zip(group_params, group_grads, strict=True))
            rules += [self._rule(group), self._rule({**group, "adaptive": False})]
            parts += [[pair for pair in pairs if (pair[0] in weights) == chosen] for chosen in (True, False)]
        split_grads, split_params = [[g for _, g in part] for part in parts], [[p for p, _ in part] for part in parts]
        return find_moves(rules, split_grads, split_params, foreach=self.foreach, wait=self._waits)
