"""Pictures of what a model has learned so far: validation samples, their answer and the model's, after every epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from arrcoc._files import save_picture
from arrcoc.data.sample import RelevanceSample, coverage
from arrcoc.model.relevance import RelevanceModel
from arrcoc.training.run_log import Record
from arrcoc.viz import contact_sheet, overlay

_COLUMNS = 4  # two samples a row


class Overlays:
    """Draws ``epoch_001.png``, ``epoch_002.png``, ...; a callback of training.

    Each sample is drawn twice, for its first query that is present: under the share of each token that is covered, and
    under the model's relevance. The level of relevance is fitted at the end of a run alone, so each map goes from its
    own minimum to its own maximum.

    Args:
        folder: where the pictures go.
        samples: what is drawn.
    """

    def __init__(self, folder: str | os.PathLike[str], samples: Sequence[RelevanceSample]) -> None:
        self.folder = Path(folder)
        self.samples = list(samples)

    @torch.no_grad()
    def __call__(self, model: RelevanceModel, record: Record) -> None:
        """Draw one sheet."""
        tiles = [tile for sample in self.samples for tile in _tiles(model, sample)]
        if tiles:
            save_picture(self.folder / f"epoch_{int(record['epoch']):03d}.png", contact_sheet(tiles, columns=_COLUMNS))


def _tiles(model: RelevanceModel, sample: RelevanceSample) -> list[tuple[Image.Image, str]]:
    present = sample.masks.flatten(1).any(-1).nonzero().flatten().tolist()
    number = present[0] if present else 0
    query = sample.queries[number]
    tokens = model.multiscale.encode(model, sample.image[None].to(model.backbone.device), shape=(1, 1))
    logits = model.compute_logits(tokens, model.encode_text([query])[None])[0, 0]
    pixels = (sample.image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    photo = Image.fromarray(pixels.cpu().numpy())
    answer = coverage(sample.masks[number], tokens.grid).unflatten(0, tokens.grid)
    return [
        (overlay(photo, answer), f"{query}: answer"),
        (overlay(photo, _from_0_to_1(logits).unflatten(0, tokens.grid)), f"{query}: model"),
    ]


def _from_0_to_1(values: Tensor) -> Tensor:
    low, high = values.float().cpu().aminmax()
    return ((values.float().cpu() - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
