"""Settings: frozen, keyword-only, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sam_core._checks import check_count, check_nonnegative, check_positive

LOSSES = ("bce", "mse", "listwise")
OPTIMIZERS = ("sam", "asam", "none")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shape of a relevance head.

    Args:
        embed_dim: width of token and text embeddings.
        affinity_dim: width of a learned linear image in which tokens are compared with each other; 0 compares the
            tokens themselves, which has nothing to overfit.
        text_rank: rank of the learned token-text product; 0 leaves the query out of everything but the similarity,
            which is what carries over to names that were never trained on.
        objectness_dim: hidden width of the text-free objectness term; 0 turns it off.
    """

    embed_dim: int
    affinity_dim: int = 0
    text_rank: int = 0
    objectness_dim: int = 0

    def __post_init__(self) -> None:
        check_count("embed_dim", self.embed_dim, at_least=1)
        check_count("affinity_dim", self.affinity_dim, at_least=0)
        check_count("text_rank", self.text_rank, at_least=0)
        check_count("objectness_dim", self.objectness_dim, at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a relevance head is trained.

    Args:
        epochs: passes over the training set.
        lr: peak learning rate; it warms up over the first 5 % of the steps and falls to zero as a cosine.
        weight_decay: decoupled weight decay.
        optimizer: "sam", "asam", or "none" for the base optimizer alone.
        base_optimizer: name of the torch.optim class that makes the step.
        rho: radius of the ascent step, in parameter units (relative for "asam").
        loss: "listwise", "bce" or "mse"; the head is calibrated afterwards whichever it is.
        penalty_weight: weight of the robustness penalty; 0 turns it off.
        input_radius: standard deviation of the penalty's token noise, relative to the tokens' root mean square.
        seed: of data order, initial weights and noise.
    """

    epochs: int = 10
    lr: float = 3e-3
    weight_decay: float = 0.01
    optimizer: str = "sam"
    base_optimizer: str = "AdamW"
    rho: float = 0.05
    loss: str = "listwise"
    penalty_weight: float = 0.1
    input_radius: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, at_least=1)
        check_positive("lr", self.lr)
        check_nonnegative("weight_decay", self.weight_decay)
        check_nonnegative("rho", self.rho)
        check_nonnegative("penalty_weight", self.penalty_weight)
        check_nonnegative("input_radius", self.input_radius)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")
        base_class = getattr(torch.optim, self.base_optimizer, None)
        if not (isinstance(base_class, type) and issubclass(base_class, torch.optim.Optimizer)):
            raise ValueError(f"base_optimizer must name a class of torch.optim, got {self.base_optimizer!r}.")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
