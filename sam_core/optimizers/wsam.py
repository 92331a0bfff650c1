"""WSAM: sharpness as a regulariser with a weight of its own, gamma / (1 - gamma) (Yue et al. 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_core import _tensors
from sam_core._checks import check_in, check_share
from sam_core.optimizers.two_pass import TwoPassOptimizer


class WSAM(TwoPassOptimizer):
    """Weighted SAM: minimise L(w) + gamma / (1 - gamma) (L(w + e) - L(w)), e as in SAM.

    With a = gamma / (1 - gamma), g the gradient at w and g_s the one at w + e (Yue et al. 2023, Algorithms 1 and 2):

        coupled:    base optimizer steps with a g_s + (1 - a) g
        decoupled:  base optimizer steps with g; then w <- w - lr a (g_s - g), so that momentum and preconditioner see
                    the loss alone

    gamma = 1/2 and coupled is SAM, gamma = 0 the base optimizer. Parameters without a gradient in both passes step with
    the second one. Do not take the first pass under ``no_sync``.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho and gamma of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, parameter units, >= 0. 0 is the base optimizer.
        gamma: share of the sharpness, in [0, 1).
        decouple: keep the sharpness out of the base optimizer.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``. ``max_grad_norm`` limits what the base optimizer steps with and, if decoupled, each of
            the two gradients, as in the authors' code.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = WSAM([w], torch.optim.SGD, rho=0.5, gamma=0.75, lr=0.1)
        >>> def closure():
        ...     loss = (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # g = 2, g_s = 3, a = 3: w - 0.1 * 2 - 0.1 * 3 * (3 - 2)
        >>> w.data
        tensor([0.5000])
    """

    _keeps_ascent_grads = True

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        **kwargs: Any,
    ) -> None:
        check_in("decouple", decouple, (True, False))
        self.decouple = decouple
        super().__init__(params, base_optimizer, {"rho": rho, "gamma": gamma}, **kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_share("gamma", group["gamma"])

    def _update(self, norm: Tensor) -> None:
        weights = [group["gamma"] / (1 - group["gamma"]) for group in self.param_groups]
        if self.decouple:
            self._step_decoupled(weights, norm)
            return
        for weight, pair in zip(weights, self._pairs(), strict=True):
            _tensors.lerp_(pair.descent_grads, pair.ascent_grads, 1 - weight, foreach=self.foreach)
        self._step_base()

    def _step_decoupled(self, weights: list[float], norm: Tensor) -> None:
        self._clip(norm)
        pairs = self._pairs()
        rises = [_tensors.clone(pair.descent_grads, foreach=self.foreach) for pair in pairs]
        for pair in pairs:
            _tensors.copy_(pair.descent_grads, pair.ascent_grads, foreach=self.foreach)
        self._step_base()
        for group, weight, pair, rise in zip(self.param_groups, weights, pairs, rises, strict=True):
            _tensors.add_(rise, pair.descent_grads, alpha=-1.0, foreach=self.foreach)  # g_s - g, both clipped
            downhill = 1.0 if group.get("maximize", False) else -1.0
            _tensors.add_(pair.params, rise, alpha=downhill * weight * group["lr"], foreach=self.foreach)
