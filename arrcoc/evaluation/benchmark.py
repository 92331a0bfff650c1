"""The scorer and its baselines on the same vision passes: clean, under token noise and under picture corruptions.

A number alone says little about a relevance map, so each stands beside four others: the backbone without the head
("zero-shot"), the same with the sign turned ("negated": raw CLIP similarity is often inverted), a map that prefers the
picture's centre ("centre") and one drawn anew every time ("random").

Rank metrics use logits: an uncalibrated map may saturate, and what rounds to the same relevance would tie. Calibration
uses relevance, and is measured for the methods that have it, "model" and "zero-shot".

Axes: Q queries of one picture, N tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from arrcoc.data.sample import RelevanceSample, coverage
from arrcoc.evaluation import metrics
from arrcoc.evaluation.perturbations import CORRUPTIONS, strength, token_noise
from arrcoc.evaluation.results import BenchmarkReport, MethodScores
from arrcoc.images import load_image
from arrcoc.tokens import VisualTokens

CONDITIONS = ("clean", "token_noise", *CORRUPTIONS)
METHODS = ("model", "zero-shot", "negated", "centre", "random")


class Model(Protocol):
    """What the benchmark asks of a relevance model."""

    def encode_text(self, texts: Sequence[str], /) -> Tensor: ...
    def compute_logits(self, visual_tokens: VisualTokens, text_embedding: Tensor, /) -> Tensor: ...
    def compute_relevance(self, visual_tokens: VisualTokens, text_embedding: Tensor, /) -> Tensor: ...
    def zero_shot(self) -> Model: ...


class Scorer(Protocol):
    """What the benchmark asks of a scorer, e.g. of ``arrcoc.load_scorer()``."""

    @property
    def model(self) -> Model: ...
    def encode_image(self, image: Image.Image, /) -> VisualTokens: ...


class Samples(Protocol):
    """Pictures with queries and masks by number, e.g. a list of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> RelevanceSample: ...


@torch.no_grad()  # not inference_mode: the model may cache text embeddings that training uses later
def evaluate(
    scorer: Scorer,
    samples: Samples,
    *,
    conditions: Sequence[str] = CONDITIONS,
    severity: int = 3,
    budget: float = 0.25,
    seed: int = 0,
    progress: bool = False,
) -> BenchmarkReport:
    """Measure a scorer and its baselines on pictures with masks.

    Each picture is seen once clean and once for each corruption; all methods score the same tokens. The randomness of
    a picture depends on the seed, its number and the condition alone, so that fewer conditions give the same numbers.

    Args:
        scorer: see :class:`Scorer`.
        samples: pictures with queries and masks.
        conditions: some of CONDITIONS.
        severity: strength of the perturbations, 1 to 5; see ``perturbations.SEVERITIES``.
        budget: tokens kept, for recall and overlap: a count >= 1, or a float share in (0, 1].
        seed: of the noise, the random maps and the bootstrap.
        progress: show a bar.

    Returns:
        The report.

    Raises:
        ValueError: for unknown conditions, a severity outside 1 to 5, a wrong budget, or no queries.
    """
    if not conditions or not set(conditions) <= set(CONDITIONS):
        raise ValueError(f"conditions must be some of {', '.join(CONDITIONS)}, got {conditions!r}.")
    strength("token_noise", severity)

    models = {"model": scorer.model, "zero-shot": scorer.model.zero_shot()}
    tallies = {(condition, method): _Tally(method) for condition in conditions for method in METHODS}
    num_images = num_present = num_absent = 0
    for index in tqdm(range(len(samples)), desc="evaluate", unit="picture", disable=not progress):
        sample = samples[index]
        if not sample.queries:
            continue
        picture = load_image(sample.image)
        text = scorer.model.encode_text(sample.queries)[None]
        clean_tokens = scorer.encode_image(picture)
        clean_maps = _scores(models, clean_tokens, text, _generator(seed, index, "map", "clean"))
        coverage_QN = coverage(sample.masks.cpu(), clean_tokens.grid)
        num_images += 1
        num_present += int((coverage_QN.sum(-1) > 0).sum())
        num_absent += int((coverage_QN.sum(-1) == 0).sum())

        for condition in dict.fromkeys(conditions):
            generator = _generator(seed, index, "perturbation", condition)
            if condition == "clean":
                tokens = clean_tokens
            elif condition == "token_noise":
                tokens = token_noise(clean_tokens, severity, generator=generator)
            else:
                tokens = scorer.encode_image(CORRUPTIONS[condition](picture, severity, generator=generator))
            maps = _scores(models, tokens, text, _generator(seed, index, "map", condition))
            for method, scores_QN in maps.items():
                tallies[condition, method].add(scores_QN, clean_maps[method], coverage_QN, budget)
            for method, model in models.items():
                relevance_QN = model.compute_relevance(tokens, text)[0].float().cpu()
                tallies[condition, method].add_relevance(relevance_QN, coverage_QN)

    if num_images == 0:
        raise ValueError(f"samples must hold at least one query, got none in {len(samples)} pictures.")
    return BenchmarkReport(
        rows=tuple(tally.scores(condition, seed) for (condition, _), tally in tallies.items()),
        num_images=num_images,
        num_queries=num_present,
        num_absent=num_absent,
        severity=severity,
        budget=budget,
        seed=seed,
    )


