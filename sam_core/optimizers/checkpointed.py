"""MemoryEfficientSAM: SAM that recomputes activations in both passes instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_core._checks import check_count
from sam_core.optimizers.sam import SAM
from sam_core.training.batchnorm import frozen_running_stats, kept_running_stats
from sam_core.training.checkpointing import checkpointed


class MemoryEfficientSAM(SAM):
    """SAM with activation checkpointing (Chen et al. 2016): less memory, about one more forward for each pass.

    The gradients are those of :class:`SAM` to the last bit: :meth:`step_with_checkpointing` recomputes with the same
    random state. All else is SAM; ``step`` and the two-step form keep activations as usual.

    Args:
        params: parameters, named parameters or parameter groups; a group may set rho, adaptive and eta of its own.
        base_optimizer: class that makes the step, e.g. ``torch.optim.AdamW``.
        rho: radius of the neighbourhood, parameter units, >= 0. 0 is the base optimizer.
        checkpoint_segments: parts into which a sequential model is cut, >= 1; activations of one are alive at a time.
        **kwargs: ``adaptive`` and ``eta`` of :class:`SAM`; ``nonfinite``, ``max_grad_norm`` and ``foreach`` of
            :class:`GuardedOptimizer`; the others go to ``base_optimizer``.

    Raises:
        ValueError: for a bad option.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
        >>> optimizer = MemoryEfficientSAM(model.parameters(), torch.optim.SGD, lr=0.1)
        >>> inputs, targets = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
        >>> loss = optimizer.step_with_checkpointing(model, inputs, targets, torch.nn.functional.cross_entropy)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        checkpoint_segments: int = 2,
        **kwargs: Any,
    ) -> None:
        check_count("checkpoint_segments", checkpoint_segments, at_least=1)
        self.checkpoint_segments = checkpoint_segments
        super().__init__(params, base_optimizer, rho, **kwargs)

    def step_with_checkpointing(
        self,
        model: nn.Module,
        inputs: Tensor | tuple[Any, ...],
        targets: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        modules: Sequence[str | nn.Module] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        ascent_context: Callable[[], AbstractContextManager[Any]] | AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """One whole step on a batch.

        Batch normalisation follows the first forward alone: neither the recomputations nor the second pass count.

        Args:
            model: called as ``model(inputs)``, or ``model(*inputs)`` for a tuple; left as it was.
            inputs: a tensor, or a tuple of arguments.
            targets: what ``loss_fn`` compares with.
            loss_fn: ``loss_fn(outputs, targets)``, a scalar.
            modules: the modules that recompute their activations, themselves or by name; None: ``checkpoint_segments``
                segments of a sequential model.
            grad_scaler: as for :meth:`step`.
            ascent_context: as for :meth:`step`.

        Returns:
            The loss at w, detached.

        Raises:
            ValueError: for an unknown module, no modules and a model that is not sequential, or more segments than
                layers.
            FloatingPointError: for a non-finite gradient, if ``nonfinite="raise"``.
        """
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)

        def closure() -> Tensor:
            counted = nullcontext() if not self.in_second_pass else frozen_running_stats(model)
            with checkpointed(model, modules, segments=self.checkpoint_segments), counted:
                loss = loss_fn(model(*arguments), targets)
                with kept_running_stats(model):  # the backward runs layers again
                    torch.autograd.backward(loss if grad_scaler is None else grad_scaler.scale(loss))
            return loss.detach()

        loss: Tensor = self.step(closure, grad_scaler=grad_scaler, ascent_context=ascent_context)
        return loss
