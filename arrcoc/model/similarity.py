"""Zero-shot similarity logits of tokens and text, with scales weighted by their flatness.

For one scale, S = orientation * logit_scale * (patches . query) + logit_bias; a backbone trained without a bias has no
absolute zero, so its map is centred instead. A backbone with a text origin t_0 is scored by the difference that a text
makes, patches . (query - t_0): a bias cancels there, and the map is centred as well. For several scales,
S = sum_s w_s S_s with w_s inversely proportional to the sharpness of scale s: the norm of the gradient of its relevance
with respect to its tokens,

    || d sum_i sigmoid(S_i) / d patches || = logit_scale * || sigmoid'(S) ||

for a query of unit norm; another length, as that of query - t_0, is the same for all scales and cancels in the weights.

Axes: B batch, N tokens, Q queries, D embedding width, L scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arrcoc.backbones.base import Backbone
from arrcoc.tokens import VisualTokens

_EPS = 1e-6


def level_similarity(backbone: Backbone, patches: Tensor, queries: Tensor) -> Tensor:
    """Similarity logits [B, Q, N] of tokens [B, N, D] and unit-norm queries [B, Q, D], one scale."""
    origin = backbone.text_origin
    if origin is not None:
        queries = queries - origin.to(queries)
    logits_BQN = backbone.orientation * backbone.logit_scale * (queries @ patches.mT)
    if backbone.logit_bias is None or origin is not None:
        return logits_BQN - logits_BQN.mean(-1, keepdim=True)
    return logits_BQN + backbone.logit_bias


def map_sharpness(backbone: Backbone, similarity: Tensor) -> Tensor:
    """Gradient norm of the relevance of similarity logits [B, Q, N] with respect to the tokens: [B, Q], >= 0."""
    relevance_BQN = torch.sigmoid(similarity)
    slope_BQN = relevance_BQN * (1 - relevance_BQN)
    return abs(backbone.logit_scale) * slope_BQN.square().sum(-1).sqrt()


def flatness_weights(sharpness: Tensor) -> Tensor:
    """Weights of scales from their sharpness [L, ...]: inversely proportional, positive, summing to 1 over L."""
    inverse = 1 / (sharpness + _EPS)
    return inverse / inverse.sum(0)


def similarity_logits(backbone: Backbone, tokens: VisualTokens, queries: Tensor) -> Tensor:
    """Similarity logits [B, Q, N] of visual tokens and unit-norm queries [B, Q, D]."""
    if not tokens.levels:
        return level_similarity(backbone, tokens.patches, queries)
    maps_LBQN = torch.stack([level_similarity(backbone, level.patches, queries) for level in tokens.levels])
    sharpness_LBQ = torch.stack([map_sharpness(backbone, maps_BQN) for maps_BQN in maps_LBQN])
    return (flatness_weights(sharpness_LBQ)[..., None] * maps_LBQN).sum(0)
