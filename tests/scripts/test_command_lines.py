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


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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


# ---- train_relevance


def test_training_writes_model_checkpoint_and_log(spec: str, trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "checkpoint.pt",
        "config.json",
        "head.safetensors",
        "log.jsonl",
    }
    assert json.loads((trained / "config.json").read_text())["backbone"]["spec"] == spec
    log = read_log(trained)
    assert [record["epoch"] for record in log] == [1, 2]
    assert {"loss", "penalty", "lr", "sharpness", "ap_held-out", "ap_photos"} <= set(log[0])
    assert arrcoc.load_scorer(trained).model.head is not None


def test_training_reports_each_epoch_and_both_scores(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = asset_path("photos")
    options = ["--data", f"coco:{photos}", "--epochs", "1", "--optimizer", "asam", "--rho", "0.5"]
    assert train_relevance.main(["--model", spec, "--output", str(tmp_path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch   1  loss ")
    assert lines[2].split() == ["AP", "over", "tokens", "zero-shot", "trained"]
    trained_ap = read_log(tmp_path)[0]
    for line, name in zip(lines[3:5], ("held-out", "photos"), strict=True):
        assert line.split()[0] == name and line.split()[2] == f"{trained_ap[f'ap_{name}']:.3f}"


def test_resume_goes_on_where_the_run_was_cut(
    spec: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", spec, "--output", str(tmp_path), *SMALL]

    def cut(record: dict[str, float]) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_relevance, "_line", cut)
        train_relevance.main(argv)
    assert len(read_log(tmp_path)) == 1
    assert train_relevance.main([*argv, "--resume"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")] == ["2"]
    assert read_log(tmp_path) == read_log(trained)
    assert (tmp_path / "head.safetensors").read_bytes() == (trained / "head.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "coco"], "error: --data must be scenes or coco:PATH, got 'coco'."),
        (["--data", "coco:/no/such"], "error: path must be a folder with images/ in it, got '/no/such'."),
        (["--optimizer", "adam"], "error: optimizer must be one of sam, asam, none, got 'adam'."),
        (["--base-optimizer", "Adm"], "error: base_optimizer must name a class of torch.optim, got 'Adm'."),
        (["--loss", "hinge"], "error: loss must be one of bce, mse, listwise, got 'hinge'."),
        (["--rho", "-1"], "error: rho must be >= 0, got -1.0."),
        (["--seed", "-1"], "error: seed must be >= 0, got -1."),
        (["--device", "warp"], "error: --device must be one that this machine has, got 'warp'."),
        (["--resume"], "error: no checkpoint to resume from at"),
        (["--model", "open_clip:local-dir:/no/such"], "error: open_clip local-dir '/no/such' is not a folder."),
        (["--epochs", "0"], "error: argument --epochs: must be a whole number >= 1, got '0'"),
        (["--num", "x"], "error: argument --num: must be a whole number >= 1, got 'x'"),
    ],
)
def test_training_refuses(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(train_relevance, ["--output", str(tmp_path / "new"), *options], capsys)
    assert not (tmp_path / "new").exists()


def test_resume_refuses_another_run(spec: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", spec, "--output", str(trained), *SMALL, "--lr", "1", "--resume"]
    assert "error: the checkpoint's config must be" in refusal(train_relevance, argv, capsys)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "pictures"], "error: --data must be scenes, photos or coco:PATH, got 'pictures'."),
        (["--data", "coco:/no/such"], "error: path must be a folder with images/ in it, got '/no/such'."),
        (["--severity", "6"], "error: argument --severity: invalid choice: "),
        (["--model", "embeded"], "error: backbone must be"),
    ],
)
def test_evaluation_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(evaluate_robustness, options, capsys)


# ---- all


@pytest.mark.parametrize("name", ["train_relevance", "score_tokens", "evaluate_robustness"])
def test_help_is_quick(name: str) -> None:
    """No heavy import stands between a user and the help."""
    code = "import sys, {0}\ntry:\n {0}.main(['--help'])\nexcept SystemExit:\n assert 'torch' not in sys.modules"
    options = {"cwd": SCRIPTS, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code.format(name)], check=True, **options)
    assert done.stdout.startswith("usage: ")
