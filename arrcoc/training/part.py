"""What is trained: the head, or the head and the last blocks of its backbone, as a function of a prepared batch.

What comes before is frozen: it runs once a batch, without a graph, however many passes the optimizer makes. With a
frozen backbone that is all up to the similarity; with trained blocks, all up to what enters the first of them.

Axes: B batch, Q queries, N tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arrcoc.backbones.base import Backbone
from arrcoc.config import TrainConfig
from arrcoc.model.relevance import RelevanceModel
from arrcoc.model.robustness import perturb_tokens
from arrcoc.model.similarity import similarity_logits
from arrcoc.tokens import VisualTokens
from arrcoc.training.distributed import Ranks

Texts = Sequence[str] | Sequence[Sequence[str]]
Batch = tuple[Tensor | VisualTokens, Texts, Tensor]


class HeadInputs(NamedTuple):
    """What the head sees of a batch: tokens [B, N, D], queries [B, Q, D], similarity logits [B, Q, N]."""

    patches: Tensor
    queries: Tensor
    similarity: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """A batch up to where the trained part begins.

    Args:
        queries: text embeddings [B, Q, D].
        targets: [B, Q, N] in [0, 1].
        clean, noisy: what the head sees of tokens as they are and of perturbed ones, if the backbone is frozen.
        features: what the trained blocks see, if there are some, as the backbone gives it, and its grid.
        noise_seed: of the noise that every pass over trained blocks draws anew, and the same.
        rows: which images of the whole batch these are, [B]; on one rank, all of them.
        size: images of the whole batch, over all ranks.
    """

    queries: Tensor
    targets: Tensor
    clean: HeadInputs | None = None
    noisy: HeadInputs | None = None
    features: tuple[Tensor, tuple[int, int]] | None = None
    noise_seed: int = 0
    rows: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, index: Tensor) -> Prepared:
        """Some of the images, each with what it has in the whole."""
        index = index.to(self.targets.device)
        return replace(
            self,
            queries=self.queries[index],
            targets=self.targets[index],
            clean=None if self.clean is None else HeadInputs(*(part[index] for part in self.clean)),
            noisy=None if self.noisy is None else HeadInputs(*(part[index] for part in self.noisy)),
            features=None if self.features is None else (self.features[0][index], self.features[1]),
            rows=self.rows[index],
        )


class TrainedPart:
    """The trained part of a model.

    Args:
        model: with a head; its backbone is made by ``trainable_copy`` if blocks are trained.
        config: says whether blocks are trained, whether there is a penalty, and in what precision.
        ranks: the processes that share each batch.
    """

    def __init__(self, model: RelevanceModel, config: TrainConfig, ranks: Ranks) -> None:
        assert model.head is not None
        self.model, self.head, self.config, self.ranks = model, model.head, config, ranks
        self.has_penalty = config.penalty_weight > 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Where matrix products are made in the precision of the settings."""
        narrow = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.config.precision)
        return torch.autocast(self.head.bias.device.type, narrow) if narrow else nullcontext()

    @torch.no_grad()
    def prepare(self, batch: Batch, noise: torch.Generator) -> Prepared | None:
        """Run what is frozen on this rank's part of a batch; None if the part is empty.

        Raises:
            ValueError: if the targets do not fit, or blocks are trained on tokens that come ready.
        """
        visual, texts, targets = batch
        # Only the noise asks what the other ranks have.
        sizes = self.ranks.gather(len(texts)) if self.has_penalty else [len(texts)]
        if not texts:
            return None
        if isinstance(texts[0], str):
            texts, targets = [[text] for text in texts if isinstance(text, str)], targets[:, None]
        device = self.head.bias.device
        flat = [text for row in texts for text in row]
        queries = self.model.encode_text(flat).unflatten(0, (len(texts), -1)).to(device)
        start = sum(sizes[: self.ranks.rank]) if len(sizes) > 1 else 0
        prepared = Prepared(
            queries=queries,
            targets=targets.to(device, queries.dtype),
            rows=torch.arange(start, start + len(texts), device=device),
            size=sum(sizes),
        )
        if self.config.train_blocks:
            if isinstance(visual, VisualTokens):
                raise ValueError("train_loader must give images to train blocks of the backbone, got tokens.")
            with self.autocast():
                features, grid = self.model.backbone.encode_features(visual)
            features = features.to(self.model.backbone.dtype)  # what comes after need not be narrow
            seed = int(torch.randint(2**62, (), generator=noise))
            return replace(prepared, features=(features, grid), noise_seed=seed)
        tokens = _on_device(visual if isinstance(visual, VisualTokens) else self._encode(visual), device)
        _check_targets(prepared.targets, tokens, queries)
        # One draw for all passes of an optimizer, so that they see the same loss surface.
        noisy = self._head_inputs(self._perturbed(tokens, noise, prepared), queries) if self.has_penalty else None
        return replace(prepared, clean=self._head_inputs(tokens, queries), noisy=noisy)

    def head_inputs(self, prepared: Prepared) -> tuple[HeadInputs, HeadInputs | None]:
        """What the head sees, with a graph through the trained blocks: clean, and perturbed for the penalty."""
        if prepared.clean is not None:
            return prepared.clean, prepared.noisy
        assert prepared.features is not None
        tokens = self.model.backbone.finish(*prepared.features)
        _check_targets(prepared.targets, tokens, prepared.queries)
        clean, noisy = self._head_inputs(tokens, prepared.queries), None
        if self.has_penalty:
            generator = torch.Generator().manual_seed(prepared.noise_seed)
            noisy = self._head_inputs(self._perturbed(tokens, generator, prepared), prepared.queries)
        return clean, noisy

    def _encode(self, images: Tensor) -> VisualTokens:
        with self.autocast():
            if self.model.multiscale.scales == (1.0,):
                return self.model.encode_image(images)
            return self.model.multiscale.encode(self.model, images)

    def _head_inputs(self, tokens: VisualTokens, queries: Tensor) -> HeadInputs:
        return HeadInputs(tokens.patches, queries, similarity_logits(self.model.backbone, tokens, queries))

    def _perturbed(self, tokens: VisualTokens, noise: torch.Generator, prepared: Prepared) -> VisualTokens:
        """Tokens with their part of the noise that one process draws for the whole batch."""
        radius, rows = self.config.input_radius, prepared.rows
        if len(rows) == prepared.size:
            return perturb_tokens(tokens, radius, noise)
        whole = torch.zeros(prepared.size, dtype=torch.long, device=rows.device)  # the first one stands for the absent
        whole[rows] = torch.arange(len(rows), device=rows.device)
        return perturb_tokens(tokens.select(whole), radius, noise).select(rows)


def trainable(backbone: Backbone, num_blocks: int) -> Backbone:
    """A copy whose last blocks can be trained; the backbone itself if it is such a copy, to be trained further."""
    if not backbone.num_trained:
        return backbone.trainable_copy(num_blocks)
    if backbone.num_trained != num_blocks:
        raise ValueError(
            f"train_blocks must be {backbone.num_trained}, as many as the model was trained with, got {num_blocks!r}."
        )
    return backbone


def _check_targets(targets: Tensor, tokens: VisualTokens, queries: Tensor) -> None:
    expected = [len(tokens), queries.shape[1], tokens.num_tokens]
    if list(targets.shape) != expected:
        raise ValueError(f"targets must have shape {expected}, got {list(targets.shape)}.")


def _on_device(tokens: VisualTokens, device: torch.device) -> VisualTokens:
    if tokens.patches.device == device:
        return tokens
    levels = tuple(_on_device(level, device) for level in tokens.levels)
    return VisualTokens(tokens.patches.to(device), tokens.pooled.to(device), tokens.grid, levels)
