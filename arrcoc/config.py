"""Settings: frozen, keyword-only, checked when they are made."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from sam_core._checks import check_count, check_in, check_nonnegative, check_positive, check_share
from sam_core.optimizers import METHODS, OptimizerWrapper

LOSSES = ("bce", "mse", "listwise", "smooth_ap")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")
BASE_ALONE = "none"  # the optimizer that is no method of sam_core


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Shape of a relevance head, whatever the backbone.

    Args:
        affinity_dim: width of a learned linear image in which tokens are compared with each other; 0 compares the
            tokens themselves, which has nothing to overfit.
        text_rank: rank of the learned token-text product; 0 leaves the query out of everything but the similarity,
            which is what carries over to names that were never trained on.
        objectness_dim: hidden width of the text-free objectness term; 0 turns it off.
    """

    affinity_dim: int = 0
    text_rank: int = 0
    objectness_dim: int = 0

    def __post_init__(self) -> None:
        check_count("affinity_dim", self.affinity_dim, at_least=0)
        check_count("text_rank", self.text_rank, at_least=0)
        check_count("objectness_dim", self.objectness_dim, at_least=0)


@dataclass(frozen=True, kw_only=True)
class HeadConfig(HeadShape):
    """Shape of a relevance head for embeddings of one width.

    Args:
        embed_dim: width of token and text embeddings.
    """

    embed_dim: int

    def __post_init__(self) -> None:
        check_count("embed_dim", self.embed_dim, at_least=1)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a relevance head is trained, and the last blocks of its backbone if they are.

    Args:
        epochs: passes over the training set.
        lr: peak learning rate.
        warm_up: share of the steps in which the rate rises to its peak as a line, in [0, 1).
        schedule: how it falls afterwards: "cosine", "linear" or "constant" (not at all).
        min_lr: what it falls to, at most lr.
        weight_decay: of the base optimizer, decoupled for AdamW.
        optimizer: method of sam_core by its name in small letters, e.g. "sam" or "asam"; "none" for the base
            optimizer alone. ("memoryefficientsam" is "sam" here: it saves memory in a loop of its own alone.)
        optimizer_options: further arguments of the method, e.g. eta of "asam".
        base_optimizer: name of the torch.optim class that makes the step.
        base_options: further arguments of that class, e.g. momentum of "SGD".
        rho: radius of the ascent step, in parameter units (relative for "asam").
        loss: "listwise", "smooth_ap", "bce" or "mse"; the head is calibrated afterwards whichever it is.
        penalty_weight: weight of the robustness penalty; 0 turns it off.
        input_radius: standard deviation of the penalty's token noise, relative to the tokens' root mean square.
        precision: what forward passes compute in: "float32", "bfloat16" or "float16" (with a scaled loss); weights,
            losses and steps stay in float32.
        accumulation_steps: batches a step. Both passes of SAM see all of them, as if they were one batch.
        max_grad_norm: largest norm of the gradient that the base optimizer steps with; no limit if none.
        nonfinite: at a gradient that is not finite, "raise" an error or "skip" the step, which the log counts.
        ema_decay: what is evaluated and kept is an exponential moving average of the weights with this decay, in
            [0, 1); 0 turns it off.
        patience: stop after so many epochs in which ``monitor`` did not rise, and keep the weights of the best epoch;
            never stop and keep the last ones if none.
        min_delta: by how much ``monitor`` must rise to count.
        monitor: name of the validation score that ``patience`` watches.
        train_blocks: last blocks of the backbone that are fine-tuned with the head; 0 leaves the backbone as it is.
        backbone_lr_factor: learning rate of these blocks relative to the head's.
        seed: of initial weights, order of the data and noise.
    """

    epochs: int = 10
    lr: float = 3e-3
    warm_up: float = 0.05
    schedule: str = "cosine"
    min_lr: float = 0.0
    weight_decay: float = 0.01
    optimizer: str = "sam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    base_optimizer: str = "AdamW"
    base_options: dict[str, Any] = field(default_factory=dict)
    rho: float = 0.05
    loss: str = "listwise"
    penalty_weight: float = 0.1
    input_radius: float = 0.1
    precision: str = "float32"
    accumulation_steps: int = 1
    max_grad_norm: float | None = None
    nonfinite: str = "raise"
    ema_decay: float = 0.0
    patience: int | None = None
    min_delta: float = 0.0
    monitor: str = "ap_held-out"
    train_blocks: int = 0
    backbone_lr_factor: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, at_least=1)
        check_positive("lr", self.lr)
        check_share("warm_up", self.warm_up)
        check_in("schedule", self.schedule, SCHEDULES)
        check_nonnegative("min_lr", self.min_lr)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be at most lr = {self.lr!r}, got {self.min_lr!r}.")
        for name in ("weight_decay", "rho", "penalty_weight", "input_radius", "min_delta"):
            check_nonnegative(name, getattr(self, name))
        check_in("loss", self.loss, LOSSES)
        check_in("precision", self.precision, PRECISIONS)
        check_in("nonfinite", self.nonfinite, ("raise", "skip"))
        check_count("accumulation_steps", self.accumulation_steps, at_least=1)
        if self.max_grad_norm is not None:
            check_positive("max_grad_norm", self.max_grad_norm)
        check_share("ema_decay", self.ema_decay)
        if self.patience is not None:
            check_count("patience", self.patience, at_least=1)
        check_count("train_blocks", self.train_blocks, at_least=0)
        check_positive("backbone_lr_factor", self.backbone_lr_factor)
        check_count("seed", self.seed, at_least=0)
        check_in("optimizer", self.optimizer, (*METHODS, BASE_ALONE))
        base_class = getattr(torch.optim, self.base_optimizer, None)
        if not (isinstance(base_class, type) and issubclass(base_class, torch.optim.Optimizer)):
            raise ValueError(f"base_optimizer must name a class of torch.optim, got {self.base_optimizer!r}.")
        if self.optimizer_options or self.base_options or self.base_optimizer != "AdamW":
            # Bad options are refused now, not after an hour; the defaults are known to be good, and it takes a second.
            self._try_optimizer()

    def _try_optimizer(self) -> None:
        param = torch.nn.Parameter(torch.zeros(1))
        base = self.make_optimizer([param]).base_optimizer
        param.grad = torch.ones(1)
        try:
            base.step()
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"base_optimizer must make a step with a dense gradient and its options, {self.base_optimizer} with "
                f"{self.base_options!r} does not: {error}."
            ) from error

    def make_optimizer(self, params: Any) -> OptimizerWrapper:
        """The method over the base optimizer, for parameters or parameter groups.

        Raises:
            ValueError: if one of the two refuses its options.
        """
        base = getattr(torch.optim, self.base_optimizer)
        # With rho = 0, SAM is the base optimizer and makes one pass.
        method, rho = (METHODS["sam"], 0.0) if self.optimizer == BASE_ALONE else (METHODS[self.optimizer], self.rho)
        own: dict[str, Any] = {"rho": rho, "nonfinite": self.nonfinite, "max_grad_norm": self.max_grad_norm}
        own |= {"lr": self.lr, "weight_decay": self.weight_decay}
        if "weight_decay" not in inspect.signature(base).parameters:
            if self.weight_decay:
                raise ValueError(f"weight_decay must be 0 for {self.base_optimizer}, which has none.")
            del own["weight_decay"]
        for name, options in (("optimizer_options", self.optimizer_options), ("base_options", self.base_options)):
            if taken := sorted(own.keys() & options.keys()):
                raise ValueError(
                    f"{name} must not hold {', '.join(taken)}, which has a setting of its own or is twice."
                )
            own |= options
        try:
            return method(params, base, **own)
        except TypeError as error:
            raise ValueError(
                f"optimizer_options and base_options must be arguments of {self.optimizer} and {self.base_optimizer}, "
                f"got {self.optimizer_options!r} and {self.base_options!r}: {error}."
            ) from error
