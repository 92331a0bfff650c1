"""ASAM: SAM in a neighbourhood that scales with the weights, T = |w| + eta (Kwon et al. 2021, Algorithm 1)."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from sam_core.optimizers.sam import SAM


class ASAM(SAM):
    """Adaptive Sharpness-Aware Minimization: e = rho T^2 g / ||T g||.

    T scales every parameter. The authors' code leaves biases at T = 1; put them into a group of their own with
    ``{"params": biases, "adaptive": False}`` for that.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho, adaptive and eta of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius relative to the weights, >= 0; about ten times SAM's or more. 0 is the base optimizer.
        eta: added to |w| so that zero weights move too, in parameter units, >= 0; the paper uses 0.01.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`TwoPassOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.
    """

    def __init__(
        self, params: Any, base_optimizer: type[Optimizer], rho: float = 2.0, eta: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, adaptive=True, eta=eta, **kwargs)
