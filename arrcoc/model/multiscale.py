"""Several scales of one picture, weighted by how flat their relevance is.

A scale whose prediction is sharp (a small change of its tokens changes it a lot) gets less weight. All scales are
resampled to the grid of the first listed scale nearest to 1 and meet in token space, so the head runs once.

The source's listing adds maps of different grids and needs the gradient of an image; here both happen on tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arrcoc.model.similarity import flatness_weights, level_similarity, map_sharpness
from arrcoc.tokens import VisualTokens, fuse

if TYPE_CHECKING:
    from arrcoc.model.relevance import RelevanceModel


class FlatnessAwareMultiScale(nn.Module):
    """Relevance from several scales of a picture.

    Args:
        scales: resize factors > 0, relative to the picture's default size; the cost of a scale grows with its square.

    Raises:
        ValueError: if scales is empty, or one is not a positive finite number, or one occurs twice.
    """

    def __init__(self, scales: Sequence[float] = (0.5, 1.0, 2.0)) -> None:
        super().__init__()
        if not scales or any(not (math.isfinite(scale) and scale > 0) for scale in scales):
            raise ValueError(f"scales must be one or more positive finite numbers, got {scales!r}.")
        if len(set(scales)) != len(scales):
            raise ValueError(f"scales must differ from each other, got {scales!r}.")
        self.scales = tuple(float(scale) for scale in scales)

    @property
    def base_scale(self) -> float:
        """The scale whose grid the result has: the one nearest to 1."""
        return min(self.scales, key=lambda scale: abs(math.log(scale)))

    def fuse(self, levels: dict[float, VisualTokens]) -> VisualTokens:
        """Tokens of every scale, averaged on the base scale's grid and kept as levels."""
        ordered = sorted(levels, key=lambda scale: scale != self.base_scale)
        return fuse(tuple(levels[scale] for scale in ordered))

    def encode(self, model: RelevanceModel, images: Tensor, shape: tuple[int, int] | None = None) -> VisualTokens:
        """Tokens of every scale of images [B, 3, H, W] in [0, 1], fused.

        Args:
            model: gives the backbone.
            images: the pictures.
            shape: (height, width) whose aspect ratio the grid has; that of the images if None.
        """
        return self.fuse(self._levels(model, images, shape or (images.shape[-2], images.shape[-1])))

    def _levels(self, model: RelevanceModel, images: Tensor, shape: tuple[int, int]) -> dict[float, VisualTokens]:
        sizes = {scale: model.backbone.input_size(*shape, scale=scale) for scale in self.scales}
        return {scale: model.encode_image(_resize(images, size)) for scale, size in sizes.items()}

    def process_with_flatness(
        self, model: RelevanceModel, image: Tensor, text_embedding: Tensor
    ) -> dict[str, Tensor | dict[float, Tensor]]:
        """Relevance of every scale and of their flatness-weighted combination.

        Args:
            model: a RelevanceModel.
            image: float tensor [B, 3, H, W] in [0, 1].
            text_embedding: unit-norm text embeddings [B, D].

        Returns:
            dict with ``combined_relevance`` [B, h, w] in [0, 1] on the base scale's grid; ``per_scale``
            {scale: relevance [B, h, w]} on the same grid; ``sharpness`` {scale: [B]}, >= 0;
            ``weights`` {scale: [B]}, summing to 1 over the scales.
        """
        height, width = image.shape[-2:]
        sizes = {scale: model.backbone.input_size(height, width, scale=scale) for scale in self.scales}
        levels = {scale: model.encode_image(_resize(image, size)) for scale, size in sizes.items()}
        grid = levels[self.base_scale].grid
        levels = {scale: level.resample(grid) for scale, level in levels.items()}
        queries = text_embedding[:, None]
        maps = {s: level_similarity(model.backbone, level.patches, queries)[:, 0] for s, level in levels.items()}
        sharpness = torch.stack([map_sharpness(model.backbone, maps[scale]) for scale in self.scales])
        weights = flatness_weights(sharpness)

        def relevance(tokens: VisualTokens) -> Tensor:
            return model.compute_relevance(tokens, text_embedding).reshape(-1, *grid)

        return {
            "combined_relevance": relevance(self.fuse(levels)),
            "per_scale": {scale: relevance(levels[scale]) for scale in self.scales},
            "sharpness": dict(zip(self.scales, sharpness, strict=True)),
            "weights": dict(zip(self.scales, weights, strict=True)),
        }


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
