"""Training a relevance head with sharpness-aware minimization; the backbone is frozen.

Tokens are computed once a batch (or come ready from a TokenLoader), and both passes of SAM run on the head alone.

Axes: B batch, Q queries, N tokens, D embedding width.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arrcoc._files import write_text
from arrcoc.config import TrainConfig
from arrcoc.model.head import RelevanceHead
from arrcoc.model.relevance import RelevanceModel
from arrcoc.model.robustness import perturb_tokens, relevance_change
from arrcoc.model.similarity import similarity_logits
from arrcoc.tokens import VisualTokens
from arrcoc.training.calibration import calibrate_head
from arrcoc.training.checkpoint import load_checkpoint, save_checkpoint
from arrcoc.training.losses import Loss, relevance_loss
from sam_core import ASAM, SAM, compute_sam_sharpness

Texts = Sequence[str] | Sequence[Sequence[str]]
Batch = tuple[Tensor | VisualTokens, Texts, Tensor]
Evaluate = Callable[[RelevanceModel], dict[str, float]]

_WARM_UP = 0.05  # share of the steps
_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class _HeadInputs:
    """What the head sees of a batch: tokens [B, N, D], queries [B, Q, D], similarity logits [B, Q, N]."""

    patches: Tensor
    queries: Tensor
    similarity: Tensor

    def __iter__(self) -> Any:
        return iter((self.patches, self.queries, self.similarity))


def train_relevance_model_with_sam(
    model: RelevanceModel,
    train_loader: Iterable[Batch],
    epochs: int = 100,
    rho: float = 0.05,
    *,
    config: TrainConfig | None = None,
    evaluate: Evaluate | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train the head of a relevance model, then calibrate it on one more pass over the loader.

    Args:
        model: with a head; only the head is trained.
        train_loader: batches (images [B, 3, H, W] in [0, 1] or VisualTokens, texts, targets in [0, 1]): one text an
            image with targets [B, N], or Q texts an image with targets [B, Q, N].
        epochs: passes over the loader.
        rho: radius of SAM's ascent step.
        config: the other settings; its epochs and rho are replaced by the arguments.
        evaluate: called after every epoch; what it returns is logged.
        output: folder for ``checkpoint.pt`` (after every epoch, atomic), ``log.jsonl`` and the trained model; nothing
            is written if None.
        resume: go on from the checkpoint in ``output``; the result is that of the uninterrupted run, bit for bit, if
            the loader's batches depend on the epoch alone (it is told by ``set_epoch``, if it has one).
        progress: show a progress bar.
        report: called with the log entry of every epoch, e.g. to print it.

    Returns:
        One dict an epoch: epoch, loss (at the weights, not at their perturbation), penalty, lr, sharpness (of SAM, on
        the epoch's first batch: the rise of the loss within rho) and what ``evaluate`` returned.

    Raises:
        ValueError: for a model without head, an empty loader, or a checkpoint of other settings.
        FloatingPointError: if a gradient is not finite.
    """
    config = replace(config or TrainConfig(), epochs=epochs, rho=rho)
    if model.head is None:
        raise ValueError("model must have a head to train, got one without (zero-shot).")
    if resume and output is None:
        raise ValueError("output must be given to resume.")
    run = _Run(model, model.head, config, _num_batches(train_loader))
    folder = None if output is None else Path(output)
    if resume and folder is not None:
        run.restore(load_checkpoint(folder / _CHECKPOINT))
    model.backbone.eval()
    while run.epoch < config.epochs:
        model.head.train()
        record = run.train_epoch(train_loader, progress)
        model.head.eval()
        if evaluate is not None:
            record |= evaluate(model)
        run.history.append(record)
        if folder is not None:
            save_checkpoint(folder / _CHECKPOINT, run.state())
            write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in run.history))
        if report is not None:
            report(record)
    run.calibrate(train_loader)
    if folder is not None:
        model.save_pretrained(folder)
    return run.history


