"""Exponential moving average of weights:  a <- d a + (1 - d) w,  with  d = min(decay, (1 + t) / (10 + t))  at step t.

The smaller d of the first steps (as in TensorFlow's ExponentialMovingAverage) forgets the initial weights, which a
constant decay would carry through a short run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class WeightAverage:
    """Average of parameters over the steps of a run, kept beside them.

    Args:
        params: the parameters, as they are before the first step.
        decay: in [0, 1).
    """

    def __init__(self, params: Sequence[Tensor], decay: float) -> None:
        self.params = list(params)
        self.decay = decay
        self.num_updates = 0
        self.values = [param.detach().clone() for param in params]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for value, param in zip(self.values, self.params, strict=True):
            value.lerp_(param.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are their average within the block, and themselves again, bit for bit, after it."""
        backup = [param.detach().clone() for param in self.params]
        set_values(self.params, self.values)
        try:
            yield
        finally:
            set_values(self.params, backup)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"values": self.values, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        set_values(self.values, state["values"])
        self.num_updates = state["num_updates"]


@torch.no_grad()
def set_values(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into parameters, in place."""
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
