"""Relevance model: backbone, head and components in one straight line.

    image, text -> backbone (tokens, text embedding) -> similarity -> head -> relevance in [0, 1]

Axes: B batch, N tokens, Q queries, D embedding width, H and W picture height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arrcoc.backbones import load_backbone
from arrcoc.backbones.base import Backbone
from arrcoc.model.allocation import PrecisionAwareAllocation
from arrcoc.model.head import RelevanceHead
from arrcoc.model.multiscale import FlatnessAwareMultiScale
from arrcoc.model.robustness import RelevanceRobustness
from arrcoc.model.saving import read_head, read_settings, restored_backbone, write_model
from arrcoc.model.similarity import similarity_logits
from arrcoc.tokens import VisualTokens

_TEXT_CACHE_BYTES = 2**28  # 174,000 texts at width 384: captions and templates of a whole data set


class RelevanceModel(nn.Module):
    """Says which share of each visual token a text query covers.

    Args:
        backbone: a frozen vision-language model; it is not saved with the model, only named, but for the blocks of it
            that were trained.
        head: a RelevanceHead; None for the backbone's zero-shot similarity.
        robustness, allocation, multiscale: components with settings of their own; defaults if None.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: RelevanceHead | None = None,
        *,
        robustness: RelevanceRobustness | None = None,
        allocation: PrecisionAwareAllocation | None = None,
        multiscale: FlatnessAwareMultiScale | None = None,
    ) -> None:
        super().__init__()
        if head is not None and head.config.embed_dim != backbone.embed_dim:
            raise ValueError(
                f"head must take embeddings of width {backbone.embed_dim} (backbone {backbone.spec!r}), "
                f"got one of width {head.config.embed_dim}."
            )
        self.backbone = backbone
        self.head = head
        self.robustness = robustness or RelevanceRobustness()
        self.allocation = allocation or PrecisionAwareAllocation()
        self.multiscale = multiscale or FlatnessAwareMultiScale((1.0,))
        self._text_cache: dict[str, Tensor] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RelevanceModel:
        """What ``to`` and its kin call: embeddings made before the move do not fit after it."""
        self._text_cache = {}
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """What ``load_state_dict`` calls: embeddings made by other weights are forgotten."""
        self._text_cache = {}
        super()._load_from_state_dict(*arguments)

    def zero_shot(self) -> RelevanceModel:
        """The same components without the head, on the same backbone: with its trained blocks, if it has some."""
        return RelevanceModel(
            self.backbone, robustness=self.robustness, allocation=self.allocation, multiscale=self.multiscale
        )

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm text embeddings [Q, D]; each text is encoded once and remembered.

        A text is encoded on its own: in a batch, its last digits would depend on the company, and with them a resumed
        training run or a score.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a sequence of strings, got the single string {texts!r}.")
        if not texts:
            return self.backbone.encode_text(texts)  # which refuses it
        unknown = [text for text in dict.fromkeys(texts) if text not in self._text_cache]
        if unknown:
            embeddings = [self.backbone.encode_text([text])[0] for text in unknown]
            num_bytes = embeddings[0].numel() * embeddings[0].element_size()
            if (len(self._text_cache) + len(unknown)) * num_bytes > _TEXT_CACHE_BYTES:
                self._text_cache = {text: self._text_cache[text] for text in texts if text in self._text_cache}
            self._text_cache |= dict(zip(unknown, embeddings, strict=True))
        return torch.stack([self._text_cache[text] for text in texts])

    def encode_image(self, images: Tensor) -> VisualTokens:
        """Visual tokens of images [B, 3, H, W] in [0, 1]."""
        tokens: VisualTokens = self.backbone(images)
        return tokens

    def compute_logits(
        self, visual_tokens: VisualTokens | Tensor, text_embedding: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Relevance logits; arguments as in ``compute_relevance``."""
        tokens = self._as_tokens(visual_tokens, grid)
        batch, width = len(tokens), self.backbone.embed_dim
        if text_embedding.ndim not in (2, 3) or text_embedding.shape[-1] != width:
            raise ValueError(
                f"text_embedding must have shape [B, {width}] or [B, Q, {width}], got {list(text_embedding.shape)}."
            )
        queries_BQD = text_embedding[:, None] if text_embedding.ndim == 2 else text_embedding
        if len(queries_BQD) != batch:
            if 1 not in (len(queries_BQD), batch):
                raise ValueError(f"text_embedding must be for {batch} images, got {len(queries_BQD)}.")
            if batch == 1:
                tokens = tokens.select(torch.zeros(len(queries_BQD), dtype=torch.long, device=tokens.patches.device))
            queries_BQD = queries_BQD.expand(len(tokens), -1, -1)
        logits_BQN = similarity_logits(self.backbone, tokens, queries_BQD)
        if self.head is not None:
            logits_BQN = self.head(tokens.patches, queries_BQD, logits_BQN)
        return logits_BQN if text_embedding.ndim == 3 else logits_BQN[:, 0]

    def compute_relevance(
        self, visual_tokens: VisualTokens | Tensor, text_embedding: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Relevance in [0, 1]: the share of each token that the query's object covers.

        Args:
            visual_tokens: VisualTokens; or tokens [B, N, D], on a square grid unless ``grid`` is given; or images
                [B, 3, H, W] in [0, 1].
            text_embedding: unit-norm text embeddings [B, D], or several queries an image [B, Q, D]. One image with
                many texts, or one text for many images, is broadcast.
            grid: (height, width) in tokens.

        Returns:
            [B, N], or [B, Q, N] for several queries an image.

        Raises:
            ValueError: if shapes do not fit.
        """
        return torch.sigmoid(self.compute_logits(visual_tokens, text_embedding, grid))

    def forward(self, images: Tensor | VisualTokens, texts: Sequence[str]) -> Tensor:
        """Relevance [B, N] of images [B, 3, H, W] in [0, 1] (or their tokens) for one text each."""
        return self.compute_relevance(images, self.encode_text(texts))

    def _as_tokens(self, visual_tokens: VisualTokens | Tensor, grid: tuple[int, int] | None) -> VisualTokens:
        if isinstance(visual_tokens, VisualTokens):
            return visual_tokens
        if visual_tokens.ndim == 4:
            return self.encode_image(visual_tokens)
        if visual_tokens.ndim != 3 or visual_tokens.shape[-1] != self.backbone.embed_dim:
            raise ValueError(
                f"visual_tokens must be VisualTokens, tokens [B, N, {self.backbone.embed_dim}] or images "
                f"[B, 3, H, W], got {list(visual_tokens.shape)}."
            )
        side = round(visual_tokens.shape[1] ** 0.5)
        if grid is None and side * side != visual_tokens.shape[1]:
            raise ValueError(f"grid must be given for {visual_tokens.shape[1]} tokens, which do not make a square.")
        return VisualTokens(visual_tokens, visual_tokens.mean(1), grid or (side, side))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the head, the backbone's trained blocks and the settings; its other weights are only named.

        A backbone is named by its spec, mode and fingerprint: of the weights that its trained blocks started from.
        """
        write_model(
            Path(directory),
            self.backbone,
            self.head,
            {
                "robustness": {"rho": self.robustness.rho},
                "allocation": {"target_precision": self.allocation.target_precision},
                "multiscale": {"scales": list(self.multiscale.scales)},
            },
        )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        backbone: Backbone | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> RelevanceModel:
        """Read what ``save_pretrained`` wrote.

        Args:
            directory: the folder.
            backbone: the loaded backbone, left as it is (trained blocks go into a copy); None loads the one that the
                folder names.
            device, dtype: of a backbone that is loaded; CPU and float32 if None. The head goes where the backbone is.

        Raises:
            FileNotFoundError: if the folder holds no relevance model.
            ValueError: if it is damaged, or was trained on another backbone or in another mode.
        """
        folder = Path(directory)
        settings = read_settings(folder)
        if backbone is None:
            wanted = settings["backbone"]
            backbone = load_backbone(wanted["spec"], device=device, dtype=dtype, mode=wanted["mode"])
            backbone.orientation = wanted["orientation"] or backbone.orientation
        backbone = restored_backbone(folder, settings["backbone"], backbone)
        head = read_head(folder, settings["head"])
        model = cls(
            backbone,
            head,
            robustness=RelevanceRobustness(**settings["robustness"]),
            allocation=PrecisionAwareAllocation(**settings["allocation"]),
            multiscale=FlatnessAwareMultiScale(**settings["multiscale"]),
        )
        if head is not None:
            head.to(backbone.device)
        return model.eval()
