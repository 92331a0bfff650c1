"""Training a relevance head, and the last blocks of its backbone if asked, with sharpness-aware minimization."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from arrcoc.config import TrainConfig
from arrcoc.model.relevance import RelevanceModel
from arrcoc.training.checkpoint import load_checkpoint, remove_leftovers, save_checkpoint
from arrcoc.training.distributed import Ranks
from arrcoc.training.part import Batch
from arrcoc.training.run_log import JsonLines, Record
from arrcoc.training.state import TrainingState

Evaluate = Callable[[RelevanceModel], Record]
Callback = Callable[[RelevanceModel, Record], None]

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


def train_relevance_model_with_sam(
    model: RelevanceModel,
    train_loader: Iterable[Batch],
    epochs: int = 100,
    rho: float = 0.05,
    *,
    config: TrainConfig | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> list[Record]:
    """Train a relevance model, then calibrate its head on one more pass over the loader.

    Started by torchrun (see ``arrcoc.training.distributed``), every rank calls this with its part of every batch; the
    result is that of one process on the whole batches, up to rounding, and the same on all ranks.

    Args:
        model: with a head. With ``config.train_blocks`` its backbone is replaced by a copy that owns those blocks;
            otherwise only the head is trained.
        train_loader: batches (images [B, 3, H, W] in [0, 1] or VisualTokens, texts, targets in [0, 1]): one text an
            image with targets [B, N], or Q texts an image with targets [B, Q, N].
        epochs: passes over the loader.
        rho: radius of SAM's ascent step.
        config: the other settings; its epochs and rho are replaced by the arguments.
        evaluate: called after every epoch with the model as it would be kept; what it returns is logged. All ranks call
            it, and the first rank's answer counts.
        callbacks: called by the first rank after every epoch, once it is logged, with the model and the log entry.
        output: folder for ``checkpoint.pt`` (after every epoch, atomic), ``log.jsonl`` and the trained model, new or
            without a checkpoint unless the run is resumed; nothing is written if None.
        resume: go on from the checkpoint in ``output``; the result is that of the uninterrupted run, bit for bit, if
            the loader's batches depend on the epoch alone (it is told by ``set_epoch``, if it has one).
        progress: show a progress bar.

    Returns:
        One dict an epoch: epoch, loss (of the first pass, before each step), penalty, lr, sharpness (of SAM, on the
        epoch's first finite batch: the rise of the loss within rho), num_skipped (steps without a finite gradient) and
        what ``evaluate`` returned.

    Raises:
        ValueError: for a model without head, an empty loader, or a checkpoint of other settings.
        FileExistsError: if output holds the checkpoint of a run and resume is False.
        FloatingPointError: if a gradient is not finite and ``config.nonfinite`` is "raise", or a number of an epoch's
            log entry is not.
    """
    config = replace(config or TrainConfig(), epochs=epochs, rho=rho)
    if model.head is None:
        raise ValueError("model must have a head to train, got one without (zero-shot).")
    if resume and output is None:
        raise ValueError("output must be given to resume.")
    if output is not None and not resume:
        check_is_new(Path(output))
    ranks = Ranks()
    state = TrainingState(model, config, _num_batches(train_loader), ranks)
    folder = None if output is None else Path(output)
    if resume and folder is not None:
        state.restore(load_checkpoint(folder / CHECKPOINT))
    writes = folder is not None and ranks.is_writer
    log = None
    if folder is not None and writes:
        remove_leftovers(folder / CHECKPOINT)
        log = JsonLines(folder / LOG, state.history)
    while not state.is_over:
        record = state.train_epoch(train_loader, progress and ranks.is_writer)
        with state.weights_to_keep():
            if evaluate is not None:
                record |= ranks.broadcast(evaluate(model))
            state.finish_epoch(record)
        if folder is not None and log is not None:
            save_checkpoint(folder / CHECKPOINT, state.state_dict())
            log.append(record)
        if ranks.is_writer and callbacks:
            with state.weights_to_keep():
                for callback in callbacks:
                    callback(model, record)
    state.finish(train_loader)
    if folder is not None and writes:
        model.save_pretrained(folder)
    return state.history


def check_is_new(folder: Path) -> None:
    """Refuse a folder with a run in it, which another one would write over.

    Raises:
        FileExistsError: if it holds a checkpoint.
    """
    if (folder / CHECKPOINT).exists():
        raise FileExistsError(f"output {str(folder)!r} holds a run: resume it, or choose another folder.")


def _num_batches(loader: Iterable[Batch]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError("train_loader must have a length, for the learning-rate schedule.") from error
