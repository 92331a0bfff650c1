"""The state of a training run: what an epoch changes, a checkpoint holds and a resume takes up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arrcoc.config import TrainConfig
from arrcoc.model.relevance import RelevanceModel
from arrcoc.training.averaging import WeightAverage, set_values
from arrcoc.training.calibration import calibrate_head
from arrcoc.training.distributed import Ranks
from arrcoc.training.part import Batch, Prepared, TrainedPart, trainable
from arrcoc.training.run_log import Record
from arrcoc.training.schedule import lr_factor
from arrcoc.training.stopping import BestEpoch
from arrcoc.training.update import Update


class TrainingState:
    """One training run.

    Args:
        model: trained in place.
        config: the settings.
        num_batches: batches an epoch.
        ranks: the processes that share each batch.
    """

    def __init__(self, model: RelevanceModel, config: TrainConfig, num_batches: int, ranks: Ranks) -> None:
        assert model.head is not None
        self.model, self.head, self.config, self.ranks = model, model.head, config, ranks
        # What a resume must share with the run that it goes on with.
        self.identity: dict[str, Any] = {
            "config": asdict(config),
            "head_config": asdict(self.head.config),
            "backbone": model.backbone.fingerprint(),
            "mode": model.backbone.mode,
            "num_batches": num_batches,
            "num_ranks": ranks.num_ranks,
        }
        groups: list[dict[str, Any]] = [{"params": list(self.head.parameters())}]
        if config.train_blocks:
            if model.multiscale.scales != (1.0,):
                raise ValueError(f"scales must be (1.0,) to train blocks, got {model.multiscale.scales!r}.")
            model.backbone = trainable(model.backbone, config.train_blocks)
            blocks = [param for param in model.backbone.parameters() if param.requires_grad]
            groups.append({"params": blocks, "lr": config.lr * config.backbone_lr_factor})
        model.backbone.eval()
        self.part = TrainedPart(model, config, ranks)
        self.update = Update(self.part, groups, config, ranks)
        self.params = self.update.params
        ranks.broadcast_(self.params)
        num_steps = max(1, config.epochs * -(-num_batches // config.accumulation_steps))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.update.optimizer,
            lambda step: lr_factor(
                step / num_steps, warm_up=config.warm_up, shape=config.schedule, floor=config.min_lr / config.lr
            ),
        )
        self.average = WeightAverage(self.params, config.ema_decay) if config.ema_decay else None
        patience = config.patience
        self.best = None if patience is None else BestEpoch(config.monitor, patience, config.min_delta)
        self.history: list[Record] = []

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch is done, or the score has stopped rising."""
        return self.epoch >= self.config.epochs or (self.best is not None and self.best.is_over)

    def train_epoch(self, loader: Iterable[Batch], progress: bool) -> Record:
        """One pass over the loader; its log entry."""
        _set_epoch(loader, self.epoch)
        self.head.train()
        noise = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        skipped = self.update.num_skipped
        finite: list[tuple[float, float]] = []
        first: list[Prepared] | None = None  # micro-batches of the first step whose loss is finite
        title = f"epoch {self.epoch + 1}/{self.config.epochs}"
        bar = tqdm(loader, desc=title, unit="batch", disable=not progress, leave=False)
        num_steps = 0
        for batches in _groups(bar, self.config.accumulation_steps):
            prepared = [p for p in (self.part.prepare(batch, noise) for batch in batches) if p is not None]
            result = self.update(prepared)
            num_steps += 1
            self.scheduler.step()
            if self.average is not None:
                with self._clean_weights():
                    self.average.update()
            if all(map(math.isfinite, result)):
                finite.append(result)
                first = prepared if first is None else first
        if not num_steps:
            raise ValueError("train_loader must yield at least one batch, got none.")
        if first is None:
            raise FloatingPointError(f"no loss of epoch {self.epoch + 1} is finite.")
        loss, penalty = torch.tensor(finite, dtype=torch.float64).mean(0).tolist()
        self.head.eval()
        with self._clean_weights():
            sharpness = self.update.sharpness(first)
        return {
            "epoch": self.epoch + 1,
            "loss": loss,
            "penalty": penalty,
            "lr": self.update.optimizer.param_groups[0]["lr"],
            "sharpness": sharpness,
            "num_skipped": self.update.num_skipped - skipped,
        }

    @contextmanager
    def weights_to_keep(self) -> Iterator[None]:
        """The weights are those that would be kept were this the last epoch: clean, and averaged if asked."""
        with self._clean_weights(), ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.applied())
            yield

    def finish_epoch(self, record: Record) -> None:
        """Take in the log entry of an epoch, within `weights_to_keep`.

        Raises:
            FloatingPointError: for a number that is not finite, which neither a log nor a comparison can take.
        """
        if bad := {name: value for name, value in record.items() if not math.isfinite(value)}:
            raise FloatingPointError(f"the log entry of epoch {self.epoch + 1} must be finite, got {bad}.")
        if self.best is not None:
            self.best.update(record, self.params)
        self.history.append(record)

    def finish(self, loader: Iterable[Batch]) -> None:
        """Take the weights to keep for good, those of the best epoch if asked, and calibrate the head."""
        with self.weights_to_keep():
            kept = [param.detach().clone() for param in self.params]
        set_values(self.params, self.best.values if self.best is not None else kept)
        self._calibrate(loader)

    @torch.no_grad()
    def _calibrate(self, loader: Iterable[Batch]) -> None:
        """Fit the level of the logits, which a ranking loss leaves free, on the batches of the last epoch."""
        _set_epoch(loader, self.config.epochs - 1)
        part = TrainedPart(self.model, replace(self.config, penalty_weight=0.0), self.ranks)
        seen: list[tuple[Tensor, Tensor]] = []
        for batch in loader:
            prepared = part.prepare(batch, torch.Generator())
            own = None
            if prepared is not None:
                own = self._finite(self.head.ranking(*part.head_inputs(prepared)[0]), prepared.targets)
            seen += [pair for pair in self.ranks.gather(own) if pair is not None]
        with torch.enable_grad():
            calibrate_head(self.head, seen)
        self.ranks.broadcast_(list(self.head.parameters()))

    def _finite(self, ranking_BQN: Tensor, targets_BQN: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and targets of the queries for which all are finite, [1, number of them, N]."""
        finite_BQ = (ranking_BQN.isfinite() & targets_BQN.isfinite()).all(-1)
        if self.config.nonfinite == "raise" and not bool(finite_BQ.all()):
            raise FloatingPointError("the scores that the head is calibrated with must be finite.")
        return ranking_BQN[finite_BQ][None], targets_BQN[finite_BQ][None]

    @contextmanager
    def _clean_weights(self) -> Iterator[None]:
        """Methods that rest at a perturbed point between steps (MSAM) step back from it within the block."""
        at_weights = getattr(self.update.optimizer, "at_weights", None)
        with ExitStack() as stack:
            if at_weights is not None:
                stack.enter_context(at_weights())
            yield

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, outside `weights_to_keep`."""
        return {
            **self.identity,
            "history": self.history,
            "head": self.head.state_dict(),
            "blocks": self.model.backbone.trained_state_dict() if self.config.train_blocks else {},
            "optimizer": self.update.optimizer.state_dict(),
            "scaler": None if self.update.scaler is None else self.update.scaler.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "average": None if self.average is None else self.average.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: if it is of another run, naming what differs.
        """
        _check_same_run(self.identity, state)
        self.head.load_state_dict(state["head"])
        if self.config.train_blocks:
            self.model.backbone.load_trained(state["blocks"])
        self.update.optimizer.load_state_dict(state["optimizer"])
        if self.update.scaler is not None:
            self.update.scaler.load_state_dict(state["scaler"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.best is not None:
            self.best.load_state_dict(state["best"], self.params)
        self.history = state["history"]


def _check_same_run(expected: dict[str, Any], found: dict[str, Any], where: str = "") -> None:
    for name, value in expected.items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() <= other.keys():
            _check_same_run(value, other, f"{where}{name}.")
        elif other != value:
            raise ValueError(
                f"the checkpoint's {where}{name} must be {value!r}, got {other!r}: resume with the settings of its run."
            )


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _set_epoch(loader: Iterable[Batch], epoch: int) -> None:
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
