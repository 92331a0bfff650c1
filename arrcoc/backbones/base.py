"""What every image-text backbone promises: pictures and texts in, embeddings of one joint space out.

Axes: B images, N tokens, D joint width, Q texts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import floor, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrcoc.backbones.dense import MODES
from arrcoc.backbones.inputs import check_images, check_sequence, check_texts
from arrcoc.backbones.sharing import copy_owning
from arrcoc.backbones.towers import Tower
from arrcoc.tokens import VisualTokens

_TEXTS_AT_ONCE = 256  # bounds the memory of long vocabularies


class Backbone(nn.Module, ABC):
    """A frozen CLIP-like model, used as it is; similarity is always the dot product patches @ query.

    Nothing here changes the wrapped model: no weight, no ``requires_grad`` flag, no mode of any part. ``train()``
    therefore stops at the backbone, and tokens are computed without a graph (they can enter one later). Fine-tuning
    works on a `trainable_copy`.

    ``torch.compile(backbone)`` gives one graph. A graph cannot look at values, so one check is left out there: images
    that leave [0, 1] are not refused.

    Attributes:
        model: the wrapped model, in eval mode.
        tower: its image tower, read token by token; None where a subclass encodes pixels by itself.
        spec: what `load_backbone` was asked for, e.g. ``"embedded"`` or ``"open_clip:ViT-B-16/openai"``.
        mode: how patch tokens are read off the tower, e.g. ``"raw"``; one of ``modes``.
        embed_dim: width D of the joint space.
        stride: (height, width) of a token in pixels.
        tokens_per_side: tokens along the longest side of a picture at scale 1.
        orientation: +1 or -1. A token's dot product with the query times the orientation grows with relevance. It is -1
            for raw patches of a CLIP that pools by a class token: these are more similar to a text where the picture
            does *not* show it (Li et al. 2023, CLIP Surgery, "opposite visualization"). All other modes and poolings
            have +1. Tokens are returned as they are; who scores multiplies.
        normalize_patches: True if patches come with unit norm. False where their plain mean is the image embedding:
            there the length of a token says how much it contributes, and the plain dot product ranks better.
        logit_scale: the model's own s in  s * similarity + b  (after exp, > 0).
        logit_bias: b, or None for models trained with a softmax.
        mean, std: channel statistics that the model was trained with, applied inside `forward`.
        num_trained: last blocks that a `trainable_copy` owns, 0 for any other backbone.
    """

    model: nn.Module
    tower: Tower | None
    spec: str
    embed_dim: int
    stride: tuple[int, int]
    tokens_per_side: int
    normalize_patches: bool
    logit_scale: float
    logit_bias: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_trained: int

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self.tower = None
        self.num_trained = 0
        self._fingerprint: str | None = None
        self._text_origin: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """What ``to`` and its kin call: the fingerprint is that of the weights before they are rounded."""
        self.fingerprint()
        self._text_origin = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """What ``load_state_dict`` of this or of an assembly calls: nothing remembered holds for other weights."""
        self._text_origin = None
        if not self.num_trained:  # a copy keeps the fingerprint of the weights that it was made from
            self._fingerprint = None
        super()._load_from_state_dict(*arguments)

    def _encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D] in row-major order and image embeddings [B, D] of normalised pixels [B, 3, H, W]."""
        tower = self._require_tower()
        with torch.no_grad():  # what comes before the trained blocks needs no graph
            features = tower.features(pixels, self.num_trained)
        return tower.finish(features, tower.grid_of(pixels), self.num_trained)

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Text embeddings [Q, D] of any norm."""

    @property
    def mode(self) -> str:
        """See above; chosen when the backbone is loaded."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if self.tower is not None and mode != self.tower.mode:
            raise ValueError(f"mode is chosen when a backbone is loaded, and is {self.tower.mode!r}, got {mode!r}.")
        self._mode = mode

    @property
    def orientation(self) -> int:
        """See above; to be set where masks say otherwise."""
        return self._orientation

    @orientation.setter
    def orientation(self, orientation: int) -> None:
        if orientation not in (1, -1):
            raise ValueError(f"orientation must be +1 or -1, got {orientation!r}.")
        self._orientation = orientation

    @property
    def modes(self) -> tuple[str, ...]:
        """The dense modes that this tower offers."""
        return (self.mode,) if self.tower is None else self.tower.modes

    @property
    def text_origin(self) -> Tensor | None:
        """What is subtracted from queries before scoring: the unit-norm embedding [D] of the empty text, or None.

        Mode "surgery" scores the difference that a text makes, F . (t - t_empty): feature surgery of a single text (Li
        et al. 2023, CLIP Surgery). Every other mode has None.
        """
        if self.mode not in MODES or not MODES[self.mode].from_empty_text:
            return None
        if self._text_origin is None:
            self._text_origin = self.encode_text([""])[0]
        return self._text_origin

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

    def forward(self, images: Tensor) -> VisualTokens:
        """Patch tokens and image embedding of a batch; a graph is kept by a `trainable_copy` alone.

        Args:
            images: float tensor [B, 3, H, W] in [0, 1], not normalised; H and W any multiples of `stride`.

        Returns:
            VisualTokens with patches [B, N, D] (unit norm if `normalize_patches`), pooled [B, D] (what the model itself
            gives for the image) and grid (H / stride[0], W / stride[1]), in float32 or wider.

        Raises:
            ValueError: if shape, type, range or size are wrong.
        """
        check_images(images, self.stride)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_trained > 0):
            patches, pooled = self._encode_pixels(self._normalise(images))
            return self._as_tokens(patches, pooled, self._grid_of(images))

    def encode_batch(self, images: Sequence[Tensor]) -> list[VisualTokens]:
        """Tokens of pictures of any sizes: pictures of one size go through the tower together.

        Args:
            images: at least one float tensor [3, H, W] in [0, 1]; H and W multiples of `stride`, each its own.

        Returns:
            One VisualTokens of batch 1 an image, in the order of the images.

        Raises:
            ValueError: if images is empty or one of them is not such a tensor.
        """
        images = check_sequence(images)
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for number, image in enumerate(images):
            alike.setdefault((image.shape, image.dtype), []).append(number)
        tokens: dict[int, VisualTokens] = {}
        for numbers in alike.values():
            batch: VisualTokens = self(torch.stack([images[number] for number in numbers]))
            for row, number in enumerate(numbers):
                tokens[number] = VisualTokens(batch.patches[row : row + 1], batch.pooled[row : row + 1], batch.grid)
        return [tokens[number] for number in range(len(images))]

    @torch.no_grad()
    def encode_features(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What enters the trained blocks, for `finish`: it does not change while they are trained and can be kept.

        Args:
            images: as in `forward`.

        Returns:
            Features of the tower's own shape, batch first, and the grid.

        Raises:
            ValueError: as in `forward`, or if this backbone has no tower in parts.
        """
        check_images(images, self.stride)
        return self._require_tower().features(self._normalise(images), self.num_trained), self._grid_of(images)

    def finish(self, features: Tensor, grid: tuple[int, int]) -> VisualTokens:
        """Tokens from `encode_features` of this backbone; finish(*encode_features(images)) equals forward(images).

        Raises:
            ValueError: if this backbone has no tower in parts.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.num_trained > 0):
            return self._as_tokens(*self._require_tower().finish(features, grid, self.num_trained), grid)

    def trainable_copy(self, num_blocks: int) -> Backbone:
        """A backbone with its own copy of the last blocks, to be trained; this one stays as it is.

        The copy shares the memory of all other weights until one of the two is moved or cast. It keeps a graph in
        `forward` and `finish`, and its fingerprint is that of the weights it starts from. Parameters with
        ``requires_grad`` are those of the last blocks and of what follows them in the image tower. Every part stays in
        eval mode: statistics of batch norms are frozen, and nothing is dropped. What serves the image embedding alone
        (the last MLP, in modes without it) gets no gradient from patches.

        Args:
            num_blocks: transformer blocks, or stages of a convolutional tower, counted from the end; >= 1, and >=
                ``num_trained``.

        Raises:
            ValueError: if num_blocks does not fit, or the tower cannot be trained in parts.
        """
        tower = self._require_tower()
        if not isinstance(num_blocks, int):
            raise ValueError(f"num_blocks must be an int, got {num_blocks!r}.")
        if not 1 <= num_blocks <= max(1, tower.num_blocks):
            raise ValueError(f"num_blocks must be in 1..{tower.num_blocks}, got {num_blocks!r}.")
        if num_blocks < self.num_trained:  # the blocks before would be trained, and yet neither saved nor told apart
            raise ValueError(
                f"num_blocks must be >= {self.num_trained}, the blocks that this trainable copy owns already, "
                f"got {num_blocks!r}."
            )
        self.fingerprint()
        shared = [value for name, value in vars(self).items() if not name.startswith("_") and name != "tower"]
        twin = copy_owning(self, self.model, tower.last_parameters(num_blocks), shared)
        twin.num_trained = num_blocks
        return twin

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The tensors that a `trainable_copy` owns, by their names in the wrapped model; {} for any other backbone."""
        if not self.num_trained:
            return {}
        own = {id(parameter) for parameter in self._require_tower().last_parameters(self.num_trained)}
        return {name: value.detach() for name, value in self.model.named_parameters() if id(value) in own}

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Fill in what `trained_state_dict` of a copy with as many trained blocks gave.

        Raises:
            ValueError: if names or shapes are not those of this copy.
        """
        mine = self.trained_state_dict()
        if wrong := sorted(set(mine) ^ set(state)):
            raise ValueError(
                f"state must hold exactly the {len(mine)} trained tensors of this copy, differs in {wrong[0]!r}."
            )
        for name, value in mine.items():
            if state[name].shape != value.shape:
                raise ValueError(f"state[{name!r}] must have shape {list(value.shape)}, got {list(state[name].shape)}.")
        for name, value in mine.items():
            value.copy_(state[name])

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
        texts = check_texts(texts)
        chunks = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        embeddings = torch.cat([self._encode_texts(chunk) for chunk in chunks])
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)

    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over names, shapes and float32 values of the wrapped weights.

        It depends on the weights alone, not on spec, device or file. It is computed once, and anew after
        ``load_state_dict`` of this backbone or of a module around it.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, value in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {list(value.shape)} ".encode())
                digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _require_tower(self) -> Tower:
        if self.tower is None:
            raise ValueError(f"backbone {self.spec!r} has no tower that can be run in parts.")
        return self.tower

    def _normalise(self, images: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        mean, std = (torch.tensor(s, device=self.device, dtype=wide)[:, None, None] for s in (self.mean, self.std))
        return ((images.to(mean) - mean) / std).to(self.dtype)

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        return (images.shape[2] // self.stride[0], images.shape[3] // self.stride[1])

    def _as_tokens(self, patches: Tensor, pooled: Tensor, grid: tuple[int, int]) -> VisualTokens:
        wide = torch.promote_types(self.dtype, torch.float32)
        patches = F.normalize(patches.to(wide), dim=-1) if self.normalize_patches else patches.to(wide)
        return VisualTokens(patches, pooled.to(wide), grid)


def _tokens(size: float) -> int:
    """Nearest count of tokens, halves up, at least one."""
    return max(1, floor(size + 0.5))