def _scores(
    models: Mapping[str, Model], tokens: VisualTokens, text: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """How each method ranks the tokens of one picture: scores [Q, N] on the CPU."""
    learned = {name: model.compute_logits(tokens, text)[0].float().cpu() for name, model in models.items()}
    height, width = tokens.grid
    y, x = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    centre_N = -(y[:, None].square() + x.square()).flatten()
    return {
        **learned,
        "negated": -learned["zero-shot"],
        "centre": centre_N.expand_as(learned["model"]),
        "random": torch.rand(learned["model"].shape, generator=generator),
    }


@dataclass
class _Tally:
    """Metrics of one method under one condition, gathered picture by picture."""

    method: str
    average_precision: list[Tensor] = field(default_factory=list)  # this and the next four: [Q present]
    pointing_hit: list[Tensor] = field(default_factory=list)
    recall: list[Tensor] = field(default_factory=list)
    paired: list[Tensor] = field(default_factory=list)
    overlap: list[Tensor] = field(default_factory=list)
    absent_mass: list[Tensor] = field(default_factory=list)  # [Q absent]
    relevance: list[Tensor] = field(default_factory=list)  # [Q * N], and what it should be:
    target: list[Tensor] = field(default_factory=list)

    def add(self, scores_QN: Tensor, clean_scores_QN: Tensor, coverage_QN: Tensor, budget: float) -> None:
        present_Q = coverage_QN.sum(-1) > 0
        scores_QN, clean_scores_QN, coverage_QN = (
            each[present_Q] for each in (scores_QN, clean_scores_QN, coverage_QN)
        )
        labels_QN = metrics.token_labels(coverage_QN)
        self.average_precision.append(metrics.average_precision(scores_QN, labels_QN))
        self.pointing_hit.append(metrics.pointing_hit(scores_QN, coverage_QN))
        self.recall.append(metrics.recall_at_budget(scores_QN, coverage_QN, budget))
        self.paired.append(metrics.paired_difference(scores_QN, labels_QN))
        self.overlap.append(metrics.top_k_overlap(scores_QN, clean_scores_QN, budget))

    def add_relevance(self, relevance_QN: Tensor, coverage_QN: Tensor) -> None:
        self.relevance.append(relevance_QN.flatten())
        self.target.append(coverage_QN.flatten())
        self.absent_mass.append(relevance_QN[coverage_QN.sum(-1) == 0].mean(-1))

    def scores(self, condition: str, seed: int) -> MethodScores:
        calibration_error = math.nan
        if self.relevance:
            relevance, target = torch.cat(self.relevance), torch.cat(self.target)
            calibration_error = float(metrics.expected_calibration_error(relevance, target))
        interval = metrics.bootstrap_interval(
            torch.stack([values.sum() for values in self.average_precision]),
            torch.tensor([len(values) for values in self.average_precision]),
            generator=_generator(seed, "bootstrap"),  # the same resamples for every row
        )
        return MethodScores(
            condition=condition,
            method=self.method,
            average_precision=_mean(self.average_precision),
            average_precision_interval=interval,
            pointing_hit=_mean(self.pointing_hit),
            recall=_mean(self.recall),
            paired=_mean(self.paired),
            overlap=_mean(self.overlap),
            calibration_error=calibration_error,
            absent_mass=_mean(self.absent_mass),
        )


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).nanmean()) if values else math.nan


def _generator(*key: object) -> torch.Generator:
    """A generator of its own for each key, the same on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
