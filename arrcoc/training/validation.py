"""Validation of a head on encoded samples: mean average precision over the tokens."""

from __future__ import annotations

import torch

from arrcoc.evaluation.metrics import average_precision, token_labels
from arrcoc.model.relevance import RelevanceModel
from arrcoc.training.tokens import TokenLoader


@torch.no_grad()
def token_average_precisions(model: RelevanceModel, samples: TokenLoader) -> list[float]:
    """Average precision of the tokens, in [0, 1], for every query that is present, sample by sample."""
    values: list[float] = []
    for number, (queries, targets_QN) in enumerate(zip(samples.queries, samples.targets, strict=True)):
        present = targets_QN.amax(-1) > 0
        if present.any():
            tokens = samples.tokens.select(torch.tensor([number]))
            logits_QN = model.compute_logits(tokens, model.encode_text(queries)[None])[0].cpu()
            values += average_precision(logits_QN[present], token_labels(targets_QN[present])).tolist()
    return values


def token_average_precision(model: RelevanceModel, samples: TokenLoader) -> float:
    """Mean of ``token_average_precisions``.

    Raises:
        ValueError: if every query is absent.
    """
    values = token_average_precisions(model, samples)
    if not values:
        raise ValueError("samples must hold a query that is present, got none.")
    return sum(values) / len(values)