class _Run:
    """State of one training run."""

    def __init__(self, model: RelevanceModel, head: RelevanceHead, config: TrainConfig, num_batches: int) -> None:
        self.model, self.head, self.config = model, head, config
        self.loss: Loss = relevance_loss(config.loss)
        self.optimizer = _make_optimizer(head, config)
        num_steps = max(1, config.epochs * num_batches)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _schedule(step / num_steps))
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        # What a resume must share with the run that it goes on with.
        self.identity = {
            "config": asdict(config),
            "head_config": asdict(head.config),
            "backbone": model.backbone.fingerprint(),
            "num_batches": num_batches,
        }

    def state(self) -> dict[str, Any]:
        return {
            **self.identity,
            "epoch": self.epoch,
            "history": self.history,
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise ValueError(
                    f"the checkpoint's {name} must be {value}, got {state.get(name)}: resume the same run."
                )
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.epoch, self.history = state["epoch"], state["history"]

    def train_epoch(self, loader: Iterable[Batch], progress: bool) -> dict[str, float]:
        _set_epoch(loader, self.epoch)
        noise = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        totals, num_batches, first = torch.zeros(2, dtype=torch.float64), 0, None
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        for batch in tqdm(loader, desc=title, unit="batch", disable=not progress, leave=False):
            inputs, noisy, targets = self._prepare(batch, noise)
            totals += torch.tensor(self._step(inputs, noisy, targets), dtype=torch.float64)
            first = first or (inputs, targets)
            num_batches += 1
        if first is None:
            raise ValueError("train_loader must yield at least one batch, got none.")
        self.epoch += 1
        loss, penalty = (totals / num_batches).tolist()
        sharpness = compute_sam_sharpness(self.head, self.loss, tuple(first[0]), first[1], rho=self.config.rho)
        return {
            "epoch": self.epoch,
            "loss": loss,
            "penalty": penalty,
            "lr": self.optimizer.param_groups[0]["lr"],
            "sharpness": sharpness,
        }

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Batch]) -> None:
        """Fit the level of the logits, which a ranking loss leaves free, on the batches of the last epoch."""
        _set_epoch(loader, self.config.epochs - 1)
        noise = torch.Generator()  # the perturbed tokens are not used
        batches = (
            (self.head.ranking(*inputs), targets) for inputs, _, targets in (self._prepare(b, noise) for b in loader)
        )
        with torch.enable_grad():
            calibrate_head(self.head, batches)

    @torch.no_grad()
    def _prepare(self, batch: Batch, noise: torch.Generator) -> tuple[_HeadInputs, _HeadInputs | None, Tensor]:
        visual, texts, targets = batch
        tokens = visual if isinstance(visual, VisualTokens) else self.model.encode_image(visual)
        device = self.head.bias.device
        if isinstance(texts[0], str):
            texts, targets = [[text] for text in texts if isinstance(text, str)], targets[:, None]
        flat = [text for row in texts for text in row]
        queries = self.model.encode_text(flat).unflatten(0, (len(texts), -1)).to(device)
        if targets.shape != (len(tokens), queries.shape[1], tokens.num_tokens):
            raise ValueError(
                f"targets must have shape [{len(tokens)}, {queries.shape[1]}, {tokens.num_tokens}], "
                f"got {list(targets.shape)}."
            )
        noisy = None
        if self.config.penalty_weight > 0:
            # One draw for both passes of SAM, so that they see the same loss surface.
            noisy = self._head_inputs(perturb_tokens(tokens, self.config.input_radius, noise), queries)
        return self._head_inputs(tokens, queries), noisy, targets.to(device, queries.dtype)

    def _head_inputs(self, tokens: VisualTokens, queries: Tensor) -> _HeadInputs:
        return _HeadInputs(tokens.patches, queries, similarity_logits(self.model.backbone, tokens, queries))

    def _step(self, inputs: _HeadInputs, noisy: _HeadInputs | None, targets: Tensor) -> tuple[float, float]:
        """One update; loss and penalty at the weights before it."""
        seen: list[tuple[float, float]] = []

        def closure() -> Tensor:
            logits = self.head(*inputs)
            loss = self.loss(logits, targets)
            penalty = loss.new_zeros(())
            if noisy is not None:
                penalty = relevance_change(torch.sigmoid(logits), torch.sigmoid(self.head(*noisy)))
            total = loss + self.config.penalty_weight * penalty
            torch.autograd.backward(total)
            seen.append((loss.item(), penalty.item()))
            return total

        self.optimizer.step(closure)
        self.scheduler.step()
        return seen[0]


def _set_epoch(loader: Iterable[Batch], epoch: int) -> None:
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)


def _make_optimizer(head: RelevanceHead, config: TrainConfig) -> SAM:
    base = getattr(torch.optim, config.base_optimizer)
    method = ASAM if config.optimizer == "asam" else SAM
    # With rho = 0, SAM is the base optimizer and makes one pass.
    rho = 0.0 if config.optimizer == "none" else config.rho
    return method(head.parameters(), base, rho=rho, lr=config.lr, weight_decay=config.weight_decay)


def _schedule(progress: float) -> float:
    """Factor of the learning rate at a share of the run: linear warm-up, then a cosine to 0."""
    if progress < _WARM_UP:
        return (progress + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))))


def _num_batches(loader: Iterable[Batch]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError("train_loader must have a length, for the learning-rate schedule.") from error
