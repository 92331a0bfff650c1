"""A backbone small enough to reason about: tokens are patch means through a fixed random matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arrcoc import HeadConfig, RelevanceHead, RelevanceModel
from arrcoc.backbones.base import Backbone


class TinyBackbone(Backbone):
    """Tokens of 8 x 8 pixels whose embedding is their mean colour; texts are the colours' names."""

    COLOURS: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def __init__(self, embed_dim: int = 3, logit_bias: float | None = -2.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis = torch.eye(3) if embed_dim == 3 else torch.randn(3, embed_dim, generator=generator)
        self.model = nn.Module()
        self.model.basis = nn.Parameter(basis)
        self.spec, self.mode, self.embed_dim = "tiny", "raw", embed_dim
        self.stride, self.tokens_per_side = (8, 8), 4
        self.orientation, self.normalize_patches = 1, False
        self.logit_scale, self.logit_bias = 4.0, logit_bias
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.num_encoded_texts = 0
        self.num_image_passes = 0

    def _encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.num_image_passes += 1
        patches = F.avg_pool2d(pixels, 8).flatten(2).mT @ self.model.basis
        return patches, patches.mean(1)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.num_encoded_texts += len(texts)
        colours = torch.tensor([[self.COLOURS[word] for word in texts]], dtype=self.model.basis.dtype)[0]
        return colours @ self.model.basis


def tiny_model(head: bool = True, **options: int) -> RelevanceModel:
    """A RelevanceModel over the tiny backbone, with a small head."""
    backbone = TinyBackbone()
    config = HeadConfig(embed_dim=backbone.embed_dim, **options)
    return RelevanceModel(backbone, RelevanceHead(config) if head else None).eval()
