"""The two-pass protocol: gradients at w, move to a perturbed point, gradients there, back to w exactly, base step.

A method defines :meth:`TwoPassOptimizer._compute_perturbation` and, per parameter group, its options; the protocol does
everything that goes wrong around them: restoring, saving, non-finite gradients, loss scaling, clipping, schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from sam_core import _tensors
from sam_core._checks import check_in, check_positive
from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.weights import perturb, restore


class _Perturbed(NamedTuple):
    """What first_step leaves for second_step: the parameters it moved, their clean values, whether to skip the step."""

    params: list[Tensor]
    backup: list[Tensor]
    skip: bool


class TwoPassOptimizer(OptimizerWrapper):
    """Base of the methods that take a gradient at w and one at a perturbed point before they step.

    Args:
        params: parameters, named parameters or parameter groups; a group may hold the method's options (``rho``).
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        method_defaults: the method's own options, for groups that do not set them; ``rho`` is one.
        nonfinite: on a gradient with NaN or infinity, "raise" FloatingPointError with the parameter's name, or "skip"
            the step and count it in ``num_skipped``. Weights and moments stay as they were in both cases. With an
            enabled ``grad_scaler`` such steps are always skipped: its search for a scale produces them.
        max_grad_norm: largest global norm of the gradients that the base optimizer steps with, > 0; None: no limit.
            The perturbation does not depend on it.
        foreach: fuse operations over tensors; None: where possible. The base optimizer gets it too, if it takes it.
        **kwargs: arguments of ``base_optimizer``, e.g. ``lr``.

    Raises:
        ValueError: for a bad option.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        method_defaults: dict[str, Any],
        *,
        nonfinite: str = "raise",
        max_grad_norm: float | None = None,
        foreach: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_in("nonfinite", nonfinite, ("raise", "skip"))
        check_in("foreach", foreach, (None, True, False))
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        super().__init__(params, base_optimizer, method_defaults, foreach=foreach, **kwargs)
        self.nonfinite = nonfinite
        self.max_grad_norm = max_grad_norm
        self._counters["num_skipped"] = 0
        self._perturbed: _Perturbed | None = None

    # What a method defines --------------------------------------------------------------------------------------------

    def _compute_perturbation(
        self, groups: list[dict[str, Any]], params: list[list[Tensor]], grads: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """The move from w to where the second gradient is taken: for each group, one tensor a parameter."""
        raise NotImplementedError

    # The protocol -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        """Move the weights to w + perturbation, from the gradients at w in ``.grad``.

        Args:
            zero_grad: clear the gradients afterwards, ready for the second backward.
            grad_scaler: the scaler whose ``scale(loss)`` was differentiated; the gradients are unscaled here.

        Raises:
            RuntimeError: if no parameter has a gradient, or the weights are perturbed already.
            ValueError: for a sparse gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        if self._perturbed is not None:
            raise RuntimeError("first_step was called twice; call second_step, or restore() to give the step up.")
        if self._take_gradients("w", self, grad_scaler) is None:
            self._perturbed = _Perturbed([], [], skip=True)
        else:
            params = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
            grads = [[p.grad for p in group] for group in params]
            perturbation = self._compute_perturbation(self.param_groups, params, grads)
            moved = [p for group in params for p in group]
            backup = perturb(moved, [e for group in perturbation for e in group], foreach=self.foreach)
            self._perturbed = _Perturbed(moved, backup, skip=False)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, *, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        """Put the weights back to w exactly and step the base optimizer with the gradients in ``.grad``.

        Args:
            zero_grad: clear the gradients afterwards.
            grad_scaler: as for :meth:`first_step`; call its ``update()`` afterwards.

        Raises:
            RuntimeError: if no parameter has a gradient, or first_step was not called.
            ValueError: for a sparse gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        if self._perturbed is None:
            raise RuntimeError("second_step needs a first_step before it.")
        skip = self._perturbed.skip
        self.restore()
        self._descend("w + perturbation", grad_scaler, skip=skip)
        if zero_grad:
            self.zero_grad()

    def restore(self) -> None:
        """Give up a step begun by first_step: put the weights back to w exactly. Does nothing between steps."""
        if self._perturbed is not None:
            restore(self._perturbed.params, self._perturbed.backup, foreach=self.foreach)
            self._perturbed = None

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads_ready: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_context: Callable[[], AbstractContextManager[Any]] | AbstractContextManager[Any] | None = None,
    ) -> Any:
        """One whole step: both passes, back to w, base step.

        With rho = 0 in every group both passes are the same, and the closure runs once.

        Args:
            closure: computes the loss, calls backward on it (on ``grad_scaler.scale(loss)``) and returns it, or
                anything else. Gradients are cleared before each call. None is allowed where the perturbation is zero:
                the gradients in ``.grad`` are all zero, or rho = 0.
            grads_ready: the gradients at w are in ``.grad`` already; the closure runs once, at w + perturbation.
            grad_scaler: unscales the gradients of each pass; call its ``update()`` afterwards, not its ``step``.
            ascent_context: context of the first pass, e.g. ``ddp_model.no_sync``.

        Returns:
            What the closure returned at w; with ``grads_ready`` at w + perturbation. None without a closure.

        Raises:
            ValueError: if a closure is needed and there is none, or for a sparse gradient.
            RuntimeError: if the closure leaves no gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> optimizer = SAM([w], torch.optim.SGD, lr=0.1)
            >>> def closure():
            ...     loss = (w**2).sum()
            ...     loss.backward()
            ...     return loss
            >>> optimizer.step(closure).item()
            2.0
        """
        if grads_ready and ascent_context is not None:
            raise ValueError("ascent_context must be None with grads_ready=True: the first pass has been run already.")
        no_ascent = all(group["rho"] == 0 for group in self.param_groups)
        if closure is None:
            if not no_ascent and any(p.grad.any() for p in self._params_with_grad()):
                raise ValueError(
                    "closure must be given, got None: the second pass needs it. Or use first_step and second_step."
                )
            return self._descend("w", grad_scaler)

        loss = None
        if no_ascent and not grads_ready:
            loss = self._evaluate(closure)  # outside ascent_context: the base optimizer steps with these gradients
            self._descend("w", grad_scaler)
            return loss
        if not grads_ready:
            loss = self._evaluate(closure, ascent_context)
        self.first_step(grad_scaler=grad_scaler)
        try:
            second_loss = self._evaluate(closure)
        except BaseException:
            self.restore()
            raise
        self.second_step(grad_scaler=grad_scaler)
        return second_loss if grads_ready else loss

    @property
    def num_skipped(self) -> int:
        """Steps skipped because of a non-finite gradient."""
        return self._counters["num_skipped"]

    def _evaluate(self, closure: Callable[[], Any], context: Any = None) -> Any:
        """Call the closure on cleared gradients, within a context given as such or as a function that makes it."""
        self.zero_grad()
        if not hasattr(context, "__enter__"):
            context = nullcontext() if context is None else context()
        with context, torch.enable_grad():
            return closure()

    def _descend(self, where: str, grad_scaler: torch.amp.GradScaler | None, *, skip: bool = False) -> None:
        """Clip and step with the gradients in ``.grad``, unless they or the first pass's are not finite."""
        # A scaler refuses to unscale twice for one optimizer between updates; the two passes come as two optimizers,
        # and its update() hears of an overflow in either.
        norm = self._take_gradients(where, self.base_optimizer, grad_scaler)
        # Schedulers look for this mark of theirs; a skipped step, or the two-step form, would make them warn.
        for optimizer in (self, self.base_optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]
        if skip or norm is None:
            self._counters["num_skipped"] += 1
            return
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(self._params_with_grad(), self.max_grad_norm, norm, foreach=self.foreach)
        self.base_optimizer.step()

    def _take_gradients(self, where: str, owner: Optimizer, grad_scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """Unscale the gradients and check them: their global norm, or None if the step is to be skipped."""
        params = self._params_with_grad()
        if not params:
            raise RuntimeError(f"no parameter has a gradient at {where}: call backward on the loss before the step.")
        for param in params:
            if param.grad.layout != torch.strided:
                raise ValueError(
                    f"gradients must be dense, got a {param.grad.layout} gradient for {self._describe(param)}; "
                    "build the layer with sparse=False."
                )
        if grad_scaler is not None:
            grad_scaler.unscale_(owner)
        # One bad entry makes the norm bad: one number to wait for, not one a parameter.
        norm = _tensors.norm([p.grad for p in params], foreach=self.foreach)
        if math.isfinite(norm):
            return norm
        scaling = grad_scaler is not None and grad_scaler.is_enabled()
        if self.nonfinite == "raise" and not scaling:
            bad = next((p for p in params if not p.grad.isfinite().all()), params[0])
            raise FloatingPointError(f"the gradient of {self._describe(bad)} is not finite at {where}.")
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual; and forget a step begun, for its weights must not come back over loaded ones."""
        super().load_state_dict(state_dict)
        self._perturbed = None
