"""One step of the base optimizer that is safe to take: gradients checked, unscaled and clipped before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core import _tensors
from sam_core._checks import check_in, check_positive
from sam_core._dtensors import is_dtensor
from sam_core._gathered import check_sharded, forget_gathered, refuse_flattened
from sam_core.optimizers.wrapper import OptimizerWrapper


class GuardedOptimizer(OptimizerWrapper):
    """Base of all methods: what to do about bad gradients, loss scaling and clipping.

    Args:
        params: parameters, named parameters or parameter groups; a group may hold the method's options (``rho``), and
            ``perturb``: with False it stays where it is, and the perturbation's norm does not run over it. (With
            rho = 0 it stays as well, but counts in the norm, so that the others move less.)
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        method_defaults: the method's own options, for groups that do not set them; ``rho`` is one.
        nonfinite: on a gradient with NaN or infinity, "raise" FloatingPointError with the parameter's name, or "skip"
            the step and count it in ``num_skipped``. Weights and moments stay as they were in both cases. With an
            enabled ``grad_scaler`` such steps are always skipped: its search for a scale produces them. "ignore" looks
            at no value and steps with it, so that the host need not wait for the device and a whole step fits into a
            CUDA graph or a compiled one; :class:`LookSAM`, :class:`GSAM`, :class:`EfficientSAM` and :class:`MSAM` look
            at values of their own.
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
        check_in("nonfinite", nonfinite, ("raise", "skip", "ignore"))
        check_in("foreach", foreach, (None, True, False))
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        super().__init__(params, base_optimizer, {**method_defaults, "perturb": True}, foreach=foreach, **kwargs)
        self.nonfinite = nonfinite
        self.max_grad_norm = max_grad_norm
        self._counters["num_skipped"] = 0

    @property
    def _waits(self) -> bool:
        """Whether values may be looked at, for which the host waits until the device has them."""
        return self.nonfinite != "ignore"

    @property
    def num_skipped(self) -> int:
        """Steps skipped because of a non-finite gradient."""
        return self._counters["num_skipped"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As usual.

        Raises:
            ValueError: for a bad option.
        """
        check_in("perturb", param_group.get("perturb", True), (True, False))
        super().add_param_group(param_group)
        check_sharded(self.param_groups[-1]["params"])

    def _update(self, norm: Tensor) -> None:
        """The descent rule: step with the gradients in ``.grad``, which are unscaled, finite and of this global norm.

        A method that steps with other gradients puts them there.
        """
        self._step_base(norm)

    def _evaluate(self, closure: Callable[..., Any], context: Any = None) -> Any:
        """Call the closure on cleared gradients, within a context given as such or as a function that makes it."""
        if context is not None and any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "ascent_context must be None for DTensors: each rank holds a part of one gradient, summed over all of "
                f"them; got {context!r}."
            )
        self.zero_grad()
        if isinstance(context, type) or not hasattr(context, "__enter__"):
            context = nullcontext() if context is None else context()
        with context, torch.enable_grad():
            return closure()

    def _descend(self, where: str, grad_scaler: torch.amp.GradScaler | None, *, skip: bool = False) -> None:
        """Step with the gradients in ``.grad``, unless they or the first pass's are not finite."""
        self._check_gradients(where)
        if grad_scaler is not None:
            grad_scaler.unscale_(self)
        norm = self._finite_norm(where, grad_scaler)
        # Schedulers look for this mark of theirs; a skipped step, or the two-step form, would make them warn.
        for optimizer in (self, self.base_optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]
        if skip or norm is None:
            self._counters["num_skipped"] += 1
        else:
            self._update(norm)

    def _is_initialisation(self) -> bool:
        """Whether the gradients in ``.grad`` are those of torch.distributed.checkpoint: see OptimizerWrapper."""
        if self.state or any(group.get("lr", 0) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for p in self._params_with_grad()]
        return bool(grads) and float(_tensors.norm(grads, foreach=self.foreach)) == 0

    def _step_base(self, norm: Tensor | None = None) -> None:
        """Clip the gradients in ``.grad``, whose global norm may be given, and step the base optimizer."""
        self._clip(norm)
        self.base_optimizer.step()
        forget_gathered([p for group in self.param_groups for p in group["params"]])
        torch.clear_autocast_cache()  # of weights cast before the step

    def _clip(self, norm: Tensor | None = None) -> None:
        if self.max_grad_norm is not None:
            params = self._params_with_grad()
            if norm is None:
                norm = _tensors.norm([p.grad for p in params], foreach=self.foreach, wait=self._waits)
            # As torch.nn.utils.clip_grads_with_norm_, which refuses DTensors beside plain tensors.
            factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            _tensors.scale_([p.grad for p in params], factor, foreach=self.foreach)

    def _check_gradients(self, where: str) -> None:
        """Refuse a step without gradients, gradients that are not dense, and those of FSDP1's parts of weights."""
        params = self._params_with_grad()
        if not params:
            raise RuntimeError(f"no parameter has a gradient at {where}: call backward on the loss before the step.")
        refuse_flattened(params)
        for param in params:
            if param.grad.layout != torch.strided:
                raise ValueError(
                    f"gradients must be dense, got a {param.grad.layout} gradient for {self._describe(param)}; "
                    "build the layer with sparse=False."
                )

    def _finite_norm(self, where: str, grad_scaler: torch.amp.GradScaler | None) -> Tensor | None:
        """Global norm of the gradients in ``.grad``; None if they are not finite and the step is to be skipped."""
        params = self._params_with_grad()
        scaling = grad_scaler is not None and grad_scaler.is_enabled()
        wait = self._waits or scaling
        # One bad entry makes the norm bad: one number to wait for, not one a parameter.
        norm = _tensors.norm([p.grad for p in params], foreach=self.foreach, wait=wait)
        if not wait or math.isfinite(norm):
            return norm
        if self.nonfinite == "raise" and not scaling:
            bad = next((f"gradient of {self._describe(p)}" for p in params if not p.grad.isfinite().all()), None)
            raise FloatingPointError(f"the {bad or 'global norm of the gradients'} is not finite at {where}.")
        return None
