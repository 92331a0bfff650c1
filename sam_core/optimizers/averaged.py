"""Ascent rules that remember: a running average of the gradients at w, kept apart from the base optimizer's moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_core import _tensors
from sam_core.optimizers.two_pass import TwoPassOptimizer


class AveragedAscent(TwoPassOptimizer):
    """Base of the methods with an average m of the gradients at w: m <- memory m + (1 - memory) g, the first m is g.

    Half types are averaged in float32. A finite gradient enters the average at once, also if the step is then skipped
    because of the second pass or given up: keeping the old average until then would cost a third copy of the weights.
    """

    def _unknown(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        dtype = torch.promote_types(param.dtype, torch.float32)
        return {"average": torch.zeros_like(param, dtype=dtype)} if group["perturb"] else {}

    def _average(self, params: list[Tensor], grads: list[Tensor], memory: float) -> list[Tensor]:
        """Take the gradients of one group into their averages and return these."""
        news = [(p, g) for p, g in zip(params, grads, strict=True) if p not in self._method_state]
        olds = [
            (self._method_state[p]["average"], g) for p, g in zip(params, grads, strict=True) if p in self._method_state
        ]
        for param, grad in news:
            self._method_state[param] = {"average": _tensors.wide([grad])[0].clone()}
        averages = [average for average, _ in olds]
        _tensors.scale_(averages, memory, foreach=self.foreach)
        _tensors.add_(averages, [g for _, g in olds], alpha=1 - memory, foreach=self.foreach)
        return [self._method_state[p]["average"] for p in params]
