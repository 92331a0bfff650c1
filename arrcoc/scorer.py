"""What a user touches: load a scorer, score a picture for a text, keep the tokens that matter.

Axes: N tokens, Q queries, H and W picture height and width, h and w grid height and width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from arrcoc import viz
from arrcoc.assets import asset_path
from arrcoc.backbones import load_backbone
from arrcoc.images import load_image, to_tensor
from arrcoc.model.allocation import Allocation, keep_top, num_tokens_for_mass, num_tokens_of
from arrcoc.model.multiscale import FlatnessAwareMultiScale
from arrcoc.model.relevance import RelevanceModel
from arrcoc.tokens import VisualTokens, resample_maps

_BATCH = 16  # pictures that go through the tower together

# A path, a PIL picture, an array [H, W, 3] of uint8, or a float tensor [3, H, W] in [0, 1].
ImageLike = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RelevanceResult:
    """Relevance of every token of one picture for one query.

    Args:
        relevance: float32 [h, w] in [0, 1] on the CPU, over the whole picture: the share of each token that the
            query's object is expected to cover.
        logits: float32 [h, w]; relevance is their sigmoid.
        query: the text.
        image: the picture as it was scored (RGB, upright).
    """

    relevance: Tensor
    logits: Tensor
    query: str
    image: Image.Image

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens."""
        return (self.relevance.shape[0], self.relevance.shape[1])

    def keep(self, budget: int | float | None = None, *, mass: float | None = None) -> Allocation:
        """The most relevant tokens, exactly as many as asked for; deterministic.

        Args:
            budget: an int is a number of tokens, a float in (0, 1] a share of them (rounded as Python's round does).
            mass: keep the fewest tokens that hold this share, in (0, 1], of the total relevance.

        Raises:
            ValueError: unless exactly one of the two is given, and lies in its range.
        """
        if (budget is None) == (mass is None):
            raise ValueError(f"exactly one of budget and mass must be given, got budget={budget!r}, mass={mass!r}.")
        # Logits tell apart what rounds to the same relevance at 0 and 1.
        scores = self.logits.flatten()
        if mass is not None:
            return keep_top(scores, num_tokens_for_mass(self.relevance.flatten(), mass))
        assert budget is not None
        return keep_top(scores, num_tokens_of(budget, scores.numel()))

    def resample(self, grid: tuple[int, int]) -> RelevanceResult:
        """The same result on another grid (height, width), e.g. that of the model whose tokens are to be cut."""
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be (height, width) with both >= 1, got {grid!r}.")
        relevance = resample_maps(self.relevance.flatten()[None, None], self.grid, grid)[0, 0].unflatten(0, grid)
        logits = torch.logit(relevance, eps=1e-7)
        return RelevanceResult(relevance=torch.sigmoid(logits), logits=logits, query=self.query, image=self.image)

    def heatmap(self) -> NDArray[np.float32]:
        """Relevance at the picture's size, float32 [H, W] in [0, 1]."""
        return viz.heatmap(self.relevance, (self.image.height, self.image.width))

    def overlay(self, *, peak: float = 0.6) -> Image.Image:
        """The picture under its heat map, RGB.

        Args:
            peak: relevance that is drawn in full colour, > 0; the same for every map, so that maps compare.
        """
        return viz.overlay(self.image, self.relevance, peak=peak)


