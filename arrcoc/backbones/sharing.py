"""A copy of an object around a model that owns some of the model's weights and shares the memory of all others."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def copy_owning(value: T, model: nn.Module, owned: Iterable[nn.Parameter], shared: Iterable[object] = ()) -> T:
    """Deep copy in which the owned parameters are new and require gradients, and all others are frozen views.

    Nothing happens to the original: no value, no ``requires_grad`` flag. Memory is shared until one of the two is moved
    or cast, which gives it memory of its own.

    Args:
        value: what to copy; it holds the model.
        model: whose parameters and buffers are shared.
        owned: parameters of the model that the copy has for itself.
        shared: other objects, used by both as they are.
    """
    own = {id(parameter) for parameter in owned}
    memo: dict[int, object] = {id(thing): thing for thing in shared}
    for parameter in model.parameters():
        mine, data = id(parameter) in own, parameter.detach()
        memo[id(parameter)] = nn.Parameter(data.clone() if mine else data, requires_grad=mine)
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(value, memo)
