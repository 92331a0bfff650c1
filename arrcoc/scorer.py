"""What a user touches: load a scorer, score a picture for a text, keep the tokens that matter.

Axes: B pictures, N tokens, Q queries, D embedding width, H and W height and width of the picture, h and w of the grid.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
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
from arrcoc.images import ImageInput, as_images, load_image, to_pixels
from arrcoc.model.allocation import Allocation, keep_top, num_tokens_for_mass, num_tokens_of
from arrcoc.model.multiscale import FlatnessAwareMultiScale
from arrcoc.model.relevance import RelevanceModel
from arrcoc.tokens import VisualTokens, resample_maps

_BATCH = 16  # pictures that go through the tower together


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

    def preprocess(self, image: ImageInput, *, scale: float | None = None) -> Tensor:
        """The picture as the backbone takes it: float [1, 3, H, W] in [0, 1], the whole of it, resized.

        Args:
            image: the picture.
            scale: resize factor; the scorer's base scale (1 by default) if None.
        """
        return self._images([load_image(image)], self.model.multiscale.base_scale if scale is None else scale)

    def _images(self, pictures: Sequence[Image.Image], scale: float) -> Tensor:
        """Pictures of one shape at one scale, [B, 3, H, W]."""
        size = self.model.backbone.input_size(pictures[0].height, pictures[0].width, scale=scale)
        pixels = np.stack([to_pixels(picture, size) for picture in pictures])
        return as_images(pixels).to(self.model.backbone.device)

    def _levels(self, pictures: Sequence[Image.Image]) -> dict[float, Tensor]:
        return {scale: self._images(pictures, scale) for scale in self.scales}

    def _tokens(self, levels: Mapping[float, Tensor]) -> VisualTokens:
        return self.model.multiscale.fuse({scale: self.model.encode_image(images) for scale, images in levels.items()})

    @torch.no_grad()
    def encode_image(self, image: ImageInput) -> VisualTokens:
        """Visual tokens of one picture (B = 1), several scales fused."""
        return self._tokens(self._levels([load_image(image)]))

    @torch.no_grad()
    def score_images(self, levels: Mapping[float, Tensor], queries: Sequence[Sequence[str]]) -> list[Tensor]:
        """Logits of a batch of prepared pictures, each for its own queries, at one pass of the vision tower a scale.

        Args:
            levels: for every one of ``scales`` the same B pictures, float [B, 3, H, W] in [0, 1], resized to the
                backbone's ``input_size`` at that scale.
            queries: the texts of each picture, one or more.

        Returns:
            For each picture its relevance logits, float32 [Q, h, w] on the CPU.

        Raises:
            ValueError: if the scales are not the scorer's, or there are not as many pictures as lists of queries.
        """
        if set(levels) != set(self.scales):
            raise ValueError(f"levels must be the scales {self.scales}, got {tuple(levels)}.")
        if wrong := [len(images) for images in levels.values() if len(images) != len(queries)]:
            raise ValueError(
                f"queries must be given for each picture, got {wrong[0]} pictures and {len(queries)} lists."
            )
        for texts in queries:
            check_queries(texts)
        tokens = self._tokens({scale: images.to(self.model.backbone.device) for scale, images in levels.items()})
        by_count: dict[int, list[int]] = {}  # pictures with as many queries go through the head together
        for number, texts in enumerate(queries):
            by_count.setdefault(len(texts), []).append(number)
        logits: dict[int, Tensor] = {}
        for count, numbers in by_count.items():
            chosen = tokens
            if len(numbers) < len(tokens):
                chosen = tokens.select(torch.tensor(numbers, device=tokens.patches.device))
            texts_BQD = self.model.encode_text([text for n in numbers for text in queries[n]]).unflatten(0, (-1, count))
            maps = self.model.compute_logits(chosen, texts_BQD).float().cpu().unflatten(-1, tokens.grid)
            logits |= dict(zip(numbers, maps, strict=True))
        return [logits[number] for number in range(len(queries))]

    def score(self, image: ImageInput, query: str) -> RelevanceResult:
        """Relevance of the picture's tokens for a text."""
        return self.score_queries(image, [query])[0]

    def score_queries(self, image: ImageInput, queries: Sequence[str]) -> list[RelevanceResult]:
        """Relevance for several texts at the price of one pass of the vision tower."""
        queries = check_queries(queries)
        picture = load_image(image)
        return _results(self.score_images(self._levels([picture]), [queries])[0], queries, picture)

    def score_batch(self, images: Iterable[ImageInput], queries: Iterable[str]) -> list[RelevanceResult]:
        """Relevance for pairs of a picture and a text; pictures of one shape go through the tower together.

        The pictures are all held in memory; ``arrcoc.scoring.score_many`` is for more than fit.

        Raises:
            ValueError: if there are not as many pictures as texts.
        """
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise ValueError(f"images must be several pictures, got a single one, {type(images).__name__}.")
        images = list(images)
        queries = check_queries(queries) if images else tuple(queries)
        if len(images) != len(queries):
            raise ValueError(f"images and queries must be pairs, got {len(images)} images and {len(queries)} queries.")
        pictures = [load_image(image) for image in images]
        by_sizes: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            sizes = (self.model.backbone.input_size(picture.height, picture.width, scale=s) for s in self.scales)
            by_sizes.setdefault(tuple(sizes), []).append(number)
        results: dict[int, RelevanceResult] = {}
        chunks = [n[k : k + _BATCH] for n in by_sizes.values() for k in range(0, len(n), _BATCH)]
        for numbers in chunks:
            levels = self._levels([pictures[n] for n in numbers])
            for n, logits in zip(numbers, self.score_images(levels, [[queries[n]] for n in numbers]), strict=True):
                results |= {n: _results(logits, [queries[n]], pictures[n])[0]}
        return [results[number] for number in range(len(pictures))]


