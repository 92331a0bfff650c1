"""Small pictures, masks and files that the tests of the readers share."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from arrcoc.data.sample import RelevanceSample

HEIGHT, WIDTH = 40, 60


def noise(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def rectangle(top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def save(path: Path, picture: Image.Image | torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(picture.numpy()) if isinstance(picture, torch.Tensor) else picture).save(path)
    return path


def assert_same(samples: Iterable[RelevanceSample], expected: Sequence[RelevanceSample]) -> None:
    samples = list(samples)
    assert [(sample.name, sample.queries) for sample in samples] == [(one.name, one.queries) for one in expected]
    for sample, one in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample.image, one.image, rtol=0, atol=0)
        torch.testing.assert_close(sample.masks, one.masks)


def samples(count: int = 4) -> list[RelevanceSample]:
    """Pictures with a cup, a plate or none, and one query that is always absent."""
    made = []
    for number in range(count):
        pixels = torch.from_numpy(np.array(noise(number))).permute(2, 0, 1).float() / 255
        masks = torch.stack(
            [rectangle(0, number, 20, 30 + number), rectangle(20, 0, 35, 20), torch.zeros(HEIGHT, WIDTH).bool()]
        )
        texts = ("a red cup", "plate", "no/such: thing.")
        made.append(RelevanceSample(image=pixels, queries=texts, masks=masks, name=f"folder/{number}.jpg"))
    return made
