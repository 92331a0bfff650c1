"""The scorer: one pass a picture, exact budgets, every way in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrcoc import FlatnessAwareMultiScale, RelevanceResult, RelevanceScorer, load_scorer
from models import tiny_model


def picture(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    return Image.fromarray(pixels)


def scorer(scales: tuple[float, ...] = (1.0,)) -> RelevanceScorer:
    model = tiny_model()
    model.multiscale = FlatnessAwareMultiScale(scales)
    return RelevanceScorer(model)


def test_score_follows_picture_and_query() -> None:
    result = scorer().score(picture(), "red")
    assert result.grid == (2, 4)
    assert result.relevance.dtype == torch.float32
    torch.testing.assert_close(result.relevance, torch.sigmoid(result.logits))
    assert bool((result.relevance[:, :2] > 0.8).all() and (result.relevance[:, 2:] < 0.3).all())
    assert result.query == "red"


def test_every_kind_of_picture_scores_the_same(tmp_path: Path) -> None:
    one = scorer()
    picture().save(tmp_path / "p.png")
    array = np.asarray(picture())
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    expected = one.score(picture(), "red").relevance
    for image in (tmp_path / "p.png", str(tmp_path / "p.png"), array, tensor):
        assert torch.equal(one.score(image, "red").relevance, expected)


def test_many_queries_cost_one_pass() -> None:
    one = scorer()
    results = one.score_queries(picture(), ["red", "green", "blue"])
    assert one.model.backbone.num_image_passes == 1
    for result in results:
        torch.testing.assert_close(result.relevance, one.score(picture(), result.query).relevance)


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0, 2.0)])
def test_batches_agree_with_single_scores(scales: tuple[float, ...]) -> None:
    one = scorer(scales)
    pictures = [picture(), picture(20, 40), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    results = one.score_batch(pictures, ["red", "blue", "red"])
    for image, result in zip(pictures, results, strict=True):
        torch.testing.assert_close(result.relevance, one.score(image, result.query).relevance)
    one.model.backbone.num_image_passes = 0
    one.score_batch(pictures, ["red", "blue", "red"])
    assert one.model.backbone.num_image_passes == 2 * len(scales)  # two shapes


def test_scales_agree_with_the_component() -> None:
    one = scorer((0.5, 1.0))
    image = one.preprocess(picture())
    expected = one.model.multiscale.process_with_flatness(one.model, image, one.model.encode_text(["red"]))
    # A picture of two flat colours is the same at every size but for the seam.
    combined = expected["combined_relevance"][0]
    torch.testing.assert_close(one.score(picture(), "red").relevance, combined, atol=0.05, rtol=0)


def test_long_batches_go_in_pieces_and_empty_ones_are_empty() -> None:
    one = scorer()
    results = one.score_batch([picture()] * 40, ["red", "blue"] * 20)
    assert one.model.backbone.num_image_passes == 3
    torch.testing.assert_close(results[39].relevance, one.score(picture(), "blue").relevance)
    assert one.score_batch([], []) == []


def test_preprocess_is_what_the_backbone_takes() -> None:
    one = scorer()
    image = one.preprocess(picture())
    assert image.shape == (1, 3, 16, 32)
    assert one.model.backbone(image).grid == (2, 4)
    assert image.min() >= 0 and image.max() <= 1


def test_keep_is_exact() -> None:
    result = scorer().score(picture(), "red")
    assert result.keep(3).num_kept == 3
    assert result.keep(4).keep_indices.tolist() == [0, 1, 4, 5]
    assert result.keep(0.5).keep_indices.tolist() == [0, 1, 4, 5]
    mass = result.keep(mass=0.5)
    kept = result.relevance.flatten()[mass.keep_indices].sum()
    assert kept >= 0.5 * result.relevance.sum()
    with pytest.raises(ValueError, match="exactly one of budget and mass must be given, got budget=None, mass=None"):
        result.keep()
    with pytest.raises(ValueError, match=r"exactly one of budget and mass must be given, got budget=3, mass=0\.5"):
        result.keep(3, mass=0.5)
    with pytest.raises(ValueError, match=r"budget must be in \[0, 8\] tokens, got 9"):
        result.keep(9)


def test_keep_ranks_by_logits_where_relevance_saturates() -> None:
    logits = torch.tensor([[200.0, 300.0, 100.0]])
    result = RelevanceResult(relevance=torch.sigmoid(logits), logits=logits, query="x", image=picture())
    assert bool((result.relevance == 1).all())
    assert result.keep(1).keep_indices.tolist() == [1]


def test_other_grids_and_pictures_of_the_result() -> None:
    result = scorer().score(picture(), "red")
    finer = result.resample((4, 8))
    assert finer.grid == (4, 8)
    torch.testing.assert_close(finer.relevance, torch.sigmoid(finer.logits))
    assert bool((finer.relevance[:, :3] > 0.8).all())
    assert result.heatmap().shape == (20, 40)
    assert result.overlay().size == (40, 20)
    with pytest.raises(ValueError, match=r"grid must be \(height, width\) with both >= 1, got \(0, 3\)"):
        result.resample((0, 3))


def test_bad_queries() -> None:
    with pytest.raises(ValueError, match="got the single string 'red'"):
        scorer().score_queries(picture(), "red")
    with pytest.raises(ValueError, match="a query must be a non-empty string, got '  '"):
        scorer().score(picture(), "  ")
    with pytest.raises(ValueError, match="images and queries must be pairs, got 1 images and 2 queries"):
        scorer().score_batch([picture()], ["red", "blue"])


def test_scoring_leaves_no_graph_and_no_mode() -> None:
    one = scorer()
    assert not one.score(picture(), "red").logits.requires_grad
    assert not one.model.training


def test_batches_take_any_iterable_and_refuse_a_single_picture(tmp_path: Path) -> None:
    one = scorer()
    results = one.score_batch((picture() for _ in range(2)), iter(["red", "blue"]))
    assert [result.query for result in results] == ["red", "blue"]
    picture().save(tmp_path / "p.png")
    for single in (picture(), str(tmp_path / "p.png"), tmp_path / "p.png"):
        with pytest.raises(ValueError, match="images must be several pictures, got a single one, "):
            one.score_batch(single, ["red"])  # type: ignore[arg-type]


@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0)])
def test_prepared_pictures_score_as_pictures_do(scales: tuple[float, ...]) -> None:
    one = scorer(scales)
    pictures = [picture(), picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture()]
    levels = {scale: torch.cat([one.preprocess(p, scale=scale) for p in pictures]) for scale in scales}
    queries = [["red"], ["blue", "green"], ["green"]]
    one.model.backbone.num_image_passes = 0
    logits = one.score_images(levels, queries)
    assert one.model.backbone.num_image_passes == len(scales)
    for maps, image, texts in zip(logits, pictures, queries, strict=True):
        expected = torch.stack([result.logits for result in one.score_queries(image, texts)])
        torch.testing.assert_close(maps, expected)


def test_prepared_pictures_that_do_not_fit() -> None:
    one = scorer()
    images = one.preprocess(picture())
    with pytest.raises(ValueError, match=r"levels must be the scales \(1\.0,\), got \(0\.5,\)\."):
        one.score_images({0.5: images}, [["red"]])
    with pytest.raises(ValueError, match=r"queries must be given for each picture, got 1 pictures and 2 lists\."):
        one.score_images({1.0: images}, [["red"], ["blue"]])
    with pytest.raises(ValueError, match="queries must hold at least one text, got none"):
        one.score_images({1.0: images}, [[]])


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (0.5, (0.5,)),
        (np.float32(0.5), (0.5,)),
        (np.array([0.5, 1.0]), (0.5, 1.0)),
        (torch.tensor([1.0]), (1.0,)),
        ([1], (1.0,)),
    ],
)
def test_scales_may_be_any_numbers(scales: Any, expected: tuple[float, ...]) -> None:
    assert load_scorer(scales=scales).scales == expected


@pytest.mark.parametrize("scales", ["half", [[0.5], [1.0]], [1.0, "x"]])
def test_scales_that_are_no_numbers(scales: Any) -> None:
    with pytest.raises(ValueError, match="scales must be a number or a list of numbers, got "):
        load_scorer(scales=scales)


def test_scales_that_are_numbers_but_no_scales() -> None:
    for scales in ([], [0.0], [float("nan")], -1, None):
        with pytest.raises(ValueError, match="scales must be one or more positive finite numbers, got "):
            load_scorer(scales=scales)


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backbone must be"):
        load_scorer("embeded")
    for folder in (tmp_path, str(tmp_path), tmp_path / "absent", str(tmp_path / "absent"), Path("absent")):
        with pytest.raises(FileNotFoundError, match=r"holds no relevance model: config\.json is missing"):
            load_scorer(folder)
