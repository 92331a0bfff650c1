"""Schedules for rho: rho_t = rho f_1(t) f_2(t) ..., and times lr_t / lr_max if tied to it (Zhuang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sam_core._checks import check_count, check_finite, check_in, check_nonnegative, check_positive
from sam_core.optimizers.wrapper import OptimizerWrapper

_ROUNDING = 1 + 1e-6  # schedulers of the learning rate that multiply step by step drift by this much


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Linear warm-up of rho from 0:  f(t) = min(t / num_steps, 1).

    At rho = 0 a step is the base optimizer's, in one pass.

    Args:
        num_steps: steps until rho is reached, >= 1.

    Example:
        >>> [Warmup(num_steps=4)(step) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    num_steps: int

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, at_least=1)

    def __call__(self, step: int) -> float:
        """f(step)."""
        return min(step / self.num_steps, 1.0)


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Decay of rho from 1 to a final share of it:  f(t) = final + (1 - final) c(min(t / num_steps, 1)).

    c(x) is (1 + cos(pi x)) / 2 for "cosine" and 1 - x for "linear".

    Args:
        num_steps: steps until the end is reached, counted from the first, >= 1.
        final: share of rho at the end, >= 0; above 1 rho grows.
        shape: "cosine" or "linear".

    Example:
        >>> [Decay(num_steps=4, final=0.5, shape="linear")(step) for step in range(6)]
        [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    """

    num_steps: int
    final: float = 0.0
    shape: str = "cosine"

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, at_least=1)
        check_nonnegative("final", self.final)
        check_in("shape", self.shape, ("cosine", "linear"))

    def __call__(self, step: int) -> float:
        """f(step)."""
        share = min(step / self.num_steps, 1.0)
        left = 1 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2
        return self.final + (1 - self.final) * left


