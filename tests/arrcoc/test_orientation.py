"""The sign of a backbone's similarity against masks: estimated, confirmed, contradicted, refused."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from arrcoc import RelevanceModel, load_scorer
from arrcoc.data import RelevanceSample, sample_photos
from arrcoc.evaluation.orientation import OrientationWarning, check_first, check_orientation, estimate_orientation
from models import TinyBackbone

COLOURS = ("red", "green", "blue")


def coloured_scene(seed: int, present: int = 3) -> RelevanceSample:
    """Noise of 4 x 4 tokens with one patch of each of the first ``present`` colours; all three are asked for."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, 32, 32, generator=generator) * 0.6
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    cells = torch.randperm(16, generator=generator)[:present].tolist()
    for number, cell in enumerate(cells):
        rows, columns = (slice(8 * part, 8 * part + 8) for part in divmod(cell, 4))
        image[:, rows, columns] = 0.1
        image[number, rows, columns] = 0.9
        masks[number, rows, columns] = True
    return RelevanceSample(image=image, queries=COLOURS, masks=masks, name=f"scene {seed}")


SCENES = [coloured_scene(seed) for seed in range(5)]


def test_the_sign_is_found_whatever_is_declared() -> None:
    backbone = TinyBackbone()
    for declared in (1, -1):
        backbone.orientation = declared
        estimate = estimate_orientation(backbone, SCENES)
        assert (estimate.orientation, estimate.declared, estimate.agrees) == (1, declared, declared == 1)
        assert (estimate.num_queries, estimate.num_images, estimate.num_skipped) == (15, 5, 0)
        assert estimate.confidence == 1.0 and estimate.ap_positive > 0.9 > 0.1 > estimate.ap_negative
    assert backbone.orientation == -1  # nothing is changed


def test_a_turned_model_is_found_out() -> None:
    backbone = TinyBackbone()
    upright = estimate_orientation(backbone, SCENES)
    with torch.no_grad():
        backbone.model.basis[:, :] = -torch.eye(3)  # tokens turn with the texts: no change
    assert estimate_orientation(backbone, SCENES) == upright
    backbone._encode_texts = lambda texts: -TinyBackbone._encode_texts(backbone, texts)
    turned = estimate_orientation(backbone, SCENES)
    assert turned == dataclasses.replace(
        upright, orientation=-1, ap_positive=upright.ap_negative, ap_negative=upright.ap_positive
    )


