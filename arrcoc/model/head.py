"""Relevance head: the backbone's similarity, spread along tokens that look alike, as calibrated logits.

Let S be the backbone's similarity logits of a query with the N tokens, and P the row-stochastic affinity of the tokens
with one another, softmax(beta * a_i . a_j) over j, with a_i a unit-norm linear image of token i. Then

    logits = self_gain * S + spread_gain * P S + objectness + bias.

P does not see the query, so what is learned on some names carries over to others. At first self_gain = 1,
spread_gain = objectness = bias = 0: the head starts at the zero-shot similarity.

Axes: B batch, N tokens, Q queries, D embedding width, A affinity width, R rank of the token-text product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arrcoc.config import HeadConfig


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

        self.affinity_weight = normal(config.affinity_dim, width)
        self.log_sharpness = nn.Parameter(torch.tensor(5.0).log())  # beta
        self.self_gain = nn.Parameter(torch.ones(()))
        self.spread_gain = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))
        if config.text_rank:
            self.token_factor = normal(config.text_rank, width)
            self.query_factor = nn.Parameter(torch.zeros(config.text_rank, width))
        if config.objectness_dim:
            self.objectness_weight = normal(config.objectness_dim, width)
            self.objectness_gain = nn.Parameter(torch.zeros(config.objectness_dim))

    def affinity(self, patches: Tensor) -> Tensor:
        """Row-stochastic affinity [B, N, N] of tokens [B, N, D]: how much each takes from the others."""
        looks_BNA = F.normalize(patches @ self.affinity_weight.T, dim=-1)
        return torch.softmax(self.log_sharpness.exp() * looks_BNA @ looks_BNA.mT, dim=-1)

    def forward(self, patches: Tensor, queries: Tensor, similarity: Tensor) -> Tensor:
        """Relevance logits.

        Args:
            patches: tokens [B, N, D] in units of the backbone.
            queries: unit-norm text embeddings [B, Q, D].
            similarity: similarity logits [B, Q, N].

        Returns:
            logits [B, Q, N]; their sigmoid is the expected share of the token that the query's object covers.
        """
        logits_BQN = similarity
        # The root mean square over an image makes the learned terms independent of the backbone's units.
        tokens_BND = patches / patches.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
        if self.config.text_rank:
            factors_BQR = queries @ self.query_factor.T
            logits_BQN = logits_BQN + factors_BQR @ (tokens_BND @ self.token_factor.T).mT
        spread_BQN = logits_BQN @ self.affinity(tokens_BND).mT
        logits_BQN = self.self_gain * logits_BQN + self.spread_gain * spread_BQN + self.bias
        if self.config.objectness_dim:
            hidden_BNO = F.gelu(tokens_BND @ self.objectness_weight.T)
            logits_BQN = logits_BQN + (hidden_BNO @ self.objectness_gain)[:, None]
        return logits_BQN
