"""GSAM: SAM that also lowers the surrogate gap L(w + e) - L(w) (Zhuang et al. 2022, Algorithm 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_core import _tensors
from sam_core._checks import check_nonnegative
from sam_core._tracing import untraced
from sam_core.ascent import L2Ascent
from sam_core.optimizers.two_pass import TwoPassOptimizer


class GSAM(TwoPassOptimizer):
    """Surrogate Gap Guided SAM: step with g_s - alpha g_perp, the radius tied to the learning rate.

    g is the gradient at w, g_s the one at w + rho_t g / ||g||, and

        g_perp = g - (<g, g_s> / ||g_s||^2) g_s          (Zhuang et al. 2022, Algorithm 1)
        rho_t = rho_min + (rho - rho_min) (lr - lr_min) / (lr_max - lr_min)

    To first order, -g_perp leaves the perturbed loss alone and lowers the gap between it and the loss. The fraction of
    rho_t is kept in [0, 1]; the authors' code lets it leave that range during warm-up. Products run over the parameters
    that have a gradient in both passes; others step with the second one. Do not take the first pass under ``no_sync``.

    Args:
        params: parameters, named parameters or parameter groups; a group may set the options below of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius at the largest learning rate, parameter units, >= 0. 0 is the base optimizer.
        alpha: weight of the orthogonal part, >= 0; the paper uses 0.01 to 0.6. 0 is SAM.
        rho_min: radius at the smallest learning rate, in [0, rho]; None: rho, whatever the learning rate.
        lr_max: the largest learning rate; None: the group's first one.
        lr_min: the smallest learning rate, in [0, lr_max]; None: 0. Equal to lr_max: the radius is rho.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = GSAM([w], torch.optim.SGD, rho=0.1, rho_min=0.02, lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
        >>> def closure():
        ...     loss = (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(3):
        ...     print(round(optimizer.radius(optimizer.param_groups[0]), 4))
        ...     loss = optimizer.step(closure)
        ...     scheduler.step()
        0.1
        0.06
        0.02
    """

    _keeps_ascent_grads = True

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        alpha: float = 0.4,
        rho_min: float | None = None,
        lr_max: float | None = None,
        lr_min: float | None = None,
        **kwargs: Any,
    ) -> None:
        options = {"rho": rho, "alpha": alpha, "rho_min": rho_min, "lr_max": lr_max, "lr_min": lr_min}
        super().__init__(params, base_optimizer, options, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As usual; the group's first learning rate is its largest if none is given."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["lr_max"] is None:
            group["lr_max"] = float(group.get("lr", 0.0))
        self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("rho", "alpha"):
            check_nonnegative(name, group[name])
        for name in ("lr_max", "lr_min"):
            if group[name] is not None:
                check_nonnegative(name, group[name])
        if group["rho_min"] is None:
            return
        check_nonnegative("rho_min", group["rho_min"])
        if group["rho_min"] > group["rho"]:
            raise ValueError(f"rho_min must be <= rho = {group['rho']!r}, got {group['rho_min']!r}.")
        lr_min = group["lr_min"] if group["lr_min"] is not None else 0.0
        if group["lr_max"] is not None and group["lr_max"] < lr_min:
            raise ValueError(f"lr_max must be >= lr_min = {lr_min!r}, got {group['lr_max']!r}.")

    def radius(self, group: dict[str, Any]) -> float:
        """rho_t of a parameter group at its present learning rate, in parameter units."""
        if group["rho_min"] is None:
            return float(group["rho"])
        if group["lr_max"] is None:  # added to the base optimizer, past add_param_group
            group["lr_max"] = float(group["lr"])
        lr_min = group["lr_min"] or 0.0
        span = group["lr_max"] - lr_min
        share = (float(group["lr"]) - lr_min) / span if span > 0 else 1.0
        return float(group["rho_min"] + (group["rho"] - group["rho_min"]) * min(max(share, 0.0), 1.0))

    def _rule(self, group: dict[str, Any]) -> L2Ascent:
        return replace(super()._rule(group), rho=self.radius(group))

    @untraced  # it looks at values: torch.compile would cut it into pieces
    def _update(self, norm: Tensor) -> None:
        pairs = self._pairs()
        second = [g for pair in pairs for g in pair.descent_grads]
        length = _tensors.dot(second, second)
        share = _tensors.dot([g for pair in pairs for g in pair.ascent_grads], second) / length if length > 0 else 0.0
        for group, pair in zip(self.param_groups, pairs, strict=True):
            # g_s - alpha (g - share g_s)
            _tensors.scale_(pair.descent_grads, 1 + group["alpha"] * share, foreach=self.foreach)
            _tensors.add_(pair.descent_grads, pair.ascent_grads, alpha=-group["alpha"], foreach=self.foreach)
        self._step_base()