class RhoScheduler:
    """Sets rho of every parameter group, in the manner of ``torch.optim.lr_scheduler``.

        rho_t = rho f_1(t) f_2(t) ...  (lr_t / lr_max if follow_lr),    t the number of calls of :meth:`step`

    rho is each group's own, as it was given to the optimizer; without factors it stays constant. The tie to the
    learning rate is that of GSAM (Zhuang et al. 2022) with rho_min = 0: whatever moves the learning rate,
    a warm-up or a plateau, moves rho in proportion.

    Make it after the scheduler of the learning rate and call it after that one, once a step or once an epoch:
    ``optimizer.step(closure); lr_scheduler.step(); rho_scheduler.step()``. It alone writes rho; combine schedules by
    giving it several factors. A resume needs its ``state_dict`` beside the optimizer's. :class:`MSAM`'s weights, which
    lie at a distance of rho between steps, are moved to the new distance at once; w stays exactly what it was.

    Args:
        optimizer: any optimizer of sam_core, not a wrapper around it such as accelerate's.
        *factors: functions of the step, finite and >= 0: :class:`Warmup`, :class:`Decay` or one's own.
        follow_lr: multiply by the group's learning rate over its largest one.
        lr_max: the largest learning rate, > 0, one for all groups or one a group; None: the largest that is known of
            the group now: its ``lr``, or the ``initial_lr`` or ``max_lr`` that torch's schedulers keep there.

    Raises:
        ValueError: for an optimizer without rho, GSAM with a schedule of its own (``rho_min``), or a bad option; from
            :meth:`step` for a bad factor, a learning rate above ``lr_max``, or a rho that was written by others.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SAM([w], torch.optim.SGD, rho=0.1, lr=1.0)
        >>> lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=4)
        >>> rho_scheduler, rhos = RhoScheduler(optimizer, Warmup(num_steps=2), follow_lr=True), []
        >>> def closure():
        ...     loss = (w**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(5):
        ...     rhos.append(round(optimizer.param_groups[0]["rho"], 4))
        ...     loss = optimizer.step(closure)
        ...     lr_scheduler.step()
        ...     rho_scheduler.step()
        >>> rhos  # 0.1 times 0, 1/2, 1, 1, 1 times the learning rate
        [0.0, 0.0438, 0.075, 0.0625, 0.05]
    """

    def __init__(
        self,
        optimizer: OptimizerWrapper,
        *factors: Callable[[int], float],
        follow_lr: bool = False,
        lr_max: float | Sequence[float] | None = None,
    ) -> None:
        if not isinstance(optimizer, OptimizerWrapper):
            raise ValueError(f"optimizer must be one of sam_core's, e.g. SAM, got {type(optimizer).__name__}.")
        for factor in factors:
            if not callable(factor):
                raise ValueError(f"factors must be functions of the step, e.g. Warmup(num_steps=100), got {factor!r}.")
        check_in("follow_lr", follow_lr, (True, False))
        if lr_max is not None and not follow_lr:
            raise ValueError(f"lr_max must be None without follow_lr=True, got {lr_max!r}.")
        num_groups = len(optimizer.param_groups)
        if isinstance(lr_max, Sequence) and len(lr_max) != num_groups:
            raise ValueError(f"lr_max must have {num_groups} values, one a group, got {len(lr_max)}.")
        self.optimizer = optimizer
        self.factors = factors
        self.follow_lr = follow_lr
        self.base_rhos: list[float] = []
        self.last_epoch = 0
        self._lr_max = lr_max
        self._lr_maxs: list[float] = []
        self._last_rhos: list[float] = []
        self._adopt_groups()
        self._write(self._rhos())

    def step(self) -> None:
        """Set rho of every group for the coming step of the optimizer; a group added meanwhile takes part from now."""
        for number, (group, last) in enumerate(zip(self.optimizer.param_groups, self._last_rhos, strict=False)):
            if group["rho"] != last:
                raise ValueError(
                    f"rho of group {number} must be what RhoScheduler set, {last!r}, got {group['rho']!r}. "
                    "One scheduler writes it; on a resume load the states of both."
                )
        self._adopt_groups()
        self.last_epoch += 1
        self._write(self._rhos())

    def get_last_rho(self) -> list[float]:
        """The present rho of each group, as set by the last call of :meth:`step`."""
        return list(self._last_rhos)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the same factors."""
        return {
            "last_epoch": self.last_epoch,
            "base_rhos": list(self.base_rhos),
            "lr_maxs": list(self._lr_maxs),
            "last_rhos": list(self._last_rhos),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; rho is written to the groups, before or after the optimizer's load.

        Raises:
            ValueError: if the optimizer has other groups, or one of the two follows the learning rate.
        """
        num_saved, num_groups = len(state_dict["base_rhos"]), len(self.optimizer.param_groups)
        if num_saved != num_groups:
            raise ValueError(f"state_dict must have rho of {num_groups} groups, got {num_saved}.")
        if bool(state_dict["lr_maxs"]) != self.follow_lr:
            raise ValueError(f"state_dict must be that of follow_lr={self.follow_lr}, got {not self.follow_lr}.")
        self.last_epoch = state_dict["last_epoch"]
        self.base_rhos, self._lr_maxs = list(state_dict["base_rhos"]), list(state_dict["lr_maxs"])
        self._write(list(state_dict["last_rhos"]))

    def _adopt_groups(self) -> None:
        """Read what the schedule of a group starts from, once a group."""
        for number in range(len(self.base_rhos), len(self.optimizer.param_groups)):
            group = self.optimizer.param_groups[number]
            if "rho" not in group:
                raise ValueError(f"optimizer must have rho in its parameter groups, got none in group {number}.")
            if group.get("rho_min") is not None:
                raise ValueError(
                    f"rho_min must be None with RhoScheduler, got {group['rho_min']!r}: "
                    "GSAM ties rho to the learning rate itself."
                )
            if self.follow_lr:
                lr_max = self._lr_max
                if lr_max is None:
                    lr_max = max(float(group[name]) for name in ("lr", "initial_lr", "max_lr") if name in group)
                elif isinstance(lr_max, Sequence):
                    lr_max = lr_max[min(number, len(lr_max) - 1)]
                check_positive("lr_max", lr_max)
                self._lr_maxs.append(lr_max)
            # Kept in the group as torch keeps initial_lr, so that a new scheduler starts from the same rho.
            self.base_rhos.append(float(group.setdefault("initial_rho", group["rho"])))

    def _rhos(self) -> list[float]:
        share = 1.0
        for factor in self.factors:
            value = factor(self.last_epoch)
            check_nonnegative(f"factor {factor!r} at step {self.last_epoch}", value)
            share *= value
        rhos = [rho * share for rho in self.base_rhos]
        if self.follow_lr:
            rhos = [rho * self._lr_share(number) for number, rho in enumerate(rhos)]
        return rhos

    def _lr_share(self, number: int) -> float:
        lr, lr_max = float(self.optimizer.param_groups[number]["lr"]), self._lr_maxs[number]
        check_finite("lr", lr)
        if lr > lr_max * _ROUNDING:
            raise ValueError(
                f"lr_max must be >= the learning rate, got {lr_max!r} where lr of group {number} is {lr!r}. "
                "Make RhoScheduler after the scheduler of the learning rate, or give lr_max."
            )
        return min(lr / lr_max, 1.0)

    def _write(self, rhos: list[float]) -> None:
        self._last_rhos = rhos
        if all(group["rho"] == rho for group, rho in zip(self.optimizer.param_groups, rhos, strict=True)):
            return
        with self.optimizer.at_weights():  # MSAM: back from the old distance, out to the new one
            for group, rho in zip(self.optimizer.param_groups, rhos, strict=True):
                group["rho"] = rho
