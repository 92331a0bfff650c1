"""A training run from its settings: data, model, training, and a folder that says how it came about.

The folder holds ``run.json`` (the settings, the backbone's fingerprint, the versions of the packages, what was read and
skipped), ``splits.json`` (the pictures of each split, where they have names), and what training leaves: the model, the
checkpoint and the log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from arrcoc._files import write_json
from arrcoc.config import HeadConfig
from arrcoc.data.photos import sample_photos
from arrcoc.data.sample import RelevanceSample
from arrcoc.data.spec import load_data
from arrcoc.data.splits import Splits, read_splits, write_splits
from arrcoc.evaluation.orientation import OrientationEstimate, check_first
from arrcoc.model.head import RelevanceHead
from arrcoc.model.relevance import RelevanceModel
from arrcoc.scorer import load_scorer
from arrcoc.settings import differences, to_dict, updated
from arrcoc.training.checkpoint import load_checkpoint
from arrcoc.training.distributed import Ranks, device_of_rank
from arrcoc.training.images import ImageLoader
from arrcoc.training.overlays import Overlays
from arrcoc.training.part import trainable
from arrcoc.training.run_config import RunConfig
from arrcoc.training.run_log import Record, TensorBoard
from arrcoc.training.tokens import TokenLoader, encode_samples
from arrcoc.training.trainer import CHECKPOINT, Callback, check_is_new, train_relevance_model_with_sam
from arrcoc.training.validation import token_average_precision

Samples = Iterable[RelevanceSample]
Loader = TokenLoader | ImageLoader

RUN_FORMAT = "arrcoc-run-1"
_RUN, _SPLITS = "run.json", "splits.json"
_PACKAGES = ("arrcoc", "torch", "torchvision", "open_clip_torch", "transformers", "timm", "numpy")
_SCORES = ("ap_held-out", "ap_photos")  # of validation pictures, and of the few that ship with us
# What may change between the parts of a run: it does not touch the result.
_FREE = {"output", "device", "tensorboard", "overlays", "loader.workers", "loader.cache"}


@dataclass(frozen=True)
class RunResult:
    """What a run gives: its log, and the validation scores before it (zero-shot) and after it (of the saved model)."""

    history: list[Record]
    zero_shot: Record
    trained: Record


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[Record], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> RunResult:
    """Train a model as the settings say; on every rank, if torchrun started several (within ``process_group``).

    Args:
        config: the settings.
        resume: go on from the checkpoint in the output folder.
        progress: show progress bars.
        report: called with the log entry of every epoch, by the rank that writes.
        note: called by that rank with what was skipped in the data and why, before training, if anything was.

    Raises:
        FileNotFoundError: if there is nothing to resume, or no data.
        FileExistsError: if the output folder holds a run and resume is False.
        ValueError: if the settings do not fit the data, the model or the run that is resumed.

    Warns:
        OrientationWarning: if the first validation pictures contradict the sign that the backbone declares.
    """
    ranks, folder = Ranks(), Path(config.output)
    progress = progress and ranks.is_writer
    last_epoch = _check_resumable(config) if resume else 0
    if not resume:
        check_is_new(folder)
    if config.train.patience is not None and config.train.monitor not in _SCORES:
        raise ValueError(f"monitor must be one of {', '.join(_SCORES)}, got {config.train.monitor!r}.")
    data = _load(config)
    train, validation = data["train"], data["val"]
    splits = _splits(config, data)
    if resume and splits is not None and splits != read_splits(folder / _SPLITS):
        raise ValueError(f"the pictures of {config.data} must be those of {folder / _SPLITS} to resume the run.")
    model = _model(config)
    sign = check_first(model, validation) if ranks.is_writer else None
    loaders = _Loaders(config, model, ranks, progress)
    judged = dict(zip(_SCORES, map(loaders.judging, (validation, sample_photos(absent_queries=2))), strict=True))
    loader = loaders.training(train)
    if ranks.is_writer:
        # Everything that can be refused has been; streams know what they skipped by now.
        write_json(folder / _RUN, _description(config, model, {"train": train, "val": validation}, sign))
        if splits is not None:
            write_splits(folder / _SPLITS, splits)
        for split, samples in (("train", train), ("val", validation)):
            skips = getattr(samples, "skips", None)
            if note is not None and skips is not None and (skips.broken or skips.left_out):
                note("\n".join(f"{split}: {line}" for line in skips.summary().splitlines()))

    def evaluate(model: RelevanceModel) -> Record:
        return {name: token_average_precision(model, samples) for name, samples in judged.items()}

    zero_shot = evaluate(model.zero_shot())
    callbacks: list[Callback] = []
    if report is not None:
        callbacks.append(lambda _, record: report(record))
    if config.overlays:
        callbacks.append(Overlays(folder / "overlays", list(islice(validation, config.overlays))))
    if config.tensorboard and ranks.is_writer:
        callbacks.append(TensorBoard(folder / "tensorboard", last_epoch=last_epoch))
    history = train_relevance_model_with_sam(
        model,
        loader,
        epochs=config.train.epochs,
        rho=config.train.rho,
        config=config.train,
        evaluate=evaluate,
        callbacks=callbacks,
        output=folder,
        resume=resume,
        progress=progress,
    )
    return RunResult(history, zero_shot, evaluate(model))


def read_run(folder: Path) -> RunConfig:
    """The settings of the run in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if they are damaged, or of another version of this package.
    """
    path = folder / _RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(run, dict) or run.get("format") != RUN_FORMAT:
        raise ValueError(f"{path} must have format {RUN_FORMAT!r}.")
    return updated(RunConfig(), run["config"])


def _check_resumable(config: RunConfig) -> int:
    """Refuse a run that is not the one in the folder; epochs that it has done."""
    folder = Path(config.output)
    state = load_checkpoint(folder / CHECKPOINT)
    for name, (mine, saved) in differences(config, read_run(folder)).items():
        if name not in _FREE:
            raise ValueError(f"{name} must be {saved!r}, as in {folder / _RUN}, to resume that run, got {mine!r}.")
    return len(state["history"])


def _model(config: RunConfig) -> RelevanceModel:
    """The model to train, with the head to start from."""
    init = None if config.model.init == "none" else config.model.init
    device = device_of_rank(config.device)
    scales, mode = config.model.scales, config.model.mode
    model = load_scorer(config.model.backbone, head=init, device=device, mode=mode, scales=scales).model
    model.backbone.orientation = config.model.orientation or model.backbone.orientation
    if model.head is None:
        shape = HeadConfig(embed_dim=model.backbone.embed_dim, **vars(config.head))
        generator = torch.Generator().manual_seed(config.train.seed)
        model.head = RelevanceHead(shape, generator=generator).to(model.backbone.device)
    if config.train.train_blocks:
        model.backbone = trainable(model.backbone, config.train.train_blocks)
    return model


class _Loaders:
    """Makes loaders: of tokens where the backbone and the pictures stay as they are, of pictures otherwise."""

    def __init__(self, config: RunConfig, model: RelevanceModel, ranks: Ranks, progress: bool) -> None:
        self.config, self.model, self.progress = config, model, progress
        loader = config.loader
        self.batches: dict[str, Any] = {
            "batch_size": loader.batch_size,
            "num_queries": loader.num_queries,
            "seed": config.train.seed,
            "rank": ranks.rank,
            "num_ranks": ranks.num_ranks,
        }
        self.variants = loader.query_variants(config.reading.synonyms)

    def training(self, samples: Samples) -> Loader:
        augmentation = self.config.loader.augmentation()
        if augmentation is not None or self.config.train.train_blocks:
            return self._images(samples, augmentation=augmentation, query_variants=self.variants)
        return self._tokens(samples, query_variants=self.variants)

    def judging(self, samples: Samples) -> Loader:
        return self._images(samples) if self.config.train.train_blocks else self._tokens(samples)

    def _images(self, samples: Samples, **options: Any) -> ImageLoader:
        if not isinstance(samples, Sequence):
            raise ValueError("data must not be a stream where pictures are seen anew in every epoch.")
        workers = self.config.loader.workers
        return ImageLoader.for_model(self.model, samples, workers=workers, **self.batches, **options)

    def _tokens(self, samples: Samples, **options: Any) -> TokenLoader:
        workers = self.config.loader.workers if isinstance(samples, Sequence) else 0
        return encode_samples(
            self.model,
            samples,
            progress=self.progress,
            cache=self.config.loader.cache,
            workers=workers,
            **self.batches,
            **options,
        )


def _load(config: RunConfig) -> dict[str, Samples]:
    """The pictures of each split; those of "test" are not trained or judged on, and have to be named all the same."""
    reading = replace(config.reading, seed=config.train.seed)
    data: dict[str, Samples] = {split: load_data(config.data, reading, split=split) for split in reading.shares}
    for split in ("train", "val"):
        samples = data[split]
        if isinstance(samples, Sequence) and not len(samples):
            sizes = ", ".join(f"{len(part)} in {name}" for name, part in data.items() if isinstance(part, Sequence))
            raise ValueError(f"data must have pictures for training and validation, got {sizes}: choose other splits.")
    return data


def _splits(config: RunConfig, data: dict[str, Samples]) -> Splits | None:
    """The names of the pictures of each split, if they have some."""
    names = {split: getattr(samples, "names", None) for split, samples in data.items()}
    if None in names.values():
        return None
    named = {split: tuple(some) for split, some in names.items() if some is not None}
    return Splits(seed=config.reading.split_seed, shares=config.reading.shares, names=named)


def _description(
    config: RunConfig, model: RelevanceModel, read: dict[str, Samples], sign: OrientationEstimate | None
) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "format": RUN_FORMAT,
        "config": to_dict(config),
        "backbone": {"spec": backbone.spec, "mode": backbone.mode, "fingerprint": backbone.fingerprint()},
        "orientation": {"declared": backbone.orientation, "masks say": None if sign is None else asdict(sign)},
        "data": {split: _read(samples) for split, samples in read.items()},
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
    }


def _read(samples: Samples) -> dict[str, Any]:
    """How many samples were read, and what was not used, by reason."""
    counts: dict[str, Any] = {"num_samples": len(samples)} if isinstance(samples, Sequence) else {}
    skips = getattr(samples, "skips", None)
    return counts if skips is None else {**counts, "skipped": dict(skips.broken), "left_out": dict(skips.left_out)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
