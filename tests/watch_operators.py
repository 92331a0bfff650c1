"""What a piece of code asks of torch: the sizes of all tensors it makes, and its calls of fused attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Sizes(TorchDispatchMode):
    """Shapes of every tensor that an operator returns, those inside a fused operator left out, as nobody keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        values = made if isinstance(made, tuple | list) else (made,)
        self.seen |= {value.shape for value in values if isinstance(value, Tensor)}
        return made

    def with_two_axes_of(self, counts: set[int]) -> set[torch.Size]:
        return {shape for shape in self.seen if sum(size in counts for size in shape) > 1}


class FusedAttention(TorchFunctionMode):
    """Counts calls of scaled_dot_product_attention, and refuses the module that may build matrices of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.nn.functional.scaled_dot_product_attention
        assert func not in (torch._native_multi_head_attention, torch.softmax, Tensor.softmax)
        return func(*args, **(kwargs or {}))
