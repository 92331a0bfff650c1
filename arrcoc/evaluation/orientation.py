"""Which sign of a backbone's similarity means relevance, estimated from a handful of masks.

Raw patches of a CLIP that pools by a class token are more similar to a text where the picture does *not* show it (Li et
al. 2023, CLIP Surgery, "opposite visualization"), so every backbone declares an orientation. Here masks judge it:

    orientation = sign( mean AP(s) - mean AP(-s) ),    s = patches . query,

AP over tokens, mean over queries; pictures are drawn with replacement to say how sure that is.

Axes: Q queries of a picture, N tokens, I pictures, R resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from arrcoc.backbones.base import Backbone
from arrcoc.data.sample import RelevanceSample, coverage
from arrcoc.evaluation.metrics import average_precision, token_labels
from arrcoc.images import load_image, to_tensor
from arrcoc.model.similarity import level_similarity

MIN_IMAGES, MIN_QUERIES = 4, 8  # below these a bootstrap over pictures says nothing
_A_HANDFUL = 32


class OrientationWarning(UserWarning):
    """Masks contradict the orientation that a backbone declares."""


class TooFewMasksError(ValueError):
    """There are too few masks to judge an orientation by."""


@dataclass(frozen=True, kw_only=True)
class OrientationEstimate:
    """What masks say of a backbone's orientation.

    Args:
        orientation: +1 or -1, the sign whose maps find more of the masks.
        declared: the sign that the backbone declares.
        ap_positive, ap_negative: mean average precision of s and of -s, in (0, 1].
        confidence: share of bootstrap draws of pictures that agree with ``orientation``, in [0, 1], ties counted half.
            With few pictures it is too sure of itself: it cannot know of pictures unlike those it saw.
        num_queries, num_images: what the means are over.
        num_skipped: queries left out since they say nothing: named things are absent, or cover every token.
    """

    orientation: int
    declared: int
    ap_positive: float
    ap_negative: float
    confidence: float
    num_queries: int
    num_images: int
    num_skipped: int

    @property
    def agrees(self) -> bool:
        """Whether the masks confirm the declared sign."""
        return self.orientation == self.declared


@torch.no_grad()
def estimate_orientation(
    backbone: Backbone | torch.nn.Module,
    samples: Iterable[RelevanceSample],
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> OrientationEstimate:
    """Judge the sign of a backbone's zero-shot similarity by masks.

    Args:
        backbone: a `Backbone`, or a model that has one as ``.backbone``; its head plays no part.
        samples: pictures with queries and masks, each seen whole at the backbone's default size.
        num_bootstrap: draws of pictures with replacement, >= 1.
        seed: of the draws.

    Returns:
        The estimate; nothing is changed.

    Raises:
        TooFewMasksError: if there are fewer than 8 usable queries or they lie in fewer than 4 pictures; a ValueError.

    Example:
        >>> estimate = estimate_orientation(backbone, arrcoc.data.sample_photos())  # doctest: +SKIP
        >>> backbone.orientation = estimate.orientation                             # doctest: +SKIP
    """
    backbone = _backbone_of(backbone)
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be >= 1, got {num_bootstrap!r}.")
    positive: list[Tensor] = []
    negative: list[Tensor] = []
    num_skipped = 0
    for sample in samples:
        if not sample.queries:
            continue
        scores_QN, grid = _scores(backbone, sample)
        labels_QN = token_labels(coverage(sample.masks.cpu(), grid))
        telling_Q = labels_QN.any(-1) & ~labels_QN.all(-1)
        num_skipped += int((~telling_Q).sum())
        if telling_Q.any():
            positive.append(average_precision(scores_QN[telling_Q], labels_QN[telling_Q]))
            negative.append(average_precision(-scores_QN[telling_Q], labels_QN[telling_Q]))

    num_queries = sum(len(values) for values in positive)
    if num_queries < MIN_QUERIES or len(positive) < MIN_IMAGES:
        raise TooFewMasksError(
            f"samples must hold at least {MIN_QUERIES} queries with a mask in at least {MIN_IMAGES} pictures, got "
            f"{num_queries} in {len(positive)} ({num_skipped} left out: absent, or covering every token)."
        )
    gains_I = torch.stack([(plus - minus).sum() for plus, minus in zip(positive, negative, strict=True)])
    orientation = 1 if gains_I.sum() >= 0 else -1
    generator = torch.Generator().manual_seed(seed)
    picks_RI = torch.randint(len(gains_I), (num_bootstrap, len(gains_I)), generator=generator)
    agreement_R = (1 + orientation * gains_I[picks_RI].sum(-1).sign()) / 2
    return OrientationEstimate(
        orientation=orientation,
        declared=backbone.orientation,
        ap_positive=float(torch.cat(positive).mean()),
        ap_negative=float(torch.cat(negative).mean()),
        confidence=float(agreement_R.mean()),
        num_queries=num_queries,
        num_images=len(positive),
        num_skipped=num_skipped,
    )


def check_orientation(
    backbone: Backbone | torch.nn.Module,
    samples: Iterable[RelevanceSample],
    *,
    min_confidence: float = 0.95,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> OrientationEstimate:
    """Estimate the orientation, and warn if the masks contradict the declared one.

    Args:
        backbone, samples, num_bootstrap, seed: as in `estimate_orientation`.
        min_confidence: in [0, 1]; below it a contradiction is not reported.

    Returns:
        The estimate.

    Raises:
        ValueError: as `estimate_orientation` does, or if min_confidence is out of its range.

    Warns:
        OrientationWarning: says what to set.
    """
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"min_confidence must be in [0, 1], got {min_confidence!r}.")
    backbone = _backbone_of(backbone)
    estimate = estimate_orientation(backbone, samples, num_bootstrap=num_bootstrap, seed=seed)
    if not estimate.agrees and estimate.confidence >= min_confidence:
        warnings.warn(
            f"backbone {backbone.spec!r} in mode {backbone.mode!r} declares orientation {estimate.declared:+d}, but "
            f"masks say {estimate.orientation:+d}: AP is {estimate.ap_positive:.3f} for s and "
            f"{estimate.ap_negative:.3f} for -s over {estimate.num_queries} queries in {estimate.num_images} pictures "
            f"({estimate.confidence:.0%} of bootstrap draws). Set backbone.orientation = {estimate.orientation:+d}, "
            "or load the backbone in another mode.",
            OrientationWarning,
            stacklevel=2,
        )
    return estimate


def check_first(backbone: Backbone | torch.nn.Module, samples: Iterable[RelevanceSample]) -> OrientationEstimate | None:
    """`check_orientation` on the first 32 samples, which is what a command does before it trusts a sign.

    Returns:
        The estimate; None if the masks are too few.
    """
    try:
        return check_orientation(backbone, islice(samples, _A_HANDFUL))
    except TooFewMasksError:
        return None


def _backbone_of(model: Backbone | torch.nn.Module) -> Backbone:
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, Backbone):
        raise ValueError(f"backbone must be a Backbone, or have one as .backbone, got {type(model).__name__}.")
    return backbone


def _scores(backbone: Backbone, sample: RelevanceSample) -> tuple[Tensor, tuple[int, int]]:
    """s [Q, N] of one picture on the CPU, whatever orientation is declared, and its grid."""
    picture = load_image(sample.image)
    pixels = to_tensor(picture, backbone.input_size(picture.height, picture.width))[None].to(backbone.device)
    tokens = backbone(pixels)
    queries_1QD = backbone.encode_text(sample.queries)[None]
    logits_QN = level_similarity(backbone, tokens.patches, queries_1QD)[0]
    return backbone.orientation * logits_QN.cpu(), tokens.grid
