"""SAM: step with the gradient at the worst neighbour, w + rho g / ||g|| (Foret et al. 2021, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core._checks import check_in
from sam_core.ascent import AdaptiveAscent, L2Ascent
from sam_core.optimizers.two_pass import TwoPassOptimizer


class SAM(TwoPassOptimizer):
    """Sharpness-Aware Minimization over any torch optimizer.

    Each step takes the gradient g at w, moves to w + e, takes the gradient there, moves back and lets the base
    optimizer step with the second one:  e = rho g / ||g||,  or e = rho T^2 g / ||T g|| with T = |w| + eta if adaptive.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho, adaptive and eta of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, >= 0; in parameter units, relative if adaptive. 0 is the base optimizer.
        adaptive: measure the neighbourhood relative to the weights (Kwon et al. 2021).
        eta: added to |w| if adaptive, in parameter units, >= 0.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3)
        >>> def closure():
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    local_ascent = True

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "adaptive": adaptive, "eta": eta}, **kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_in("adaptive", group["adaptive"], (True, False))
        AdaptiveAscent(rho=group["rho"], eta=group["eta"])

    def _rule(self, group: dict[str, Any]) -> L2Ascent:
        plain = super()._rule(group)
        return AdaptiveAscent(rho=plain.rho, maximize=plain.maximize, eta=group["eta"]) if group["adaptive"] else plain

    @torch.no_grad()
    def step_m_sharpness(self, closures: Sequence[Callable[[], Tensor]]) -> Tensor:
        """One step of m-sharpness: each micro-batch has its own worst neighbour (Foret et al. 2021, section 4.1).

            base step with  sum_i grad L_i(w + e_i),    e_i the perturbation by grad L_i(w)

        Args:
            closures: one a micro-batch: computes L_i, its share of the loss, calls backward and returns it.

        Returns:
            Sum of the losses at w.

        Raises:
            ValueError: for no closures.
            RuntimeError: if a closure leaves no gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.

        Example:
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = SAM([w], torch.optim.SGD, lr=0.1)
            >>> def make(target):
            ...     def closure():
            ...         loss = (w - target).square().sum() / 2
            ...         loss.backward()
            ...         return loss
            ...     return closure
            >>> optimizer.step_m_sharpness([make(1.0), make(2.0)])
            tensor(5.)
        """
        if not closures:
            raise ValueError("closures must hold at least one micro-batch, got none.")
        losses, skip, total = [], False, dict[Tensor, Tensor]()
        for closure in closures:
            losses.append(self._evaluate(closure).detach())
            self.first_step()
            skip |= self._begun is not None and self._begun.skip
            try:
                self._evaluate(closure)
            finally:
                self.restore()
            for param in self._params_with_grad():
                total[param] = total[param].add_(param.grad) if param in total else param.grad.clone()
        for param, grad in total.items():
            param.grad = grad
        self._descend("w + perturbation", None, skip=skip)
        return torch.stack(losses).sum()
