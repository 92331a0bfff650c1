"""Validation on encoded samples or on pictures: mean average precision over the tokens, on all ranks together.

Axes: Q queries, N tokens.
"""

from __future__ import annotations

import torch
from torch import distributed as dist

from arrcoc.evaluation.metrics import average_precision, token_labels
from arrcoc.model.relevance import RelevanceModel
from arrcoc.tokens import VisualTokens
from arrcoc.training.images import ImageLoader
from arrcoc.training.tokens import TokenLoader


@torch.no_grad()
def _sample_precisions(model: RelevanceModel, samples: TokenLoader | ImageLoader, number: int) -> list[float]:
    """Average precision of every query of one picture that is present."""
    visual, queries, targets_QN = samples.sample(number)
    present = targets_QN.amax(-1) > 0
    if not present.any():
        return []
    if not isinstance(visual, VisualTokens):
        visual = model.multiscale.encode(model, visual.to(model.backbone.device))
    logits_QN = model.compute_logits(visual, model.encode_text(queries)[None])[0].cpu()
    precisions: list[float] = average_precision(logits_QN[present], token_labels(targets_QN[present])).tolist()
    return precisions


def token_average_precisions(model: RelevanceModel, samples: TokenLoader | ImageLoader) -> list[float]:
    """Average precision of the tokens, in [0, 1], for every query that is present, sample by sample.

    Every sample counts as it is, with all its queries: not augmented, not in other words.
    """
    return [value for number in range(samples.num_samples) for value in _sample_precisions(model, samples, number)]


def token_average_precision(model: RelevanceModel, samples: TokenLoader | ImageLoader) -> float:
    """Mean of ``token_average_precisions``; torchrun's ranks share the samples and all get the same bits.

    Raises:
        ValueError: if every query is absent.
    """
    grouped = dist.is_available() and dist.is_initialized()
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    # Sum and number of each sample: added up in one order, so that the mean does not depend on the number of ranks.
    totals = torch.zeros(samples.num_samples, 2, dtype=torch.float64, device=model.backbone.device)
    for number in range(rank, samples.num_samples, num_ranks):
        values = _sample_precisions(model, samples, number)
        totals[number] = torch.tensor([sum(values), len(values)], dtype=torch.float64)
    if num_ranks > 1:
        dist.all_reduce(totals)
    total, count = totals.sum(0).tolist()
    if not count:
        raise ValueError("samples must hold a query that is present, got none.")
    return float(total / count)
