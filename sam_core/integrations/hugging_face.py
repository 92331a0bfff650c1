"""Hugging Face Trainer: the second pass of a step, which its loop has no place for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from sam_core.optimizers.msam import MSAM
from sam_core.optimizers.two_pass import TwoPassOptimizer
from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.training.batchnorm import frozen_running_stats

try:
    from transformers import Trainer, TrainerCallback
except ImportError as missing:
    raise ImportError(
        "sam_core.integrations.hugging_face needs transformers and accelerate: pip install transformers accelerate."
    ) from missing


class SAMTrainer(Trainer):  # type: ignore[misc]  # Trainer has no types
    """Hugging Face's Trainer for the optimizers of sam_core; with any other optimizer it is the Trainer itself.

    A subclass, since the Trainer's loop runs forward and backward for each micro-batch and then calls
    ``optimizer.step()`` without a closure: it has no place for a second pass, and there a method of two passes raises.
    Here the last micro-batch's ``training_step`` goes on to ``first_step`` and runs the micro-batches again at
    w + perturbation; the Trainer's own ``optimizer.step()`` then ends the step. So accumulation, schedulers, callbacks,
    logging and checkpoints are the Trainer's. The loss that it logs is the one at w; batch normalisation counts the
    first pass alone; dropout draws anew in the second one. :class:`LookSAM` takes one pass between its own steps.
    :class:`MSAM`'s weights are moved out only while a gradient is taken, so that evaluation and files have clean ones.

    Args:
        *args: of ``transformers.Trainer``.
        **kwargs: of ``transformers.Trainer``; the optimizer by ``optimizer_cls_and_kwargs``, or ``optimizers``.

    Raises:
        ValueError: when training starts, for :class:`EfficientSAM` (it needs each sample's loss); with a method of two
            passes for ``fp16=True`` (use ``bf16``); with methods that step with both gradients for
            ``max_grad_norm`` > 0 (the Trainer would clip one of them: give it to the optimizer); under DeepSpeed, FSDP
            and others that shard or step by themselves.

    Example:
        >>> from transformers import TrainingArguments
        >>> trainer = SAMTrainer(
        ...     torch.nn.Linear(3, 2),
        ...     TrainingArguments(use_cpu=True, report_to="none"),
        ...     optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 1e-3}),
        ... )
        >>> type(trainer.create_optimizer()).__name__
        'SAM'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_batches: list[Any] = []  # of the step that is being accumulated
        super().__init__(*args, **kwargs)
        self.add_callback(_CleanWeights())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As usual; and refuse what would train wrong."""
        self._micro_batches = []  # a run begins here, also another try of auto_find_batch_size
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        ours = _innermost(optimizer)
        if isinstance(ours, OptimizerWrapper):
            _check(ours, self.args, str(self.accelerator.distributed_type.value))
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As usual; the model is left at the clean weights, whatever happens."""
        try:
            return super().train(*args, **kwargs)
        finally:
            _rest(self.optimizer)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch; after the last one of a step its second pass.

        Args:
            model: the model, wrapped for distributed training or not.
            inputs: the micro-batch.
            num_items_in_batch: what the losses of the step's micro-batches are divided by, if known.

        Returns:
            The loss at w, detached.
        """
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        optimizer = _innermost(self.optimizer)
        if not isinstance(optimizer, TwoPassOptimizer):
            return loss
        self._micro_batches.append(inputs)
        if self.accelerator.sync_gradients:
            batches, self._micro_batches = self._micro_batches, []
            if optimizer.second_pass_is_due():
                self._second_pass(optimizer, model, batches, num_items_in_batch)
        return loss

    def _second_pass(
        self, optimizer: TwoPassOptimizer, model: torch.nn.Module, batches: list[Any], num_items_in_batch: Any
    ) -> None:
        optimizer.first_step(zero_grad=True)
        try:
            with frozen_running_stats(model):
                for number, inputs in enumerate(batches, start=1):
                    with nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                        super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            optimizer.restore()
            raise


class _CleanWeights(TrainerCallback):  # type: ignore[misc]
    """Takes MSAM to its clean weights after each step; the Trainer's next training_step takes it back."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any) -> None:
        _rest(optimizer)


def _rest(optimizer: Any) -> None:
    optimizer = _innermost(optimizer)
    if isinstance(optimizer, MSAM):
        optimizer.eval()


def _innermost(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _check(optimizer: OptimizerWrapper, args: Any, distributed: str) -> None:
    name = type(optimizer).__name__
    if distributed != "NO" and not distributed.startswith("MULTI_"):
        raise ValueError(
            f"SAMTrainer must run on one device or with DistributedDataParallel, got {distributed} with {name}: there "
            "norms over all parameters, or the step, are not the optimizer's."
        )
    if optimizer.takes_sample_losses:
        raise ValueError(f"optimizer must take one loss a batch, got {name}, which needs each sample's.")
    if not isinstance(optimizer, TwoPassOptimizer):
        return
    if args.fp16:
        raise ValueError(
            f"fp16 must be False with {name}, got True: the Trainer's loss scaler may leave out the call that ends a "
            "step, and with it the way back to w. Use bf16."
        )
    if args.max_grad_norm and optimizer._keeps_ascent_grads:
        raise ValueError(
            f"max_grad_norm must be 0 with {name}, got {args.max_grad_norm!r}: the Trainer would clip the second "
            "gradient alone, and the step is made of both. Give max_grad_norm to the optimizer instead."
        )