def test_precisions_are_those_of_scikit_learn() -> None:
    backbone = TinyBackbone()
    seed = torch.Generator().manual_seed(0)  # with others, rounding to eight bits ties or parts two tokens
    faint = [dataclasses.replace(sample, image=torch.rand(sample.image.shape, generator=seed)) for sample in SCENES]
    estimate = estimate_orientation(backbone, faint)
    expected = []
    for sample in faint:
        tokens = backbone(sample.image[None]).patches[0].numpy()
        for colour, mask in enumerate(sample.masks.numpy()):
            labels = mask.reshape(4, 8, 4, 8).mean((1, 3)).ravel() > 0.5
            expected.append([average_precision_score(labels, sign * tokens[:, colour]) for sign in (1, -1)])
    torch.testing.assert_close(estimate.ap_positive, float(np.mean(expected, 0)[0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(estimate.ap_negative, float(np.mean(expected, 0)[1]), atol=1e-6, rtol=0)


class Moody(TinyBackbone):
    """Turned for bright pictures."""

    def _encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches, pooled = super()._encode_pixels(pixels)
        return (patches if pixels.mean() < 0.5 else -patches), pooled


def test_confidence_is_the_share_of_draws_that_agree() -> None:
    """Four pictures, one of which contradicts, against all 4^4 draws."""
    scenes = SCENES[:3]
    bright = dataclasses.replace(SCENES[3], image=SCENES[3].image * 0.5 + 0.5)
    single = [estimate_orientation(Moody(), [scene] * 4, num_bootstrap=1) for scene in [*scenes, bright]]
    gains = [estimate.ap_positive - estimate.ap_negative for estimate in single]
    assert min(gains[:3]) > 0 > gains[3]
    signs = [np.sign(sum(gains[pick] for pick in picks)) for picks in itertools.product(range(4), repeat=4)]
    estimate = estimate_orientation(Moody(), [*scenes, bright], num_bootstrap=20_000)
    assert estimate.orientation == 1
    assert abs(estimate.confidence - (1 + np.mean(signs)) / 2) < 0.01  # three standard errors
    assert estimate == estimate_orientation(Moody(), [*scenes, bright], num_bootstrap=20_000)
    assert estimate.confidence != estimate_orientation(Moody(), [*scenes, bright], seed=1, num_bootstrap=99).confidence
    doubted = Moody()
    doubted.orientation = -1
    assert not check_orientation(doubted, [*scenes, bright]).agrees  # not sure enough to warn
    with pytest.warns(OrientationWarning, match=r"\(8\d% of bootstrap draws\)"):
        check_orientation(doubted, [*scenes, bright], min_confidence=0.8)


def test_absent_queries_and_those_that_cover_all_are_counted_and_left_out() -> None:
    covered = dataclasses.replace(SCENES[0], masks=torch.ones(3, 32, 32, dtype=torch.bool))
    unasked = RelevanceSample(
        image=torch.rand(3, 32, 32), queries=(), masks=torch.zeros(0, 32, 32, dtype=torch.bool), name="unasked"
    )
    some = [coloured_scene(seed, present=2) for seed in range(5)]

    def stream() -> Iterator[RelevanceSample]:
        yield from [*some, covered, unasked]

    estimate = estimate_orientation(TinyBackbone(), stream())
    assert (estimate.num_queries, estimate.num_images, estimate.num_skipped) == (10, 5, 5 + 3)


def test_a_wrong_sign_is_reported() -> None:
    backbone = TinyBackbone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_orientation(backbone, SCENES).agrees
        backbone.orientation = -1
        assert not estimate_orientation(backbone, SCENES).agrees  # only check_orientation speaks up
    with pytest.warns(
        OrientationWarning,
        match=r"'tiny' in mode 'raw' declares orientation -1, but masks say \+1: AP is \d\.\d\d\d for s and "
        r"0\.\d\d\d for -s over 15 queries in 5 pictures \(100% of bootstrap draws\)\. "
        r"Set backbone\.orientation = \+1, or load",
    ):
        estimate = check_orientation(RelevanceModel(backbone), SCENES)
    backbone.orientation = estimate.orientation
    assert check_orientation(backbone, SCENES).agrees


def test_a_command_checks_the_first_samples_if_there_are_masks_enough() -> None:
    backbone = TinyBackbone(logit_bias=None)
    scenes = [coloured_scene(seed) for seed in range(40)]
    seen = []
    estimate = check_first(backbone, (seen.append(number) or scene for number, scene in enumerate(scenes)))
    assert estimate is not None and estimate.orientation == 1
    assert seen == list(range(32))
    assert check_first(backbone, scenes[:3]) is None


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"at least 8 queries with a mask in at least 4 pictures, got 9 in 3 \(0 left out: absent, or"
    ):
        estimate_orientation(TinyBackbone(), SCENES[:3])
    few = [coloured_scene(seed, present=1) for seed in range(5)]
    with pytest.raises(ValueError, match=r"got 5 in 5 \(10 left out"):
        estimate_orientation(TinyBackbone(), few)
    with pytest.raises(ValueError, match=r"got 0 in 0 \(0 left out"):
        estimate_orientation(TinyBackbone(), [])
    with pytest.raises(ValueError, match=r"num_bootstrap must be >= 1, got 0\."):
        estimate_orientation(TinyBackbone(), SCENES, num_bootstrap=0)
    with pytest.raises(ValueError, match=r"min_confidence must be in \[0, 1\], got 95\."):
        check_orientation(TinyBackbone(), SCENES, min_confidence=95)
    with pytest.raises(ValueError, match=r"backbone must be a Backbone, or have one as \.backbone, got Linear\."):
        estimate_orientation(torch.nn.Linear(1, 1), SCENES)


def test_the_embedded_model_is_upright_on_the_sample_photos() -> None:
    backbone = load_scorer(head=None).model.backbone
    estimate = check_orientation(backbone, sample_photos())
    assert estimate.orientation == estimate.declared == 1
    assert estimate.num_images == 4 and estimate.num_queries == 14 and estimate.confidence >= 0.95
    encode = backbone._encode_texts
    backbone._encode_texts = lambda texts: -encode(texts)
    with pytest.warns(OrientationWarning, match=r"'embedded' .* declares orientation \+1, but masks say -1"):
        assert not check_orientation(backbone, sample_photos()).agrees
