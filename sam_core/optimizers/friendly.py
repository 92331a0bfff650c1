"""FriendlySAM: look along the noise of a batch, its gradient less the average one (Li et al. 2024, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core._checks import check_nonnegative, check_share
from sam_core.ascent import Move, find_moves
from sam_core.optimizers.averaged import AveragedAscent


class FriendlySAM(AveragedAscent):
    """Friendly SAM: e = rho d / ||d|| with d = g - sigma m, m the running average of g.

        m_0 = 0,  d_1 = g_1,  m_1 = g_1;   then  d_t = g_t - sigma m_{t-1},  m_t = lmbda m_{t-1} + (1 - lmbda) g_t

    The full gradient's part of g makes SAM's perturbation generalise worse; d leaves it out. The order is that of the
    authors' code; the paper updates m first and subtracts m_t, and starts it at 0.

    Args:
        params: parameters, named parameters or parameter groups; a group may set the options below of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, parameter units, >= 0. 0 is the base optimizer; the average then rests.
        sigma: how much of the average to take out; 0 is SAM.
        lmbda: memory of the average, in [0, 1).
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FriendlySAM([w], torch.optim.SGD, rho=1.0, lr=0.1)
        >>> for g in ([3.0, 4.0], [3.0, 6.0]):  # the first step looks along g, the second along g - m = (0, 2)
        ...     w.grad = torch.tensor(g)
        ...     optimizer.first_step()
        ...     print(w.data)
        ...     optimizer.restore()
        tensor([0.6000, 0.8000])
        tensor([0., 1.])
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "sigma": sigma, "lmbda": lmbda}, **kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("sigma", group["sigma"])
        check_share("lmbda", group["lmbda"])

    def _ascend(self, params: list[list[Tensor]], grads: list[list[Tensor]], norm: Tensor) -> list[Move]:
        directions = []
        for group, group_params, group_grads in zip(self.param_groups, params, grads, strict=True):
            old = [self._method_state[p]["average"] if p in self._method_state else None for p in group_params]
            directions.append(
                [
                    g if m is None else torch.sub(g, m, alpha=group["sigma"])
                    for g, m in zip(group_grads, old, strict=True)
                ]
            )
            self._average(group_params, group_grads, group["lmbda"])
        rules = [self._rule(group) for group in self.param_groups]
        return find_moves(rules, directions, params, foreach=self.foreach, wait=self._waits)
