"""MomentumSAM: SAM along a smoothed direction, the running average of the gradients at w, with norm exactly rho."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_core._checks import check_share
from sam_core.ascent import Move, find_moves
from sam_core.optimizers.averaged import AveragedAscent


class MomentumSAM(AveragedAscent):
    """SAM with a momentum of the ascent direction: e = rho m / ||m||,  m <- beta m + (1 - beta) g, the first m is g.

    The average follows the full gradient more closely than one batch does. Unlike :class:`MSAM` this takes two passes
    and has a momentum of its own. ||e|| is rho; scaling m by rho / ||g||, as often written, makes it shorter than that.

    Args:
        params: parameters, named parameters or parameter groups; a group may set the options below of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, parameter units, >= 0. 0 is the base optimizer; the average then rests.
        perturbation_momentum: beta, in [0, 1); 0 is SAM.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = MomentumSAM([w], torch.optim.SGD, rho=1.0, perturbation_momentum=0.5, lr=0.1)
        >>> for g in ([6.0, 0.0], [0.0, 8.0]):  # m = (6, 0), then (3, 4)
        ...     w.grad = torch.tensor(g)
        ...     optimizer.first_step()
        ...     print(w.data)
        ...     optimizer.restore()
        tensor([1., 0.])
        tensor([0.6000, 0.8000])
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        perturbation_momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        options = {"rho": rho, "perturbation_momentum": perturbation_momentum}
        super().__init__(params, base_optimizer, options, **kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_share("perturbation_momentum", group["perturbation_momentum"])

    def _ascend(self, params: list[list[Tensor]], grads: list[list[Tensor]], norm: Tensor) -> list[Move]:
        groups = zip(self.param_groups, params, grads, strict=True)
        averages = [self._average(ps, gs, group["perturbation_momentum"]) for group, ps, gs in groups]
        rules = [self._rule(group) for group in self.param_groups]
        return find_moves(rules, averages, params, foreach=self.foreach, wait=self._waits)
