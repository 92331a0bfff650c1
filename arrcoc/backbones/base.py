"""What every image-text backbone promises: pictures and texts in, embeddings of one joint space out.

Axes: B images, N tokens, D joint width, Q texts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import floor, isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrcoc.tokens import VisualTokens

_RANGE_TOLERANCE = 1e-3  # bicubic resampling and half precision overshoot [0, 1] by about this much
_TEXTS_AT_ONCE = 256  # bounds the memory of long vocabularies


class Backbone(nn.Module, ABC):
    """A frozen CLIP-like model, used as it is; similarity is always the dot product patches @ query.

    Nothing here changes the wrapped model: no weight, no ``requires_grad`` flag, no mode of any part. ``train()``
    therefore stops at the backbone, and tokens are computed without a graph (they can enter one later).

    Attributes:
        model: the wrapped model, in eval mode.
        spec: what `load_backbone` was asked for, e.g. ``"embedded"`` or ``"open_clip:ViT-B-16/openai"``.
        mode: how patch tokens are read off the tower, e.g. ``"raw"``.
        embed_dim: width D of the joint space.
        stride: (height, width) of a token in pixels.
        tokens_per_side: tokens along the longest side of a picture at scale 1.
        orientation: +1 or -1. A token's dot product with the query times the orientation grows with relevance. Towers
            that average their tokens have +1. CLIPs that pool by a class token have -1: the raw patches of such a model
            are more similar to a text where the picture does *not* show it (Li et al. 2023, CLIP Surgery, "opposite
            visualization"). Tokens are returned as they are; who scores multiplies.
        normalize_patches: True if patches come with unit norm. False where their plain mean is the image embedding:
            there the length of a token says how much it contributes, and the plain dot product ranks better.
        logit_scale: the model's own s in  s * similarity + b  (after exp, > 0).
        logit_bias: b, or None for models trained with a softmax.
        mean, std: channel statistics that the model was trained with, applied inside `forward`.
    """

    model: nn.Module
    spec: str
    mode: str
    embed_dim: int
    stride: tuple[int, int]
    tokens_per_side: int
    orientation: int
    normalize_patches: bool
    logit_scale: float
    logit_bias: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self._fingerprint: str | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """What ``to`` and its kin call: the fingerprint is that of the weights before they are rounded."""
        self.fingerprint()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    @abstractmethod
    def _encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D] in row-major order and image embeddings [B, D] of normalised pixels [B, 3, H, W]."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Text embeddings [Q, D] of any norm."""

    @property
    def device(self) -> torch.device:
        """Where the wrapped model is, and so the tokens."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the wrapped model computes in. Tokens come in float32 even if this is narrower."""
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> Backbone:
        """Return self: the wrapped model keeps its modes, whatever the assembly around it does."""
        return self

    def input_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """Size to which a picture is resized for the default grid.

        The longest side gets round(tokens_per_side * scale) tokens and the other follows the aspect ratio. Halves are
        rounded up, and no side has less than one token.

        Args:
            height, width: of the picture, in pixels.
            scale: factor of the default grid, > 0.

        Returns:
            (H, W) in pixels, multiples of `stride`.

        Raises:
            ValueError: if a side is < 1 or scale is not a number > 0.
        """
        if min(height, width) < 1:
            raise ValueError(f"height and width must be >= 1, got {(height, width)!r}.")
        if not (isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a number > 0, got {scale!r}.")
        longest = 0 if height >= width else 1
        pixels = _tokens(self.tokens_per_side * scale) * self.stride[longest]
        fit = pixels / max(height, width)
        return (
            _tokens(height * fit / self.stride[0]) * self.stride[0],
            _tokens(width * fit / self.stride[1]) * self.stride[1],
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> VisualTokens:
        """Patch tokens and image embedding of a batch.

        Args:
            images: float tensor [B, 3, H, W] in [0, 1], not normalised; H and W any multiples of `stride`.

        Returns:
            VisualTokens with patches [B, N, D] (unit norm if `normalize_patches`), pooled [B, D] (what the model itself
            gives for the image) and grid (H / stride[0], W / stride[1]), in float32 or wider.

        Raises:
            ValueError: if shape, type, range or size are wrong.
        """
        self._check_images(images)
        wide = torch.promote_types(self.dtype, torch.float32)
        mean, std = (torch.tensor(s, device=self.device, dtype=wide)[:, None, None] for s in (self.mean, self.std))
        pixels = ((images.to(mean) - mean) / std).to(self.dtype)
        patches, pooled = (tokens.to(wide) for tokens in self._encode_pixels(pixels))
        if self.normalize_patches:
            patches = F.normalize(patches, dim=-1)
        return VisualTokens(patches, pooled, (images.shape[2] // self.stride[0], images.shape[3] // self.stride[1]))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings of texts by the model's own tokenizer, which cuts what exceeds its context.

        Args:
            texts: at least one str.

        Returns:
            Tensor [Q, D] with rows of norm 1, in float32 or wider.

        Raises:
            ValueError: if texts is empty, a single str, or holds anything but str.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a sequence of str, got the single str {texts!r}; write [{texts!r}].")
        texts = list(texts)
        if not texts:
            raise ValueError(f"texts must hold at least one str, got {texts!r}.")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"texts must hold nothing but str, got {wrong[0]!r}.")
        chunks = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        embeddings = torch.cat([self._encode_texts(chunk) for chunk in chunks])
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over names, shapes and float32 values of the wrapped weights.

        It depends on the weights alone, not on spec, device or file; computed once.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, value in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {list(value.shape)} ".encode())
                digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a float tensor in [0, 1], got {kind}.")
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] < 1:
            raise ValueError(f"images must have shape [B, 3, H, W] with B >= 1, got {list(images.shape)}.")
        if any(size < step or size % step for size, step in zip(images.shape[2:], self.stride, strict=True)):
            height, width = self.stride
            raise ValueError(
                f"images must have height a multiple of {height} and width a multiple of {width}, "
                f"got {tuple(images.shape[2:])}; resize them to input_size(height, width)."
            )
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}.")


def _tokens(size: float) -> int:
    """Nearest count of tokens, halves up, at least one."""
    return max(1, floor(size + 0.5))
