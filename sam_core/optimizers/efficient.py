"""EfficientSAM: perturb some weights, then learn from the samples whose loss rises most (Du et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_core._checks import check_count, check_finite
from sam_core._dtensors import is_dtensor
from sam_core._tracing import untraced
from sam_core.ascent import Move, find_moves
from sam_core.optimizers.two_pass import TwoPassOptimizer


class EfficientSAM(TwoPassOptimizer):
    """ESAM: cheaper passes by weight and by sample.

    1. Draw a share of the parameter tensors; differentiate the mean loss at w by these alone, and move them:
       e = rho g / ||g||, g over the drawn ones. Drawn before the backward, or nothing would be saved. They are a run of
       neighbours that starts anywhere and goes on with the first after the last: each tensor is drawn equally often,
       and layers below the run need no backward. The paper draws coordinates, the authors' code single tensors.
    2. A forward without graph at w + e gives each sample's loss; keep the share of samples whose loss rose most.
    3. Forward and backward at w + e on these; the base optimizer steps all parameters.

    Under DistributedDataParallel the first gradient is this rank's alone, in ``no_sync`` or not: it is that of some
    parameters, which nothing there would sum. A model with ``static_graph=True`` must have made a backward before.

    With forward, input and weight gradient one unit each, that is (2 + perturbation_ratio) + 1 + 3 sample_ratio units
    to SAM's 6; under FSDP2 the first backward is a whole one. With several ranks each keeps a share of its own samples.
    Here ||e|| = rho: the worst neighbour within the drawn subspace. The paper divides e by the ratio, which in the
    authors' code gives rho / perturbation_ratio. Their code drops one sample or more at the threshold; here
    max(1, ceil(sample_ratio B)) are kept.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, parameter units, >= 0. 0 is the base optimizer on the mean loss.
        perturbation_ratio: share of the parameter tensors that is perturbed, in (0, 1]; at least one is.
        sample_ratio: share of the samples in the second pass, in (0, 1]; 1 spares the forward that chooses.
        seed: of the draws, >= 0; with the number of steps taken it fixes them, so that a resume is exact.
        **kwargs: ``nonfinite``, ``max_grad_norm`` and ``foreach`` of :class:`GuardedOptimizer`; the others go to
            ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> model, inputs = torch.nn.Linear(3, 1), torch.ones(8, 3)
        >>> optimizer = EfficientSAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> def closure(indices=None):
        ...     chosen = inputs if indices is None else inputs[indices]
        ...     return model(chosen).square().squeeze(1)  # one loss a sample, no backward
        >>> loss = optimizer.step(closure)
    """

    local_ascent = True
    takes_sample_losses = True

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        perturbation_ratio: float = 0.5,
        sample_ratio: float = 0.5,
        *,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        _check_ratio("perturbation_ratio", perturbation_ratio)
        _check_ratio("sample_ratio", sample_ratio)
        check_count("seed", seed)
        self.perturbation_ratio = perturbation_ratio
        self.sample_ratio = sample_ratio
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)
        self._counters |= {"seed": seed, "num_steps": 0}

    @untraced  # other weights in each step: torch.compile would compile each anew
    @torch.no_grad()
    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *,
        grads_ready: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_context: Callable[[], AbstractContextManager[Any]] | AbstractContextManager[Any] | None = None,
    ) -> Any:
        """One whole step.

        Args:
            closure: ``closure(indices=None)`` returns the losses of the batch, one a sample [B], and does not call
                backward; with indices [k], int64, ascending and on the losses' device, those of these samples [k].
            grads_ready: must be False: the losses at w are needed.
            grad_scaler: scales the losses here; call its ``update()`` afterwards, not its ``step``.
            ascent_context: context of the first pass.

        Returns:
            Mean loss at w, detached; None without a closure, which is as for :meth:`TwoPassOptimizer.step`.

        Raises:
            ValueError: for grads_ready, or losses that are not one a sample.
            RuntimeError: if the losses depend on no parameter, or it is the first backward of a static graph.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        if grads_ready:
            raise ValueError("grads_ready must be False for EfficientSAM: it needs each sample's loss at w.")
        if closure is None:
            return super().step(None, grad_scaler=grad_scaler)
        if not self.second_pass_is_due():
            losses = self._evaluate(lambda: _backward(_sample_losses(closure()), grad_scaler))
            self._descend("w", grad_scaler)
            return losses.mean()

        drawn = self._draw()
        losses = self._evaluate(
            lambda: self._differentiate(_sample_losses(closure()), grad_scaler, drawn), ascent_context
        )
        try:
            self._begin(grad_scaler, local=True)  # nothing synchronises torch.autograd.grad
            self.zero_grad()
            indices = self._select(closure, losses)
            chosen = closure if indices is None else partial(closure, indices)
            self._evaluate(lambda: _backward(_sample_losses(chosen()), grad_scaler))
        except BaseException:
            self.restore()
            raise
        self.second_step(grad_scaler=grad_scaler)
        return losses.mean()

    def second_pass_is_due(self) -> bool:
        return super().second_pass_is_due() and bool(self._draw())  # nothing to draw if all of them are frozen

    def _draw(self) -> list[Tensor]:
        """The parameters that this step perturbs."""
        params = [p for group in self.param_groups if group["perturb"] for p in group["params"] if p.requires_grad]
        number = self._counters["seed"] * 0x9E3779B1 + self._counters["num_steps"]
        generator = torch.Generator().manual_seed(number % 2**32)  # it looks at 32 bits alone
        start = int(torch.randint(len(params), (), generator=generator)) if params else 0
        return [*params[start:], *params[:start]][: _count(self.perturbation_ratio, len(params))]

    def _differentiate(self, losses: Tensor, grad_scaler: torch.amp.GradScaler | None, drawn: list[Tensor]) -> Tensor:
        """Put the gradients of the drawn parameters alone into ``.grad``."""
        _refuse_first_static_pass(losses)
        if any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
            # FSDP2 runs on whole copies of its own: asked for its parameters, torch.autograd.grad would answer zero.
            _backward(losses, grad_scaler)
            for param in set(self._params_with_grad()) - set(drawn):
                param.grad = None
            return losses.detach()
        grads = torch.autograd.grad(_mean(losses, grad_scaler), drawn, materialize_grads=True)
        for param, grad in zip(drawn, grads, strict=True):
            param.grad = grad
        return losses.detach()

    def _select(self, closure: Callable[..., Any], losses: Tensor) -> Tensor | None:
        """Samples whose loss rises most from w to w + e, or falls most if it is maximised; None for all."""
        count = _count(self.sample_ratio, len(losses))
        if count == len(losses):
            return None
        rises = _sample_losses(closure()).to(losses) - losses
        worst = not self.param_groups[0].get("maximize", False)
        return rises.topk(count, largest=worst).indices.sort().values

    def _ascend(self, params: list[list[Tensor]], grads: list[list[Tensor]], norm: Tensor) -> list[Move]:
        drawn = set(self._draw())
        pairs = [
            [(p, g) for p, g in zip(ps, gs, strict=True) if p in drawn] for ps, gs in zip(params, grads, strict=True)
        ]
        return find_moves(
            [self._rule(group) for group in self.param_groups],
            [[g for _, g in group] for group in pairs],
            [[p for p, _ in group] for group in pairs],
            foreach=self.foreach,
        )

    def _update(self, norm: Tensor) -> None:
        super()._update(norm)
        if norm != 0:  # torch.distributed.checkpoint steps on zero gradients before it saves: it must not count
            self._counters["num_steps"] += 1


