"""MSAM: look ahead along the momentum, for the price of the base optimizer alone (Becker et al. 2024, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core import _tensors
from sam_core._gathered import forget_gathered
from sam_core._tracing import untraced
from sam_core.ascent import L2Ascent, Move, find_moves
from sam_core.optimizers.guarded import GuardedOptimizer

_MOMENTA = ("momentum_buffer", "exp_avg")  # what torch's optimizers call it


class _MovedOut(NamedTuple):
    """A parameter at w - factor v."""

    weight: Tensor  # w
    factor: float
    version: int  # torch's count of writes to the parameter, ours the last: moving it out, or back


class MSAM(GuardedOptimizer):
    """Momentum-SAM: one pass a step, at w - rho v / ||v||, v the momentum of the base optimizer.

    Between steps the parameters *are* at w - rho v / ||v||, so that an ordinary training loop takes its gradient there;
    a step goes back to w exactly, steps there, and moves out along the new v. Weight decay is taken at w; the authors'
    code for SGD takes it at the perturbed point. Evaluate and save within :meth:`at_weights`.

    Weights written from outside with torch's own means, e.g. by ``model.load_state_dict``, are taken for clean ones.
    Torch does not count writes through ``.data``: outside the block they are lost, within it they stay.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho of its own.
        base_optimizer: class with a momentum, e.g. ``torch.optim.AdamW`` or ``torch.optim.SGD`` with ``momentum=0.9``.
        rho: distance from w, parameter units, >= 0; the authors use 0.3 to 3 with SGD and more with AdamW. 0 is the
            base optimizer.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option, or a base optimizer without momentum; in the first step, for one that keeps it
            where it cannot be found, as ZeroRedundancyOptimizer does.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = MSAM([w], torch.optim.SGD, rho=0.5, lr=0.25, momentum=0.9)
        >>> (w**2).sum().backward()
        >>> optimizer.step()  # to w = 1 - 0.25 * 2, and on along -v = -2
        >>> w.item()
        0.0
        >>> with optimizer.at_weights():
        ...     w.item()
        0.5
    """

    def __init__(self, params: Any, base_optimizer: type[Optimizer], rho: float = 0.3, **kwargs: Any) -> None:
        self._moved: dict[Tensor, _MovedOut] = {}
        self._inside = False  # of at_weights
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)

    def _check_group(self, group: dict[str, Any]) -> None:
        L2Ascent(rho=group["rho"])
        options = {**self.base_optimizer.defaults, **group}
        if (
            group["rho"] > 0
            and group.get("perturb", True)
            and not (options.get("momentum", 0) > 0 or options.get("betas", (0,))[0] > 0)
        ):
            raise ValueError("base_optimizer must have a momentum, e.g. SGD with momentum=0.9, got none.")

    @untraced  # torch.compile loses what is written on an optimizer
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads_ready: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_context: Any = None,
    ) -> Any:
        """One step.

        Args:
            closure: computes the loss, calls backward on it and returns it; gradients are cleared before. None: the
                gradients are in ``.grad``.
            grads_ready: the gradients are in ``.grad``; the closure does not run.
            grad_scaler: unscales the gradients; call its ``update()`` afterwards. ``grad_scaler.step(optimizer)`` works
                as well, without it.
            ascent_context: not entered: the only gradient is stepped with.

        Returns:
            What the closure returned, at w - rho v / ||v||; None if it did not run.

        Raises:
            RuntimeError: within :meth:`at_weights`, after :meth:`eval`, or if there is no gradient.
            ValueError: for a sparse gradient.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        if closure is None and self._is_initialisation():
            self._step_base()
            for state in self.state.values():
                momentum = _momentum(state)
                if momentum is not None:
                    momentum.zero_()  # of SGD it would be the weight decay
            return None
        if self._inside:
            raise RuntimeError("step must be called outside at_weights(), after train(): gradients belong there.")
        self._adopt()
        loss = None if closure is None or grads_ready else self._evaluate(closure)
        self._descend("w - rho v / ||v||", grad_scaler)
        return loss

    @contextmanager
    def at_weights(self) -> Iterator[None]:
        """Within the block the parameters are the clean weights w, for evaluation and saving.

        A resume is exact wherever model and optimizer were saved and are loaded, within the block or outside.
        """
        if self._inside:
            yield
            return
        self.eval()
        try:
            yield
        finally:
            self.train()

    def eval(self) -> None:
        """Go to the clean weights until :meth:`train`: :meth:`at_weights` for loops that are not a block.

        Hugging Face's Trainer and accelerate call the two of any optimizer that has them.
        """
        if not self._inside:
            self._adopt()
            self._move_back()
            self._inside = True

    def train(self) -> None:
        """Move out again, if :meth:`eval` was called; the coming gradient belongs there."""
        if self._inside:
            self._adopt()
            self._inside = False
            self._move_out()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As usual; and notice weights that were written from outside, before the next forward."""
        self._adopt()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resume needs, copies of the clean weights with it."""
        self._adopt()
        clean = {p: p.detach() if self._inside else moved.weight for p, moved in self._moved.items()}
        # Not the weights themselves: torch.distributed.checkpoint loads in place what this returns.
        self._method_state = {p: {"weight": weight.clone()} for p, weight in clean.items()}
        try:
            return super().state_dict()
        finally:
            self._method_state = {}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual; the parameters, loaded before or after, may be the clean or the moved ones."""
        self._adopt()
        self._move_back()
        super().load_state_dict(state_dict)
        saved, self._method_state = self._method_state, {}
        _tensors.copy_(list(saved), [own["weight"] for own in saved.values()], foreach=self.foreach)
        self._move_out()
        if self._inside:
            self._move_back()

    def _unknown(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"weight": torch.zeros_like(param)} if group["perturb"] else {}

    def _update(self, norm: Tensor) -> None:
        self._move_back()
        try:
            self._step_base(norm)
        finally:
            self._move_out()
        for group in self.param_groups:
            for param in group["params"] if group["rho"] > 0 and group["perturb"] else ():
                if param.grad is not None and param not in self._moved:
                    raise ValueError(
                        f"base_optimizer must keep its momentum in its state, as {' or '.join(_MOMENTA)}, got "
                        f"{type(self.base_optimizer).__name__} with {sorted(self.state.get(param, {}))}."
                    )

    def _moves(self) -> list[Move]:
        """rho v / ||v|| of the parameters that have a momentum yet; to be subtracted."""
        rules, momenta, params = [], [], []
        for group in self.param_groups:
            known = (
                {p: _momentum(self.state.get(p, {})) for p in group["params"]}
                if group["rho"] > 0 and group["perturb"]
                else {}
            )
            params.append([p for p, v in known.items() if v is not None])
            momenta.append([v for v in known.values() if v is not None])
            rules.append(L2Ascent(rho=group["rho"]))
        return find_moves(rules, momenta, params, foreach=self.foreach)

    @torch.no_grad()
    def _move_out(self) -> None:
        moves = self._moves()
        old, self._moved = self._moved, {}
        for move in moves:
            forget_gathered(move.params)
            weights = [old[p].weight if p in old else torch.empty_like(p) for p in move.params]
            _tensors.copy_(weights, move.params, foreach=self.foreach)
            _tensors.add_(move.params, move.directions, alpha=-move.factor, foreach=self.foreach)
            for param, weight in zip(move.params, weights, strict=True):
                self._moved[param] = _MovedOut(weight, float(move.factor), param._version)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _move_back(self) -> None:
        weights = [moved.weight for moved in self._moved.values()]
        forget_gathered(self._moved)
        _tensors.copy_(list(self._moved), weights, foreach=self.foreach)
        self._moved = {p: moved._replace(version=p._version) for p, moved in self._moved.items()}
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _adopt(self) -> None:
        """Take parameters that were written from outside for clean weights, but for those that are exactly moved ones.

        They then go where the others are: out, or back within :meth:`at_weights`.
        """
        written = [p for p, moved in self._moved.items() if p._version != moved.version]
        if written:
            forget_gathered(written)
        for param in written:
            weight, factor, _ = self._moved[param]
            momentum = _momentum(self.state[param])
            moved = weight if momentum is None else weight.clone().add_(momentum, alpha=-factor)
            if not param.equal(moved):
                weight.copy_(param)
                moved = weight if momentum is None else weight.clone().add_(momentum, alpha=-factor)
            param.copy_(weight if self._inside else moved)
            self._moved[param] = _MovedOut(weight, factor, param._version)


def _momentum(state: dict[str, Any]) -> Tensor | None:
    return next((state[name] for name in _MOMENTA if isinstance(state.get(name), Tensor)), None)
