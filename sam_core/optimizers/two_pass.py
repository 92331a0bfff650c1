"""The two-pass protocol: gradients at w, move to a perturbed point, gradients there, back to w exactly, base step.

A method is its ascent rule (:meth:`TwoPassOptimizer._rule` or :meth:`TwoPassOptimizer._ascend`), its descent rule
(:meth:`GuardedOptimizer._update`), its schedule (:meth:`TwoPassOptimizer.second_pass_is_due`) and its options. The
protocol does everything that goes wrong around them: restoring, saving, non-finite gradients, loss scaling, clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sam_core import _tensors
from sam_core.ascent import L2Ascent, Move, find_moves
from sam_core.optimizers.guarded import GuardedOptimizer
from sam_core.weights import perturb, restore


class _Begun(NamedTuple):
    """What first_step leaves for second_step."""

    params: list[Tensor]  # those it moved
    backup: list[Tensor]  # their clean values
    skip: bool  # the gradients at w are not finite
    hooks: list[RemovableHandle]  # that make the second gradient NaN as well: see _spoil
    error: FloatingPointError | None  # to be raised by second_step, when the other ranks have heard of it


class _Memory:
    """What lasts from first_step to second_step, apart from the optimizer: see _tracing."""

    def __init__(self) -> None:
        self.begun: _Begun | None = None
        self.ascent_grads: dict[Tensor, Tensor] = {}


class Pair(NamedTuple):
    """Parameters of one group that have a gradient in both passes."""

    params: list[Tensor]
    ascent_grads: list[Tensor]  # at w
    descent_grads: list[Tensor]  # at w + perturbation: those in .grad


class TwoPassOptimizer(GuardedOptimizer):
    """Base of the methods that take a gradient at w and one at a perturbed point before they step.

    Arguments and errors are those of :class:`GuardedOptimizer`.

    Example:
        >>> class Uphill(TwoPassOptimizer):  # a method of one's own: e = rho g
        ...     def _ascend(self, params, grads, norm):
        ...         return [Move(ps, gs, group["rho"]) for group, ps, gs in zip(self.param_groups, params, grads)]
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Uphill([w], torch.optim.SGD, {"rho": 0.5}, lr=0.25)
        >>> def closure():
        ...     loss = (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)  # g = 2, g_s = 2 (1 + 0.5 * 2) = 4
        >>> w.data
        tensor([0., 0.])
    """

    #: The gradient at w only chooses where to look next, so each rank and each micro-batch may choose for itself.
    local_ascent: ClassVar[bool] = False
    #: The descent rule needs the gradients at w: they are kept, by parameter, in ``_ascent_grads``.
    _keeps_ascent_grads: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._memory = _Memory()

    @property
    def _begun(self) -> _Begun | None:
        return self._memory.begun

    @_begun.setter
    def _begun(self, begun: _Begun | None) -> None:
        self._memory.begun = begun

    @property
    def _ascent_grads(self) -> dict[Tensor, Tensor]:
        return self._memory.ascent_grads

    @_ascent_grads.setter
    def _ascent_grads(self, grads: dict[Tensor, Tensor]) -> None:
        self._memory.ascent_grads = grads

    # What a method defines --------------------------------------------------------------------------------------------

    def _rule(self, group: dict[str, Any]) -> L2Ascent:
        """The neighbourhood that a parameter group asks for."""
        return L2Ascent(rho=group["rho"], maximize=bool(group.get("maximize", False)))

    def _ascend(self, params: list[list[Tensor]], grads: list[list[Tensor]], norm: Tensor) -> list[Move]:
        """The ascent rule: the move from w to where the second gradient is taken; here to the worst neighbour.

        Args:
            params: for each group its parameters that have a gradient.
            grads: their gradients at w, unscaled and finite. Not to be changed: they may be the user's.
            norm: global norm of the gradients.
        """
        rules = [self._rule(group) for group in self.param_groups]
        return find_moves(rules, grads, params, norm=norm, foreach=self.foreach, wait=self._waits)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._rule(group)

    def second_pass_is_due(self) -> bool:
        """The schedule: whether the coming step needs a gradient at a second point."""
        return self._has_radius()

    def _has_radius(self) -> bool:
        return any(group["rho"] != 0 and group["perturb"] for group in self.param_groups)

    # The protocol -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        """Move the weights to w + perturbation, from the gradients at w in ``.grad``.

        Where the method needs no second pass (rho = 0, or LookSAM between two of its own) the weights stay at w.

        Args:
            zero_grad: clear the gradients afterwards, ready for the second backward.
            grad_scaler: the scaler whose ``scale(loss)`` was differentiated; ``.grad`` stays scaled.

        Raises:
            RuntimeError: if no parameter has a gradient, or the weights are perturbed already.
            ValueError: for a sparse gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        self._begin(grad_scaler)
        if zero_grad:
            self.zero_grad()

    def _begin(self, grad_scaler: torch.amp.GradScaler | None, *, local: bool = False) -> None:
        """The first step; if its gradients are this rank's alone, an error waits until the others have heard of it."""
        if self._begun is not None:
            raise RuntimeError("first_step was called twice; call second_step, or restore() to give the step up.")
        self._check_gradients("w")
        norm, error = None, None
        try:
            norm = self._finite_norm("w", grad_scaler)
        except FloatingPointError as bad:
            if not local:
                raise
            error = bad
        self._begun = _Begun([], [], norm is None, self._spoil() if norm is None else [], error)
        try:
            if norm is None and grad_scaler is not None:
                grad_scaler.unscale_(self.base_optimizer)  # so that its update() hears of the overflow
            elif norm is not None and self.second_pass_is_due():
                self._perturb(self._begun, norm, grad_scaler)
        except BaseException:
            self.restore()
            raise

    def _perturb(self, begun: _Begun, norm: Tensor, grad_scaler: torch.amp.GradScaler | None) -> None:
        params = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        grads = [[p.grad for p in group] for group in params]
        if grad_scaler is not None and grad_scaler.is_enabled():
            # Not with unscale_: a scaler refuses to do that twice for one optimizer, and .grad is the user's.
            factor = 1 / grad_scaler.get_scale()
            grads, norm = [_tensors.scale(g, factor, foreach=self.foreach) for g in grads], norm * factor
        for move in self._ascend(*self._taking_part(params, grads, norm)):
            begun.backup.extend(perturb(move.params, move.directions, alpha=move.factor, foreach=self.foreach))
            begun.params.extend(move.params)
        if self._keeps_ascent_grads:
            pairs = ((p, g) for group in zip(params, grads, strict=True) for p, g in zip(*group, strict=True))
            self._ascent_grads = {p: g.clone() if g is p.grad else g for p, g in pairs}
        torch.clear_autocast_cache()  # of weights cast at w

    def _taking_part(
        self, params: list[list[Tensor]], grads: list[list[Tensor]], norm: Tensor
    ) -> tuple[list[list[Tensor]], list[list[Tensor]], Tensor]:
        """The same, groups with ``perturb=False`` emptied."""
        perturbed = [group["perturb"] for group in self.param_groups]
        if all(perturbed):
            return params, grads, norm
        params, grads = (
            [xs if take else [] for xs, take in zip(lists, perturbed, strict=True)] for lists in (params, grads)
        )
        return params, grads, _tensors.norm([*chain.from_iterable(grads)], foreach=self.foreach, wait=self._waits)

    def _spoil(self) -> list[RemovableHandle]:
        """Let the second gradient be NaN: where ranks sum it, this one's bad first gradient makes all of them skip."""
        params = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
        return [p.register_hook(_to_nan) for p in params]

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, *, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        """Put the weights back to w exactly and step the base optimizer with the gradients in ``.grad``.

        Args:
            zero_grad: clear the gradients afterwards.
            grad_scaler: as for :meth:`first_step`, ``.grad`` is unscaled here; call its ``update()`` afterwards.

        Raises:
            RuntimeError: if no parameter has a gradient, or first_step was not called.
            ValueError: for a sparse gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        if self._begun is None:
            raise RuntimeError("second_step needs a first_step before it.")
        skip, error, ascent_grads = self._begun.skip, self._begun.error, self._ascent_grads
        self.restore()
        if error is not None:
            raise error
        self._ascent_grads = ascent_grads
        try:
            self._descend("w + perturbation", grad_scaler, skip=skip)
        finally:
            self._ascent_grads = {}
        if zero_grad:
            self.zero_grad()

    def restore(self) -> None:
        """Give up a step begun by first_step: put the weights back to w exactly. Does nothing between steps."""
        if self._begun is not None:
            restore(self._begun.params, self._begun.backup, foreach=self.foreach)
            torch.clear_autocast_cache()  # of weights cast at w + perturbation
            self._forget()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *,
        grads_ready: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_context: Callable[[], AbstractContextManager[Any]] | AbstractContextManager[Any] | None = None,
    ) -> Any:
        """One whole step: both passes, back to w, base step.

        Where no second pass is due (rho = 0 in every group, or LookSAM between two of its own) the closure runs once.
        With ``grads_ready`` it runs once as well, at w for rho = 0; between LookSAM's own steps not at all.

        Args:
            closure: computes the loss, calls backward on it (on ``grad_scaler.scale(loss)``) and returns it, or
                anything else. Gradients are cleared before each call. None after :meth:`first_step` is
                :meth:`second_step`, but for the initialisation described at :class:`OptimizerWrapper`, which leaves
                the step begun; else it is allowed where the perturbation is zero: the gradients in ``.grad`` are
                all zero, or no second pass is due.
            grads_ready: the gradients at w are in ``.grad`` already; the closure runs once, at w + perturbation.
            grad_scaler: unscales the gradients of each pass; call its ``update()`` afterwards, not its ``step``.
            ascent_context: context of the first pass, e.g. ``ddp_model.no_sync``: each rank then looks for the worst
                neighbour of its own batch. Entered by methods with ``local_ascent`` alone: the others step with that
                gradient or remember it, so it must be the same on all ranks. A rank whose first gradient is not
                finite makes the second one NaN, so that all ranks skip, or raise. None for DTensors (FSDP2): a rank
                holds a part of the sum of all gradients, there is none of its own.

        Returns:
            What the closure returned at w; with ``grads_ready`` at w + perturbation. None if it did not run.

        Raises:
            ValueError: if a closure is needed and there is none, for an ascent_context with DTensors, or for a sparse
                gradient.
            RuntimeError: if the closure leaves no gradient, or one is given after first_step.
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
        if self._begun is not None:
            if closure is not None:
                raise RuntimeError("step after first_step takes no closure: its second pass has been run already.")
            if self._is_initialisation():
                return self._step_base()  # the step begun goes on, or a load forgets it
            return self.second_step(grad_scaler=grad_scaler)
        due = self.second_pass_is_due()
        if closure is None:
            if due and _tensors.norm([p.grad for p in self._params_with_grad()], foreach=self.foreach) != 0:
                raise ValueError(
                    "closure must be given, got None: the second pass needs it. Or use first_step and second_step."
                )
            return self._descend("w", grad_scaler)

        loss = None
        if not grads_ready:
            loss = self._evaluate(closure, ascent_context if self._ascends_locally(ascent_context) else None)
        if not due and (self._has_radius() or not grads_ready):
            self._descend("w", grad_scaler)
            return loss
        self._begin(grad_scaler, local=self._ascends_locally(ascent_context))
        try:
            second_loss = self._evaluate(closure)
        except BaseException:
            self.restore()
            raise
        self.second_step(grad_scaler=grad_scaler)
        return second_loss if grads_ready else loss

    def _ascends_locally(self, ascent_context: Any) -> bool:
        # A gradient that is stepped with, or kept, is taken outside the context: it must be synchronised.
        return ascent_context is not None and self.local_ascent and self.second_pass_is_due()

    @property
    def in_second_pass(self) -> bool:
        """Whether a step is begun: a closure called now runs at w + perturbation, and BatchNorm must not count it."""
        return self._begun is not None

    def _pairs(self) -> list[Pair]:
        """For each group the gradients at w and those in ``.grad``, of the parameters that have both."""
        both = [[p for p in g["params"] if p.grad is not None and p in self._ascent_grads] for g in self.param_groups]
        return [Pair(ps, [self._ascent_grads[p] for p in ps], [p.grad for p in ps]) for ps in both]

    def _forget(self) -> None:
        for hook in self._begun.hooks if self._begun is not None else ():
            hook.remove()
        self._begun = None
        self._ascent_grads = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual; and forget a step begun, for its weights must not come back over loaded ones."""
        super().load_state_dict(state_dict)
        self._forget()


def _to_nan(grad: Tensor) -> Tensor:  # not a lambda: an optimizer is copied and pickled at any time
    return grad * math.nan