def _backward(losses: Tensor, grad_scaler: torch.amp.GradScaler | None) -> Tensor:
    torch.autograd.backward(_mean(losses, grad_scaler))
    return losses.detach()


def _refuse_first_static_pass(losses: Tensor) -> None:
    """DistributedDataParallel learns a static graph from the first backward, which must be of all parameters.

    Until then its outputs come from a node of its own.
    """
    nodes: list[Any] = [losses.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node).__name__ == "_DDPSinkBackward":
            if node.ddp_weakref().static_graph:
                raise RuntimeError(
                    "EfficientSAM's first pass must not be the first backward under static_graph=True: "
                    "run an ordinary one on the DistributedDataParallel model before."
                )
            return
        fresh = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(fresh)
        nodes.extend(fresh)


def _mean(losses: Tensor, grad_scaler: torch.amp.GradScaler | None) -> Tensor:
    return losses.mean() if grad_scaler is None else grad_scaler.scale(losses.mean())


def _sample_losses(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) == 0:
        found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(f"closure must return one loss a sample, a tensor [B] with B >= 1, got {found}.")
    if torch.is_grad_enabled() and not losses.requires_grad:
        raise RuntimeError("no parameter has a gradient: the losses that the closure returned depend on none.")
    return losses


def _check_ratio(name: str, value: Any) -> None:
    check_finite(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}.")


def _count(ratio: float, total: int) -> int:
    """Share of a whole, rounded up: at least one."""
    return max(1, math.ceil(ratio * total - 1e-9))
