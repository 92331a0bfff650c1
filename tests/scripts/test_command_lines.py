"""The command lines, called as functions on a tiny model: what they write, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import arrcoc
import evaluate_robustness
import score_tokens
import train_relevance
from arrcoc.assets import asset_path
from tiny_open_clip import CONVOLUTION, write_folder

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = ["--num", "3", "--epochs", "2", "--batch-size", "2", "--text-rank", "2"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"open_clip:local-dir:{write_folder(tmp_path_factory.mktemp('model'), CONVOLUTION)}"


@pytest.fixture(scope="module")
def trained(spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert train_relevance.main(["--model", spec, "--output", str(folder), *SMALL]) == 0
    return folder


def refusal(script: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why; argparse puts its usage before it."""
    try:
        code = script.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


# ---- score_tokens


def test_scoring_writes_pictures_and_numbers(trained: Path, tmp_path: Path) -> None:
    image = asset_path("photos") / "images" / "coffee.jpg"
    argv = [str(image), "--query", "a red cup", "dog", "--budget", "0.5", "--model", str(trained)]
    assert score_tokens.main([*argv, "--output", str(tmp_path)]) == 0

    names = ["000_coffee_00_a-red-cup", "000_coffee_01_dog"]
    endings = (".json", "_overlay.png", "_tokens.png")
    expected = {"overview.png"} | {f"{name}{ending}" for name in names for ending in endings}
    assert {path.name for path in tmp_path.iterdir()} == expected
    with Image.open(image) as photo, Image.open(tmp_path / f"{names[0]}_overlay.png") as overlay:
        assert overlay.size == photo.size
        rows = int(14 * photo.height / photo.width + 0.5)  # 14 tokens along the longest side

    scorer = arrcoc.load_scorer(trained)
    for name, query in zip(names, ("a red cup", "dog"), strict=True):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        result = scorer.score(image, query)
        assert (record["image"], record["query"], record["grid"]) == (str(image), query, [rows, 14])
        assert record["kept"] == result.keep(0.5).keep_indices.tolist()
        assert len(record["kept"]) == round(0.5 * rows * 14)
        for row, expected_row in zip(record["relevance"], result.relevance.tolist(), strict=True):
            assert row == pytest.approx(expected_row, abs=1e-5)


def test_pictures_of_one_name_do_not_overwrite_each_other(spec: str, tmp_path: Path) -> None:
    image = str(asset_path("photos") / "images" / "rocket.jpg")
    argv = [image, image, "--query", "?!", "--model", spec, "--output", str(tmp_path), "--budget", "7"]
    assert score_tokens.main(argv) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert len(json.loads((tmp_path / "001_rocket_00_query.json").read_text())["kept"]) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1.5"], "error: argument --budget: must be a number of tokens, or a share in (0, 1]"),
        (["--budget", "9999"], "error: budget must be in [0, 126] tokens, got 9999."),
        (["--query", " "], "error: a query must be a non-empty string, got ' '."),
        (["--scales", "0"], "error: scales must be one or more positive finite numbers, got (0.0,)."),
        (["--head", "/no/such"], "error: /no/such holds no relevance model: config.json is missing."),
        (["--device", "warp"], "error: --device must be one that this machine has, got 'warp'."),
    ],
)
def test_scoring_refuses(
    spec: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(asset_path("photos") / "images" / "rocket.jpg")
    argv = [image, "--query", "dog", "--model", spec, "--output", str(tmp_path / "new"), *options]
    assert message in refusal(score_tokens, argv, capsys)
    assert not (tmp_path / "new").exists()


def test_scoring_refuses_what_is_no_picture(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--query", "dog", "--model", spec, "--output", str(tmp_path / "new")]
    assert "no-such.jpg" in refusal(score_tokens, ["no-such.jpg", *argv], capsys)
    assert Path(__file__).name in refusal(score_tokens, [__file__, *argv], capsys)


# ---- evaluate_robustness


def test_evaluation_writes_its_three_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(trained), "--data", f"coco:{asset_path('photos')}", "--num", "2", "--severity", "2"]
    assert evaluate_robustness.main([*argv, "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "table.md", "robustness.png"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["settings"]["model"], report["num_images"], report["severity"]) == (str(trained), 2, 2)
    out = capsys.readouterr().out
    assert all(method in out for method in ("model", "zero-shot", "negated", "centre", "random"))


def test_evaluation_on_scenes_needs_no_output(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(trained), "--head", "none", "--data", "scenes", "--num", "1", "--scales", "0.5", "1"]
    assert evaluate_robustness.main(argv) == 0
    assert "1 pictures" in capsys.readouterr().out


def test_evaluation_splits_as_training_did(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"coco:{asset_path('photos')}"
    run, reading = str(tmp_path / "run"), ["--val-share", "0.6", "--split-seed", "1", "--max-coverage", "0.8"]
    assert train_relevance.main(["--model", spec, "--data", data, "--output", run, *SMALL, *reading]) == 0
    names = json.loads((tmp_path / "run" / "splits.json").read_text())["names"]
    capsys.readouterr()
    assert evaluate_robustness.main(["--model", run, "--data", data, "--split", "val"]) == 0
    assert f"{len(names['val'])} pictures" in capsys.readouterr().out
    # Its own flags go before those of the run.
    assert evaluate_robustness.main(["--model", run, "--data", data, "--split", "val", "--val-share", "0.99"]) == 0
    assert f"{len(names['train'] + names['val'])} pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "pictures"], "error: data must be one of scenes, coco:PATH"),
        (["--data", "coco:/no/such"], "error: path must be a folder with images/ in it, got '/no/such'."),
        (["--severity", "6"], "error: argument --severity: invalid choice: "),
        (["--model", "embeded"], "error: backbone must be"),
    ],
)
def test_evaluation_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(evaluate_robustness, options, capsys)


# ---- all


@pytest.mark.parametrize(
    ("name", "heavy"),
    [
        ("train_relevance", ("open_clip", "transformers", "timm", "matplotlib")),  # its flags are its settings: torch
        ("score_tokens", ("torch",)),
        ("evaluate_robustness", ("open_clip", "transformers", "timm", "matplotlib")),
    ],
)
def test_help_is_quick(name: str, heavy: tuple[str, ...]) -> None:
    """No heavy import stands between a user and the help."""
    call = f"import sys, {name}\ntry:\n {name}.main(['--help'])\nexcept SystemExit:\n "
    code = call + f"assert not {set(heavy)} & sys.modules.keys()"
    options = {"cwd": SCRIPTS, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code], check=True, **options)
    assert done.stdout.startswith("usage: ")