class RelevanceScorer:
    """Scores pictures for text queries.

    Args:
        model: the relevance model, in eval mode; its ``multiscale.scales`` are the scales that are fused.
    """

    def __init__(self, model: RelevanceModel) -> None:
        self.model = model.eval()

    @property
    def scales(self) -> tuple[float, ...]:
        """Resize factors that are fused; a scale s costs s * s times a single pass."""
        return self.model.multiscale.scales

    def preprocess(self, image: ImageLike, *, scale: float | None = None) -> Tensor:
        """The picture as the backbone takes it: float [1, 3, H, W] in [0, 1], the whole of it, resized.

        Args:
            image: the picture.
            scale: resize factor; the scorer's base scale (1 by default) if None.
        """
        return self._pixels(load_image(image), self.model.multiscale.base_scale if scale is None else scale)

    def _pixels(self, picture: Image.Image, scale: float) -> Tensor:
        size = self.model.backbone.input_size(picture.height, picture.width, scale=scale)
        return to_tensor(picture, size)[None].to(self.model.backbone.device)

    def _tokens(self, pictures: Sequence[Image.Image]) -> VisualTokens:
        """Tokens of pictures of one shape, all scales fused."""
        levels = {
            scale: self.model.encode_image(torch.cat([self._pixels(picture, scale) for picture in pictures]))
            for scale in self.scales
        }
        return self.model.multiscale.fuse(levels)

    @torch.no_grad()
    def encode_image(self, image: ImageLike) -> VisualTokens:
        """Visual tokens of one picture (B = 1), several scales fused."""
        return self._tokens([load_image(image)])

    def score(self, image: ImageLike, query: str) -> RelevanceResult:
        """Relevance of the picture's tokens for a text."""
        return self.score_queries(image, [query])[0]

    @torch.no_grad()
    def score_queries(self, image: ImageLike, queries: Sequence[str]) -> list[RelevanceResult]:
        """Relevance for several texts at the price of one pass of the vision tower."""
        _check_queries(queries)
        picture = load_image(image)
        text_1QD = self.model.encode_text(queries)[None]
        tokens = self._tokens([picture])
        logits_QN = self.model.compute_logits(tokens, text_1QD)[0]
        return _results(logits_QN, tokens.grid, queries, [picture] * len(queries))

    @torch.no_grad()
    def score_batch(self, images: Sequence[ImageLike], queries: Sequence[str]) -> list[RelevanceResult]:
        """Relevance for pairs of a picture and a text; pictures of one shape go through the tower together.

        Raises:
            ValueError: if there are not as many pictures as texts.
        """
        _check_queries(queries)
        if len(images) != len(queries):
            raise ValueError(f"images and queries must be pairs, got {len(images)} images and {len(queries)} queries.")
        if not queries:
            return []
        pictures = [load_image(image) for image in images]
        texts_BD = self.model.encode_text(queries)
        by_sizes: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            sizes = (self.model.backbone.input_size(picture.height, picture.width, scale=s) for s in self.scales)
            by_sizes.setdefault(tuple(sizes), []).append(number)
        results: dict[int, RelevanceResult] = {}
        chunks = [n[k : k + _BATCH] for n in by_sizes.values() for k in range(0, len(n), _BATCH)]
        for numbers in chunks:
            tokens = self._tokens([pictures[n] for n in numbers])
            logits_BN = self.model.compute_logits(tokens, texts_BD[numbers])
            group = _results(logits_BN, tokens.grid, [queries[n] for n in numbers], [pictures[n] for n in numbers])
            results |= dict(zip(numbers, group, strict=True))
        return [results[number] for number in range(len(pictures))]


def load_scorer(
    model: str | os.PathLike[str] = "embedded",
    *,
    head: str | os.PathLike[str] | None = "default",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    mode: str | None = None,
    scales: Sequence[float] = (1.0,),
) -> RelevanceScorer:
    """Load a scorer.

    Args:
        model: "embedded" (ships with the package, offline); a backbone as ``load_backbone`` takes it, e.g.
            "open_clip:ViT-B-16/openai"; or a folder written by ``RelevanceModel.save_pretrained``.
        head: "default" for the head that ships with the embedded model (other backbones have none and are zero-shot);
            None for zero-shot; or a folder written by ``save_pretrained`` for the same backbone.
        device: CPU if None.
        dtype: float32 if None.
        mode: how a backbone makes dense tokens; its default if None.
        scales: resize factors whose tokens are fused, whatever a saved model was saved with; several raise quality, at
            the cost of the sum of their squares.

    Raises:
        ValueError: for an unknown model, or a head trained on another backbone.
        FileNotFoundError: for a folder without a model.
    """
    multiscale = FlatnessAwareMultiScale(scales)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    folder = Path(model)
    if os.fspath(model) != "embedded" and (folder / "config.json").is_file():
        if mode is not None:
            raise ValueError(f"mode is fixed by the saved model {str(model)!r}, got {mode!r}.")
        loaded = RelevanceModel.from_pretrained(folder, **options)
        if head is None:
            loaded = loaded.zero_shot()
        elif head != "default":
            loaded = RelevanceModel.from_pretrained(head, backbone=loaded.backbone, **options)
    else:
        backbone = load_backbone(os.fspath(model), mode=mode, **options)
        if head == "default":
            head = asset_path("default_head") if backbone.spec == "embedded" else None
        loaded = (
            RelevanceModel(backbone)
            if head is None
            else RelevanceModel.from_pretrained(head, backbone=backbone, **options)
        )
    loaded.multiscale = multiscale
    return RelevanceScorer(loaded)


def _check_queries(queries: Sequence[str]) -> None:
    if isinstance(queries, str):
        raise ValueError(f"queries must be a sequence of strings, got the single string {queries!r}.")
    for query in queries:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"a query must be a non-empty string, got {query!r}.")


def _results(
    logits_QN: Tensor, grid: tuple[int, int], queries: Sequence[str], pictures: Sequence[Image.Image]
) -> list[RelevanceResult]:
    maps = logits_QN.float().cpu().unflatten(-1, grid)
    return [
        RelevanceResult(relevance=torch.sigmoid(logits), logits=logits, query=query, image=picture)
        for logits, query, picture in zip(maps, queries, pictures, strict=True)
    ]
