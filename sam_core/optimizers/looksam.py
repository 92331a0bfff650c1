"""LookSAM: a SAM step every k steps, its flat component g_v reused in between (Liu et al. 2022, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core import _tensors
from sam_core._checks import check_count, check_nonnegative
from sam_core._tracing import untraced
from sam_core.optimizers.two_pass import TwoPassOptimizer


class LookSAM(TwoPassOptimizer):
    """Look-SAM: 1 + 1/k passes a step instead of 2.

    Every k-th step is SAM's, with gradient g_s at w + rho g / ||g||, and remembers what SAM adds to g. The steps in
    between take one pass and add it again (Liu et al. 2022, Algorithm 1; norms and products run over all parameters):

        g_v = g_s - (<g_s, g> / ||g||^2) g,  orthogonal to g;      then  g + alpha (||g|| / ||g_v||) g_v

    A SAM step that is skipped is tried again. Parameters without a g_v step with g, and all do where g_v is but
    rounding, as with a single weight. Do not take the first pass under ``no_sync``: g_v must be the same on all ranks.
    In the two-step form, where :meth:`should_apply_sam` says no, ``step()`` with the gradients in ``.grad`` spares the
    second pass.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho and alpha of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, parameter units, >= 0. 0 is the base optimizer.
        k: steps from one SAM step to the next, >= 1. 1 is SAM.
        alpha: length of what is added, relative to g, >= 0; 0.7 was tuned for vision transformers with rho = 1.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer, passes = LookSAM([w], torch.optim.SGD, k=3, lr=0.1), []
        >>> def closure():
        ...     passes.append(optimizer.should_apply_sam())
        ...     loss = (w**4).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(4):
        ...     loss = optimizer.step(closure)
        >>> passes
        [True, True, False, False, True, True]
    """

    _keeps_ascent_grads = True

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.3,
        **kwargs: Any,
    ) -> None:
        check_count("k", k, at_least=1)
        self.k = k
        super().__init__(params, base_optimizer, {"rho": rho, "alpha": alpha}, **kwargs)
        self._counters["num_steps"] = 0

    def should_apply_sam(self) -> bool:
        """Whether the coming step is one of SAM's: each k-th one, counted from the first."""
        return self._counters["num_steps"] % self.k == 0

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("alpha", group["alpha"])

    def _unknown(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"flat_grad": torch.zeros_like(param)}

    def second_pass_is_due(self) -> bool:
        return self.should_apply_sam() and super().second_pass_is_due()

    @untraced  # torch.compile loses what is written on an optimizer
    def _update(self, norm: Tensor) -> None:
        if self._ascent_grads:
            self._remember(norm)
            self._step_base(norm)
        elif norm == 0:  # torch.distributed.checkpoint's initialisation: see OptimizerWrapper
            self._step_base(norm)
            return
        else:
            self._reuse(norm)
            self._step_base()
        self._counters["num_steps"] += 1
        if self.should_apply_sam():
            self._method_state = {}  # the coming step makes g_v anew

    def _remember(self, norm: Tensor) -> None:
        """Turn the gradients at w into g_v, in their own memory; nothing where it is but rounding of g_s."""
        pairs = self._pairs()
        first = [g for pair in pairs for g in pair.ascent_grads]
        second = [g for pair in pairs for g in pair.descent_grads]
        length = _tensors.dot(first, first)
        share = _tensors.dot(second, first) / length if length > 0 else 0.0
        _tensors.scale_(first, -share, foreach=self.foreach)
        _tensors.add_(first, second, foreach=self.foreach)
        # Where g_s is a multiple of g, as with a single weight, noise would be added at the full length alpha ||g||.
        dtypes = {g.dtype for g in first}
        stored = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        summed = max((torch.finfo(torch.promote_types(dtype, torch.float32)).eps for dtype in dtypes), default=0.0)
        known = float(_tensors.norm(first, foreach=self.foreach)) > max(stored, 32 * summed) * float(norm)
        flat = zip((p for pair in pairs for p in pair.params), first, strict=True)
        self._method_state = {p: {"flat_grad": g} for p, g in flat} if known else {}

    def _reuse(self, norm: Tensor) -> None:
        """Add alpha (||g|| / ||g_v||) g_v to the gradients in ``.grad``; nothing where rho = 0."""
        known = [[p for p in g["params"] if p.grad is not None and p in self._method_state] for g in self.param_groups]
        flat = [[self._method_state[p]["flat_grad"] for p in params] for params in known]
        length = float(_tensors.norm([g for grads in flat for g in grads], foreach=self.foreach))
        for group, params, grads in zip(self.param_groups, known, flat, strict=True):
            if length > 0 and group["rho"] > 0:
                factor = group["alpha"] * float(norm) / length
                _tensors.add_([p.grad for p in params], grads, alpha=factor, foreach=self.foreach)
