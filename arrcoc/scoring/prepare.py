"""Pictures decoded and resized in worker processes, and put together in batches of one shape.

Eight-bit pixels come back from the workers: the very ones that `RelevanceScorer` would divide by 255.

Axes: H and W picture height and width.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from arrcoc.backbones.base import Backbone
from arrcoc.images import ImageInput, load_image, to_pixels


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Picture:
    """A picture's number in the stream, its name and its queries."""

    number: int
    name: str
    queries: tuple[str, ...]

    def broken(self, reason: str, error: Exception) -> Broken:
        """The same picture as one that cannot be scored."""
        return Broken(number=self.number, name=self.name, queries=self.queries, reason=reason, error=error)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Task(_Picture):
    """A picture to prepare."""

    image: ImageInput


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Prepared(_Picture):
    """A picture as the backbone takes it: uint8 [H, W, 3] for each scale."""

    levels: tuple[NDArray[np.uint8], ...]

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """What pictures of one batch have in common."""
        return tuple(level.shape for level in self.levels)


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Broken(_Picture):
    """A picture that cannot be scored, and why: in full, and in a few words to count it under."""

    reason: str
    error: Exception


class _Pictures(Dataset[Prepared | Broken]):
    """Decodes what the sampler hands over: the sampler's "indices" are the tasks themselves."""

    def __init__(self, backbone: Backbone, scales: Sequence[float]) -> None:
        self.sizes = _without_weights(backbone)
        self.scales = tuple(scales)

    def __getitem__(self, task: Task | Broken) -> Prepared | Broken:
        if isinstance(task, Broken):
            return task
        try:
            picture = load_image(task.image)
        except (ValueError, OSError) as error:
            return task.broken(
                "picture " + ("missing" if isinstance(error, FileNotFoundError) else "unreadable"), error
            )
        sizes = [self.sizes.input_size(picture.height, picture.width, scale=scale) for scale in self.scales]
        levels = tuple(to_pixels(picture, size) for size in sizes)
        return Prepared(number=task.number, name=task.name, queries=task.queries, levels=levels)


class _Stream(Sampler[Any]):
    """Tasks in the order in which they come, read as the workers ask for them."""

    def __init__(self, tasks: Iterable[Task | Broken]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)


def prepare(
    tasks: Iterable[Task | Broken], backbone: Backbone, scales: Sequence[float], *, num_workers: int
) -> Generator[Prepared | Broken, None, None]:
    """The pictures of a stream, decoded and resized for a backbone at some scales, in the order of the stream.

    Args:
        tasks: read two ahead for each worker.
        backbone: says to what size a picture is resized; its weights stay here.
        scales: resize factors.
        num_workers: processes that decode; 0 decodes here.
    """
    loader = DataLoader(
        _Pictures(backbone, scales),
        sampler=_Stream(tasks),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_end_with_parent,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # seeds of workers, which draw nothing, are not taken from the global generator
    )
    yield from loader


def batches_of_one_shape(
    pictures: Iterable[Prepared], *, batch_size: int, max_waiting: int
) -> Iterator[list[Prepared]]:
    """Group pictures by shape, holding back no more than ``max_waiting`` of them.

    A shape with ``batch_size`` pictures goes at once. When ``max_waiting`` pictures wait, the shape that has the most
    goes, of equals the one that has waited longest. At the end the rest goes, in order of arrival.
    """
    waiting: dict[Any, list[Prepared]] = {}
    for picture in pictures:
        waiting.setdefault(picture.shape, []).append(picture)
        if len(waiting[picture.shape]) == batch_size:
            yield waiting.pop(picture.shape)
        elif sum(map(len, waiting.values())) >= max_waiting:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _without_weights(backbone: Backbone) -> Backbone:
    """The backbone's plain settings alone, which is all that ``input_size`` reads and all that a worker gets."""
    light = copy.copy(backbone)
    plain = (bool, int, float, str, tuple, os.PathLike)
    light.__dict__ = {name: value for name, value in vars(backbone).items() if isinstance(value, plain)}
    return light


def _end_with_parent(worker: int) -> None:
    """Let this worker end with the process that it works for.

    If that is killed, a worker that hands over a picture at this moment would wait for ever for somebody to take it.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(picture: Any) -> Any:
    """Arrays come through a pipe as they are; tensors would each hold a file descriptor."""
    return picture
