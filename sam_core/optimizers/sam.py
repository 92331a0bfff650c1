"""SAM: step with the gradient at the worst neighbour, w + rho g / ||g|| (Foret et al. 2021, Algorithm 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_core._checks import check_in
from sam_core.ascent import AdaptiveAscent, L2Ascent, compute_perturbation
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
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`TwoPassOptimizer`; the others go to
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

    def _compute_perturbation(
        self, groups: list[dict[str, Any]], params: list[list[Tensor]], grads: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        return compute_perturbation([_rule(group) for group in groups], grads, params, foreach=self.foreach)


def _rule(group: dict[str, Any]) -> L2Ascent:
    """The ascent rule that a parameter group asks for."""
    maximize = bool(group.get("maximize", False))
    if group["adaptive"]:
        return AdaptiveAscent(rho=group["rho"], eta=group["eta"], maximize=maximize)
    return L2Ascent(rho=group["rho"], maximize=maximize)
