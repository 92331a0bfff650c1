"""One part of a run: pictures in batches of one shape through the tower, scores in the order of the pictures.

Axes: Q queries, h and w grid height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arrcoc.images import as_images
from arrcoc.model.allocation import keep_top, num_tokens_of
from arrcoc.scorer import RelevanceScorer
from arrcoc.scoring.prepare import Broken, Prepared, batches_of_one_shape
from arrcoc.scoring.state import PartDigest, Skipped
from arrcoc.scoring.tables import Layout, Score

_WAITING_BATCHES = 8  # of pictures held back until their shape fills a batch


class Part:
    """The scores of one part while they are made.

    Args:
        scorer: scores.
        budget: of the tokens to keep; None if the layout is without.
        layout: what a score holds.
        on_error: "raise" or "skip".

    Attributes:
        num_pictures: how many pictures came, skipped ones included.
        skipped: those that were not scored.
        digest: of all of them.
    """

    def __init__(self, scorer: RelevanceScorer, budget: int | float | None, layout: Layout, on_error: str) -> None:
        self.scorer, self.budget, self.layout, self.on_error = scorer, budget, layout, on_error
        self.num_pictures = 0
        self.digest = PartDigest()
        self.skipped: list[Skipped] = []
        self._scores: dict[int, list[Score]] = {}

    def in_order(self) -> list[Score]:
        """The scores in the order of the pictures, and of the queries of each."""
        return [score for number in sorted(self._scores) for score in self._scores[number]]

    def score(self, pictures: Iterable[Prepared | Broken], batch_size: int, tick: Callable[[int], object]) -> None:
        """Score the pictures; ``tick`` is told how many are done, from time to time."""
        sound = self._sound(pictures, tick)
        for batch in batches_of_one_shape(sound, batch_size=batch_size, max_waiting=_WAITING_BATCHES * batch_size):
            pixels = zip(*(picture.levels for picture in batch), strict=True)
            levels = {s: as_images(np.stack(level)) for s, level in zip(self.scorer.scales, pixels, strict=True)}
            logits = self.scorer.score_images(levels, [picture.queries for picture in batch])
            for picture, maps in zip(batch, logits, strict=True):
                self._add(picture, maps)
            tick(len(batch))

    def _sound(self, pictures: Iterable[Prepared | Broken], tick: Callable[[int], object]) -> Iterator[Prepared]:
        for picture in pictures:
            self.num_pictures += 1
            self.digest.add(picture.name, picture.queries)
            if isinstance(picture, Prepared):
                yield picture
            else:
                self._skip(picture)
                tick(1)

    def _skip(self, broken: Broken) -> None:
        if self.on_error == "raise":
            if broken.name in str(broken.error):
                raise broken.error
            raise ValueError(f"{broken.name}: {broken.error}") from broken.error
        self.skipped.append(
            Skipped(number=broken.number, image=broken.name, reason=broken.reason, error=str(broken.error))
        )

    def _add(self, picture: Prepared, logits_Qhw: Tensor) -> None:
        if not bool(torch.isfinite(logits_Qhw).all()):
            raise FloatingPointError(f"{picture.name}: the relevance logits are not finite.")
        kept: list[Any] = [None] * len(picture.queries)
        if self.budget is not None:
            try:
                num_kept = num_tokens_of(self.budget, logits_Qhw[0].numel())
            except ValueError as error:  # more than this picture's grid has
                self._skip(picture.broken("budget above the grid", error))
                return
            kept = [keep_top(logits.flatten(), num_kept).keep_indices.int().numpy() for logits in logits_Qhw]
        self._scores[picture.number] = [
            Score(
                number=picture.number,
                image=picture.name,
                query=query,
                relevance=torch.sigmoid(logits).numpy(),
                logits=logits.numpy() if self.layout.logits else None,
                kept=indices,
            )
            for query, logits, indices in zip(picture.queries, logits_Qhw, kept, strict=True)
        ]
