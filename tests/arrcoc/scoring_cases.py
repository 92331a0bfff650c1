"""Pictures and scorers that the tests of scoring share."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from arrcoc import FlatnessAwareMultiScale, RelevanceScorer
from models import tiny_model

SIZES = ((40, 20), (20, 40), (32, 32), (64, 16), (20, 40), (40, 20))  # (width, height)
QUERIES = ("red", "blue")


def tiny_scorer(scales: tuple[float, ...] = (1.0,)) -> RelevanceScorer:
    model = tiny_model()
    model.multiscale = FlatnessAwareMultiScale(scales)
    return RelevanceScorer(model)


def draw(number: int, size: tuple[int, int]) -> Image.Image:
    """A picture of 4 x 4 random colours."""
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def write_pictures(folder: Path, num: int) -> list[Path]:
    """Pictures of several sizes, 000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(num)]
    for number, (path, size) in enumerate(zip(paths, cycle(SIZES), strict=False)):
        draw(number, size).save(path)
    return paths


def map_of(record: dict[str, Any], column: str = "relevance") -> torch.Tensor:
    return torch.from_numpy(np.reshape(np.asarray(record[column], np.float32), record["grid"]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
