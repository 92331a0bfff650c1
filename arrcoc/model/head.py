"""Relevance head: the backbone's similarity, spread along tokens that look alike, and calibrated.

Let S be the backbone's similarity logits of a query with the N tokens, and P the row-stochastic affinity of the tokens
with one another, softmax(beta * cos(x_i, x_j)) over j. Then, for every query,

    ranking = self_gain * S + spread_gain * P S  (+ objectness)
    logits  = gain * ranking + mean_gain * mean(ranking) + peak_gain * max(ranking) + bias.

P does not see the query, so what is learned on some names carries over to others. The second line cannot change the
order of the tokens: it turns it into the share of a token that is covered, by how strong the query is in the picture as
a whole. At first self_gain = gain = 1 and the rest is 0: the head starts at the zero-shot similarity.

Axes: B batch, N tokens, Q queries, D embedding width, A affinity width, R rank of the token-text product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arrcoc.config import HeadConfig

_SHARPNESS = 5.0  # beta at first; on photos 3 to 6 are equally good


class RelevanceHead(nn.Module):
    """Turns similarity logits and tokens into relevance logits.

    Args:
        config: widths of the parts.
        generator: source of the initial weights; a new one seeded with 0 if None.
    """

    def __init__(self, config: HeadConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        generator = generator or torch.Generator().manual_seed(0)
        width = config.embed_dim

        def normal(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * columns**-0.5)

        def number(value: float) -> nn.Parameter:
            return nn.Parameter(torch.tensor(value))

        self.self_gain, self.spread_gain = number(1.0), number(0.0)
        self.log_sharpness = nn.Parameter(torch.tensor(_SHARPNESS).log())  # of beta
        self.log_gain, self.mean_gain, self.peak_gain, self.bias = number(0.0), number(0.0), number(0.0), number(0.0)
        if config.affinity_dim:
            self.affinity_weight = normal(config.affinity_dim, width)
        if config.text_rank:
            self.token_factor = normal(config.text_rank, width)
            self.query_factor = nn.Parameter(torch.zeros(config.text_rank, width))
        if config.objectness_dim:
            self.objectness_weight = normal(config.objectness_dim, width)
            self.objectness_gain = nn.Parameter(torch.zeros(config.objectness_dim))

    def affinity(self, patches: Tensor) -> Tensor:
        """Row-stochastic affinity [B, N, N] of tokens [B, N, D]: how much each takes from the others."""
        looks_BNA = patches @ self.affinity_weight.T.to(patches.dtype) if self.config.affinity_dim else patches
        looks_BNA = F.normalize(looks_BNA, dim=-1)
        return torch.softmax(self.log_sharpness.exp() * looks_BNA @ looks_BNA.mT, dim=-1)

    def ranking(self, patches: Tensor, queries: Tensor, similarity: Tensor) -> Tensor:
        """Scores [B, Q, N] that order the tokens; arguments as in ``forward``."""
        scores_BQN = similarity
        # The root mean square over an image makes the learned terms independent of the backbone's units.
        tokens_BND = patches / patches.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        if self.config.text_rank:
            factors_BQR = queries @ self.query_factor.T.to(queries.dtype)
            scores_BQN = scores_BQN + factors_BQR @ (tokens_BND @ self.token_factor.T.to(tokens_BND.dtype)).mT
        spread_BQN = scores_BQN @ self.affinity(tokens_BND).mT
        scores_BQN = self.self_gain * scores_BQN + self.spread_gain * spread_BQN
        if self.config.objectness_dim:
            hidden_BNO = F.gelu(tokens_BND @ self.objectness_weight.T.to(tokens_BND.dtype))
            scores_BQN = scores_BQN + (hidden_BNO @ self.objectness_gain.to(hidden_BNO.dtype))[:, None]
        return scores_BQN

    def calibrate(self, ranking: Tensor) -> Tensor:
        """Relevance logits of scores [..., N], in the same order."""
        mean, peak = ranking.mean(-1, keepdim=True), ranking.amax(-1, keepdim=True)
        return self.log_gain.exp() * ranking + self.mean_gain * mean + self.peak_gain * peak + self.bias

    def forward(self, patches: Tensor, queries: Tensor, similarity: Tensor) -> Tensor:
        """Relevance logits.

        Args:
            patches: tokens [B, N, D] in units of the backbone.
            queries: unit-norm text embeddings [B, Q, D].
            similarity: similarity logits [B, Q, N].

        Returns:
            logits [B, Q, N]; their sigmoid is the expected share of the token that the query's object covers.
        """
        return self.calibrate(self.ranking(patches, queries, similarity))
