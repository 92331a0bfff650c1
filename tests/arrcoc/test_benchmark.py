"""The benchmark and its report on a scorer whose tokens are mean colours, so that the right answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from arrcoc.data.sample import RelevanceSample
from arrcoc.evaluation import CONDITIONS, METHODS, BenchmarkReport, evaluate, format_table, plot, save_report
from arrcoc.evaluation.report import _number, _spread
from arrcoc.images import to_tensor
from arrcoc.tokens import VisualTokens

COLOURS = ("red", "green", "blue")


class ColourModel:
    """Relevance = how much of the token has the colour of the query; without its head the sign is wrong."""

    def __init__(self, head: bool = True) -> None:
        self.head = head

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[COLOURS.index(text) for text in texts]]

    def compute_logits(self, visual_tokens: VisualTokens, text_embedding: Tensor) -> Tensor:
        own = torch.einsum("bnd,bqd->bqn", visual_tokens.patches, text_embedding)
        others = torch.einsum("bnd,bqd->bqn", visual_tokens.patches, 1 - text_embedding)
        relevance = (own - others).clamp(0, 1)
        return (relevance if self.head else 1 - relevance).logit()

    def compute_relevance(self, visual_tokens: VisualTokens, text_embedding: Tensor) -> Tensor:
        return self.compute_logits(visual_tokens, text_embedding).sigmoid()

    def zero_shot(self) -> ColourModel:
        return ColourModel(head=False)


class ColourScorer:
    """Tokens are the mean colours of 8 x 8 pixels; counts the pictures it has looked at."""

    def __init__(self) -> None:
        self.model = ColourModel()
        self.num_encoded = 0

    def encode_image(self, image: Image.Image) -> VisualTokens:
        self.num_encoded += 1
        grid = (image.height // 8, image.width // 8)
        patches = adaptive_avg_pool2d(to_tensor(image), grid).flatten(1).T[None]
        return VisualTokens(patches, patches.mean(1), grid)


def _scene(seed: int, colours: tuple[str, ...] = ("red", "green")) -> RelevanceSample:
    """Two coloured squares on black, 64 x 96; asks for every colour, so that blue is absent."""
    generator = torch.Generator().manual_seed(seed)
    image, masks = torch.zeros(3, 64, 96), torch.zeros(3, 64, 96, dtype=torch.bool)
    for number, colour in enumerate(colours):
        top, left = (int(torch.randint(limit, (), generator=generator)) for limit in (40, 24))
        area = (slice(top, top + 20), slice(48 * number + left, 48 * number + left + 20))
        masks[(COLOURS.index(colour), *area)] = True
    image[masks] = 1
    return RelevanceSample(image=image, queries=COLOURS, masks=masks, name=f"scene {seed}")


SAMPLES = [_scene(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def report() -> BenchmarkReport:
    return evaluate(ColourScorer(), SAMPLES)


def test_a_right_model_gets_the_right_numbers(report: BenchmarkReport) -> None:
    assert (report.num_images, report.num_queries, report.num_absent) == (12, 24, 12)
    model = report.row("clean", "model")
    assert model.average_precision == model.pointing_hit == 1
    assert (model.recall, model.overlap) == pytest.approx((1, 1), abs=1e-12)
    assert model.average_precision_interval == (1, 1)
    assert model.calibration_error == pytest.approx(0, abs=1e-6)
    assert model.absent_mass == 0
    assert model.paired > 0.9


def test_the_sign_of_the_zero_shot_map_shows(report: BenchmarkReport) -> None:
    zero_shot, negated = report.row("clean", "zero-shot"), report.row("clean", "negated")
    assert zero_shot.average_precision < 0.1
    assert zero_shot.absent_mass == 1
    assert negated.average_precision == 1
    assert zero_shot.calibration_error > 0.9
    assert math.isnan(negated.calibration_error)
    assert math.isnan(negated.absent_mass)


def test_a_saturated_map_keeps_its_rank_and_loses_its_calibration() -> None:
    class Saturated(ColourModel):
        def compute_relevance(self, visual_tokens: VisualTokens, text_embedding: Tensor) -> Tensor:
            return torch.ones_like(self.compute_logits(visual_tokens, text_embedding))

    scorer = ColourScorer()
    scorer.model = Saturated()
    row = evaluate(scorer, SAMPLES, conditions=("clean",)).row("clean", "model")
    assert row.average_precision == 1
    assert row.absent_mass == 1
    assert row.calibration_error > 0.9


def test_baselines_that_do_not_look_score_chance_and_do_not_hear(report: BenchmarkReport) -> None:
    prevalence = 20 * 20 / (64 * 96)
    for condition in CONDITIONS:
        centre, random = report.row(condition, "centre"), report.row(condition, "random")
        assert centre == replace(report.row("clean", "centre"), condition=condition)
        assert centre.paired == 0
        assert centre.overlap == 1
        assert random.average_precision == pytest.approx(prevalence, abs=0.08)
        assert random.recall == pytest.approx(0.25, abs=0.08)
        assert random.overlap == (1 if condition == "clean" else pytest.approx(0.25, abs=0.06))


def test_every_condition_and_method_has_a_row_and_perturbations_hurt(report: BenchmarkReport) -> None:
    assert report.conditions == CONDITIONS
    assert report.methods == METHODS
    assert [(row.condition, row.method) for row in report.rows] == [(c, m) for c in CONDITIONS for m in METHODS]
    for condition in ("token_noise", "gaussian_noise", "blur"):
        assert report.row(condition, "model").overlap < 1, condition
        assert report.row(condition, "model").calibration_error > 1e-4, condition


def test_one_vision_pass_a_picture_and_corruption() -> None:
    scorer = ColourScorer()
    evaluate(scorer, SAMPLES[:2], conditions=("clean", "token_noise"))
    assert scorer.num_encoded == 2
    evaluate(scorer, SAMPLES[:2])
    assert scorer.num_encoded == 2 + 2 * (1 + 5)


def test_numbers_depend_on_the_seed_and_not_on_the_other_conditions(report: BenchmarkReport) -> None:
    alone = evaluate(ColourScorer(), SAMPLES, conditions=("gaussian_noise", "clean"))
    assert alone.conditions == ("gaussian_noise", "clean")
    for row in alone.rows:
        assert repr(row) == repr(report.row(row.condition, row.method))  # repr: nan equals nan
    other = evaluate(ColourScorer(), SAMPLES, conditions=("clean",), seed=1)
    assert other.row("clean", "random") != report.row("clean", "random")
    assert other.row("clean", "centre").average_precision == report.row("clean", "centre").average_precision


def test_severity_and_budget_are_used() -> None:
    mild, harsh = (evaluate(ColourScorer(), SAMPLES, conditions=("token_noise",), severity=level) for level in (1, 5))
    mild_row, harsh_row = (each.row("token_noise", "model") for each in (mild, harsh))
    assert harsh_row.average_precision < mild_row.average_precision
    assert harsh_row.overlap < mild_row.overlap
    narrow = evaluate(ColourScorer(), SAMPLES, conditions=("clean",), budget=4)
    assert 0.3 < narrow.row("clean", "model").recall < 0.7  # 4 tokens of 64 pixels, objects of 400


def test_pictures_of_any_kind_of_queries() -> None:
    nothing = replace(SAMPLES[0], queries=(), masks=SAMPLES[0].masks[:0])
    only_absent = replace(SAMPLES[0], queries=("blue",), masks=SAMPLES[0].masks[2:])
    one = replace(SAMPLES[0], queries=("red",), masks=SAMPLES[0].masks[:1])
    report = evaluate(ColourScorer(), [nothing, only_absent, one], conditions=("clean",))
    assert (report.num_images, report.num_queries, report.num_absent) == (2, 1, 1)
    assert report.row("clean", "model").average_precision == 1
    assert math.isnan(report.row("clean", "model").paired)
    absent = evaluate(ColourScorer(), [only_absent])
    assert math.isnan(absent.row("clean", "model").average_precision)
    assert absent.to_dict()["rows"][0]["average_precision"] is None
    assert " - " in format_table(absent)


def test_evaluation_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    evaluate(ColourScorer(), SAMPLES[:1])
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_say_what_is_wrong(report: BenchmarkReport) -> None:
    with pytest.raises(ValueError, match=r"conditions must be some of clean, token_noise, .* got \('fog',\)\."):
        evaluate(ColourScorer(), SAMPLES, conditions=("fog",))
    with pytest.raises(ValueError, match=r"conditions must be some of .* got \(\)\."):
        evaluate(ColourScorer(), SAMPLES, conditions=())
    with pytest.raises(ValueError, match=r"severity must be 1, 2, 3, 4 or 5, got 0\."):
        evaluate(ColourScorer(), SAMPLES, conditions=("clean",), severity=0)
    with pytest.raises(ValueError, match=r"samples must hold at least one query, got none in 0 pictures\."):
        evaluate(ColourScorer(), [])
    with pytest.raises(ValueError, match=r"budget must be in \[0, 96\] tokens, got 97\."):
        evaluate(ColourScorer(), SAMPLES, budget=97)
    with pytest.raises(ValueError, match=r"must hold condition 'fog' with method 'model', and does not\."):
        report.row("fog", "model")


def test_the_table_is_aligned_and_shows_the_numbers(report: BenchmarkReport) -> None:
    text = format_table(report)
    blocks = text.split("\n\n")
    assert blocks[0].startswith(
        "12 pictures, 24 queries in the picture, 12 absent; severity 3, budget 25% of the tokens"
    )
    for table in (blocks[2], blocks[4]):
        assert len({len(line) for line in table.splitlines()}) == 1
    assert max(map(len, text.splitlines())) <= 120
    centre = report.row("clean", "centre").average_precision
    assert next(line for line in blocks[2].splitlines() if line.startswith("centre")).split()[1] == f"{centre:.3f}"[1:]
    assert blocks[4].splitlines()[-1].startswith("mean but clean")


def test_the_markdown_table_has_one_cell_a_column(report: BenchmarkReport) -> None:
    blocks = format_table(report, markdown=True).split("\n\n")
    for table, columns in ((blocks[2], 8), (blocks[4], 8)):
        assert {line.count("|") for line in table.splitlines()} == {columns + 1}
        assert table.splitlines()[1].replace("-", "").replace(" ", "") == "|" + "|" + ":|" * (columns - 1)


def test_save_report_writes_json_table_and_plot(report: BenchmarkReport, tmp_path) -> None:
    save_report(report, tmp_path / "new" / "folder", settings={"model": "colours"})
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "robustness.png", "table.md"]
    saved = json.loads((folder / "report.json").read_text())
    assert saved["settings"] == {"model": "colours"}
    assert saved["rows"] == report.to_dict()["rows"]
    assert saved["rows"][3]["calibration_error"] is None  # centre: not calibrated
    assert (folder / "table.md").read_text() == format_table(report, markdown=True) + "\n"
    with Image.open(folder / "robustness.png") as picture:
        assert picture.width > 1000


def test_plot_takes_one_condition_and_no_pyplot(tmp_path) -> None:
    import sys

    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot(evaluate(ColourScorer(), SAMPLES[:2], conditions=("blur",)), tmp_path / "one.png")
    plot(evaluate(ColourScorer(), [_scene(0, colours=())], conditions=("clean", "blur")), tmp_path / "absent.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert had_pyplot or "matplotlib.pyplot" not in sys.modules


def test_numbers_have_three_digits() -> None:
    assert list(map(_number, (0.4081, -0.0121, 1.0, -1e-5, 10.0, math.nan))) == [
        ".408",
        "-.012",
        "1.000",
        ".000",
        "10.000",
        "-",
    ]


def test_labels_keep_their_distance() -> None:
    spread = _spread({"a": 0.5, "b": 0.51, "c": 0.1, "d": 0.52, "e": 0.9}, 0.1)
    assert spread == pytest.approx({"c": 0.1, "a": 0.41, "b": 0.51, "d": 0.61, "e": 0.9})
