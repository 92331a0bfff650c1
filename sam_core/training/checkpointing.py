"""Activation checkpointing for a block of code: forget activations in the forward, recompute them in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from sam_core._checks import check_count


@contextmanager
def checkpointed(
    model: nn.Module, modules: Sequence[str | nn.Module] | None = None, *, segments: int = 2
) -> Iterator[None]:
    """Within the block the modules keep their inputs alone and recompute the rest in the backward (Chen et al. 2016).

    The random state of the forward is set again for the recomputation, so dropout draws the same masks.

    Args:
        model: the model that will be called; left as it was after the block.
        modules: the modules to recompute, themselves or by name; None: the segments of a sequential model.
        segments: number of parts into which a sequential model is cut, in [1, its length]; the last part is kept.

    Raises:
        ValueError: for an unknown module, or no modules and a model that is not sequential.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 1))
        >>> with checkpointed(model, segments=2):
        ...     model(torch.ones(4, 2)).sum().backward()
    """
    with ExitStack() as stack:
        if modules is not None:
            for module in _find(model, modules):
                stack.enter_context(_replaced_forward(module, _recomputing(module.forward)))
        else:
            if not isinstance(model, nn.Sequential):
                raise ValueError(
                    f"modules must be named for a model that is not nn.Sequential, got {type(model).__name__}."
                )
            check_count("segments", segments, at_least=1)
            if segments > len(model):
                raise ValueError(f"segments must be <= {len(model)}, the model's length, got {segments!r}.")

            def forward(inputs: Any) -> Any:
                return checkpoint_sequential(list(model), segments, inputs, use_reentrant=False)

            stack.enter_context(_replaced_forward(model, forward))
        yield


def _find(model: nn.Module, modules: Sequence[str | nn.Module]) -> list[nn.Module]:
    named = dict(model.named_modules())
    for module in modules:
        if (module not in named) if isinstance(module, str) else all(module is not known for known in named.values()):
            raise ValueError(f"modules must be modules of the model or their names, got {module!r}.")
    return [named[module] if isinstance(module, str) else module for module in modules]


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