def load_scorer(
    model: str | os.PathLike[str] = "embedded",
    *,
    head: str | os.PathLike[str] | None = "default",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    mode: str | None = None,
    scales: float | Iterable[float] = (1.0,),
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
        scales: resize factors whose tokens are fused, whatever a saved model was saved with, or a single one; several
            raise quality, at the cost of the sum of their squares.

    Raises:
        ValueError: for an unknown model, or a head trained on another backbone.
        FileNotFoundError: for a folder without a model.
    """
    multiscale = FlatnessAwareMultiScale(_as_numbers(scales))
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if _names_folder(model):
        if mode is not None:
            raise ValueError(f"mode is fixed by the saved model {str(model)!r}, got {mode!r}.")
        loaded = RelevanceModel.from_pretrained(model, **options)
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


def check_queries(queries: Iterable[str]) -> tuple[str, ...]:
    """The queries, if they are one or more texts that say something."""
    if isinstance(queries, str):
        raise ValueError(f"queries must be a sequence of strings, got the single string {queries!r}.")
    queries = tuple(queries)
    if not queries:
        raise ValueError("queries must hold at least one text, got none.")
    for query in queries:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"a query must be a non-empty string, got {query!r}.")
    return queries


def _as_numbers(scales: float | Iterable[float]) -> tuple[float, ...]:
    try:
        numbers = np.atleast_1d(np.asarray(scales, dtype=np.float64))
    except (TypeError, ValueError):
        numbers = np.empty((0, 0))
    if numbers.ndim != 1:
        raise ValueError(f"scales must be a number or a list of numbers, got {scales!r}.")
    return tuple(numbers.tolist())


def _names_folder(model: str | os.PathLike[str]) -> bool:
    """Whether a saved model is meant, be it there or not; names of backbones have a colon and are no folders."""
    if isinstance(model, os.PathLike):
        return True
    return model != "embedded" and (Path(model).is_dir() or (":" not in model and Path(model).name != model))


def _results(logits: Tensor, queries: Sequence[str], picture: Image.Image) -> list[RelevanceResult]:
    return [
        RelevanceResult(relevance=torch.sigmoid(map_hw), logits=map_hw, query=query, image=picture)
        for map_hw, query in zip(logits, queries, strict=True)
    ]
