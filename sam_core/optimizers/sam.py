"""SAM: step with the gradient at the worst neighbour, w + rho g / ||g|| (Foret et al. 2021, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core import _tensors
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
    def step_m_sharpness(
        self,
        closures: Sequence[Callable[[], Tensor]],
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Tensor:
        """One step of m-sharpness: each micro-batch has its own worst neighbour (Foret et al. 2021, section 4.1).

            base step with  sum_i grad L_i(w + e_i),    e_i the perturbation by grad L_i(w)

        Args:
            closures: one a micro-batch: computes L_i, its share of the loss, calls backward (on
                ``grad_scaler.scale(L_i)``) and returns L_i.
            grad_scaler: unscales the gradients of each pass; call its ``update()`` afterwards, not its ``step``.
            no_sync: context of every backward but the last, e.g. ``ddp_model.no_sync``: each micro-batch of each rank
                then has its own e_i, and the sums are averaged over ranks once.

        Returns:
            Sum of the losses at w.

        Raises:
            ValueError: for no closures.
            RuntimeError: if a closure leaves no gradient, or after :meth:`first_step`.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``; with ``no_sync`` on all ranks.

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
        if self.in_second_pass:
            raise RuntimeError("step_m_sharpness must not follow first_step; call second_step, or restore().")
        due, losses, total = self.second_pass_is_due(), list[Tensor](), dict[Tensor, Tensor]()
        try:
            for number, closure in enumerate(closures, start=1):
                if due:
                    losses.append(self._evaluate(closure, no_sync))
                    # A bad gradient at w ends the search; the other closures run, so that all ranks hear of it.
                    if self._begun is None:
                        self._begin(grad_scaler, local=no_sync is not None)
                self.zero_grad()
                for param, grad in total.items():
                    param.grad = grad  # the backward adds to it
                with nullcontext() if no_sync is None or number == len(closures) else no_sync(), torch.enable_grad():
                    loss = closure()
                if not due:
                    losses.append(loss)
                total = {param: param.grad for param in self._params_with_grad()}
                if number < len(closures):
                    # Copies: DDP's gradient_as_bucket_view writes the next gradient into the memory of this one.
                    total = dict(zip(total, _tensors.clone(list(total.values()), foreach=self.foreach), strict=True))
                if self._begun is not None and not self._begun.skip and number < len(closures):
                    self.restore()
        except BaseException:
            self.restore()
            raise
        if due:
            self.second_step(grad_scaler=grad_scaler)
        else:
            self._descend("w", grad_scaler)
        return torch.stack([loss.detach() for loss in losses]).sum()
