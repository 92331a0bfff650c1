"""Lightning: its automatic optimization with two passes a step, and what would train wrong refused before it starts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from sam_core.optimizers.msam import MSAM
from sam_core.optimizers.two_pass import TwoPassOptimizer
from sam_core.optimizers.wrapper import OptimizerWrapper
from sam_core.training.batchnorm import frozen_running_stats

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]  # the same, under its older name
    except ImportError as missing:
        raise ImportError(
            "sam_core.integrations.lightning needs the package lightning: pip install lightning."
        ) from missing

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SharpnessAwareCallback(Callback):
    """What an optimizer of sam_core needs of Lightning's Trainer; give it to ``Trainer(callbacks=[...])``.

    Lightning hands ``optimizer.step`` a closure of training_step, zero_grad and backward, so that both passes run as
    they are. The callback

    - refuses the settings under which they would not: see Raises;
    - freezes the running statistics of batch normalisation in the second pass;
    - keeps :class:`MSAM`'s weights clean whenever no gradient is taken: for validation, checkpoints, other callbacks
      and after the end. It moves itself to the front of the Trainer's callbacks for that.

    It leaves other optimizers alone.

    Raises:
        ValueError: at the start of ``fit``: with a method of two passes for ``gradient_clip_val`` (it would clip both
            gradients: give the optimizer ``max_grad_norm``), for ``precision="16-mixed"`` (its loss scaler steps
            without a closure) and for :class:`EfficientSAM` (it needs each sample's loss); with any method for a
            strategy other than one device and DDP (FSDP flattens parameters, DeepSpeed steps by itself). Before the
            first batch, for ``accumulate_grad_batches`` > 1 (a step would learn from the last micro-batch alone).

    Example:
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Linear(3, 2)
        ...     def training_step(self, batch):
        ...         inputs, targets = batch
        ...         return torch.nn.functional.cross_entropy(self.model(inputs), targets)
        ...     def configure_optimizers(self):
        ...         return SAM(self.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3)
        >>> trainer = Trainer(max_epochs=2, callbacks=[SharpnessAwareCallback()])
    """

    def __init__(self) -> None:
        self._second_pass = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move to the front: the callbacks that look at weights after a step come later."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings that are fixed from here on."""
        for optimizer in _ours(trainer):
            _check_strategy(optimizer, trainer)
            if pl_module.automatic_optimization:
                _check_automatic(optimizer, trainer)
        self._rest(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check what other callbacks change in between, and let MSAM go where its gradient is taken."""
        for optimizer in _ours(trainer):
            if pl_module.automatic_optimization and trainer.accumulate_grad_batches != 1:
                raise ValueError(
                    f"accumulate_grad_batches must be 1 with {type(optimizer).__name__}, got "
                    f"{trainer.accumulate_grad_batches}: the step clears gradients and would learn from the last "
                    "micro-batch alone. Use bigger batches, or manual optimization with sam_core.make_closure."
                )
            if isinstance(optimizer, MSAM):
                optimizer.train()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lightning calls this after each pass, before what the optimizer does with the gradient."""
        if isinstance(optimizer, OptimizerWrapper):
            if optimizer.in_second_pass:
                self._second_pass.close()
            elif optimizer.second_pass_is_due():
                self._second_pass.enter_context(frozen_running_stats(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Back to the clean weights."""
        self._rest(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As after a batch, for one that was skipped."""
        self._rest(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as between two steps."""
        self._second_pass.close()
        self._rest(trainer)

    def _rest(self, trainer: Trainer) -> None:
        for optimizer in _ours(trainer):
            if isinstance(optimizer, MSAM):
                optimizer.eval()


def _ours(trainer: Trainer) -> list[OptimizerWrapper]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, OptimizerWrapper)]


def _check_strategy(optimizer: OptimizerWrapper, trainer: Trainer) -> None:
    kind = type(trainer.strategy)
    # By name: lightning.pytorch and pytorch_lightning have classes of their own.
    if kind.__name__ not in ("SingleDeviceStrategy", "DDPStrategy") or "lightning" not in kind.__module__:
        raise ValueError(
            f"strategy must be one device or DDP with {type(optimizer).__name__}, got "
            f"{kind.__name__}, where norms over all parameters, or the step, are not the optimizer's."
        )


def _check_automatic(optimizer: OptimizerWrapper, trainer: Trainer) -> None:
    name = type(optimizer).__name__
    if optimizer.takes_sample_losses:
        raise ValueError(
            f"optimizer must take one loss a batch in automatic optimization, got {name}, which needs each sample's. "
            "Set automatic_optimization = False and step self.optimizers(use_pl_optimizer=False) with its own closure."
        )
    if not isinstance(optimizer, TwoPassOptimizer):
        return
    if trainer.gradient_clip_val:
        raise ValueError(
            f"gradient_clip_val must be None with {name}, got {trainer.gradient_clip_val!r}: it would clip the "
            "gradient of each pass. Give max_grad_norm to the optimizer instead."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision must do without a loss scaler with {name}, got {trainer.precision!r}: Lightning's scaler steps "
            'without a closure, so that the second pass could not run. Use "bf16-mixed".'
        )
