"""train_relevance on a tiny model: what it writes and prints, files and flags, resuming, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import arrcoc
import train_relevance
from arrcoc.assets import asset_path
from arrcoc.config import TrainConfig
from arrcoc.evaluation.orientation import OrientationWarning
from arrcoc.training.run import read_run
from tiny_open_clip import CONVOLUTION, VIT, write_folder

SMALL = ["--num", "3", "--epochs", "2", "--batch-size", "2", "--text-rank", "2"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"open_clip:local-dir:{write_folder(tmp_path_factory.mktemp('model'), CONVOLUTION)}"


@pytest.fixture(scope="module")
def trained(spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder, "--model", spec, *SMALL) == 0
    return folder


def train(output: Path, *argv: str) -> int:
    return train_relevance.main(["--output", str(output), *argv])


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], output: Path, *argv: str) -> str:
    """The one line that says why; argparse puts its usage before it."""
    try:
        code = train(output, *argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def cut_after(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Stop the run while it prints the line of an epoch."""
    line = train_relevance._line

    def cut(record: dict[str, float]) -> str:
        if record["epoch"] == epoch:
            raise KeyboardInterrupt
        return line(record)

    monkeypatch.setattr(train_relevance, "_line", cut)


# ---- what it writes and prints


def test_training_writes_model_checkpoint_log_and_settings(spec: str, trained: Path) -> None:
    files = {"checkpoint.pt", "config.json", "head.safetensors", "log.jsonl", "run.json"}
    assert {path.name for path in trained.iterdir()} == files
    assert json.loads((trained / "config.json").read_text())["backbone"]["spec"] == spec
    log = read_log(trained)
    assert [record["epoch"] for record in log] == [1, 2]
    assert {"loss", "penalty", "lr", "sharpness", "num_skipped", "ap_held-out", "ap_photos"} <= set(log[0])
    model = arrcoc.load_scorer(trained).model
    assert model.head is not None
    run = json.loads((trained / "run.json").read_text())
    assert run["backbone"] == {"spec": spec, "mode": "raw", "fingerprint": model.backbone.fingerprint()}
    assert run["data"] == {"train": {"num_samples": 3}, "val": {"num_samples": 1}}
    assert run["orientation"] == {"declared": 1, "masks say": None}  # one picture says nothing
    assert run["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_wrong_sign_is_reported_and_kept_with_the_model(tmp_path: Path) -> None:
    turned = ["--num", "12", "--val-share", "0.8", "--epochs", "1", "--orientation", "-1", "--text-rank", "0"]
    with pytest.warns(OrientationWarning, match=r"declares orientation -1, but masks say \+1"):
        assert train(tmp_path, *turned) == 0
    judged = json.loads((tmp_path / "run.json").read_text())["orientation"]
    assert judged["declared"] == -1 and judged["masks say"]["orientation"] == 1
    assert judged["masks say"]["ap_positive"] > judged["masks say"]["ap_negative"]
    assert arrcoc.load_scorer(tmp_path).model.backbone.orientation == -1


def test_training_reports_each_epoch_and_both_scores(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = asset_path("photos")
    options = ["--data", f"coco:{photos}", "--epochs", "1", "--optimizer", "asam", "--rho", "0.5"]
    options += ["--val-share", "0.3", "--test-share", "0.3"]
    assert train(tmp_path, "--model", spec, *options) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("train: ", "val: "))]
    assert lines[0].startswith("epoch   1  loss ")
    assert lines[2].split() == ["AP", "over", "tokens", "zero-shot", "trained"]
    trained_ap = read_log(tmp_path)[0]
    for line, name in zip(lines[3:5], ("held-out", "photos"), strict=True):
        assert line.split()[0] == name and line.split()[2] == f"{trained_ap[f'ap_{name}']:.3f}"
    splits = json.loads((tmp_path / "splits.json").read_text())["names"]
    names = {path.name for path in (photos / "images").iterdir()}
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == sorted(names) and splits["test"]
    assert read_run(tmp_path).train == TrainConfig(epochs=1, optimizer="asam", rho=0.5)


def test_curves_and_overlays_are_written_on_request(spec: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert train(tmp_path, "--model", spec, *SMALL, "--overlays", "1", "--tensorboard") == 0
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == ["epoch_001.png", "epoch_002.png"]
    with Image.open(tmp_path / "overlays" / "epoch_001.png") as sheet:
        assert sheet.width > sheet.height  # the answer and the model's map, side by side
    assert list((tmp_path / "tensorboard").iterdir())


def test_tokens_kept_on_disk_give_the_same_run(spec: str, trained: Path, tmp_path: Path) -> None:
    for output in ("first", "second"):
        assert train(tmp_path / output, "--model", spec, *SMALL, "--cache", str(tmp_path / "cache")) == 0
        assert read_log(tmp_path / output) == read_log(trained)


def test_what_is_skipped_is_said_and_written_down(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = asset_path("photos") / "images"
    lines = [
        {"image": str(path), "text": "a thing", "boxes": [[10, 10, 200, 200]]} for path in sorted(images.glob("*.jpg"))
    ]
    lines.insert(1, {"image": "absent.jpg", "text": "a thing", "boxes": [[10, 10, 200, 200]]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = ["--data", f"manifest:{tmp_path / 'data.jsonl'}", "--val-share", "0.5", "--split-seed", "3", *SMALL]
    assert "absent.jpg" in refusal(capsys, tmp_path / "new", "--model", spec, *argv)
    assert train(tmp_path / "run", "--model", spec, *argv, "--on-error", "skip") == 0
    assert "1 skipped: " in capsys.readouterr().out
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert sum(sum(part["skipped"].values()) for part in data.values()) >= 1


def test_pictures_change_and_queries_vary_on_request(spec: str, trained: Path, tmp_path: Path) -> None:
    options = ["--augment", "--augment-options", "flip=1", "rotation=0", "--templates", "--workers", "1"]
    for output in ("a", "b"):
        assert train(tmp_path / output, "--model", spec, *SMALL, *options) == 0
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert read_log(tmp_path / "a")[0]["loss"] != read_log(trained)[0]["loss"]


# ---- files and flags


def test_file_and_flags_agree(spec: str, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = {{ backbone = "{spec}" }}\nreading = {{ num = 3 }}\nloader = {{ batch_size = 7 }}\n'
        "[head]\ntext_rank = 2\n[train]\nepochs = 2\n"
    )
    assert train(tmp_path / "a", "--config", str(file), "--batch-size", "2") == 0
    assert read_log(tmp_path / "a") == read_log(trained)
    # What a run wrote down is a file of settings as well.
    assert train(tmp_path / "b", "--config", str(tmp_path / "a" / "run.json")) == 0
    assert read_log(tmp_path / "b") == read_log(trained)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 2", "error: unknown setting 'train.epoch': did you mean 'train.epochs'?"),
        ("[train]\nlr = 'fast'", "error: train.lr must be a number, got 'fast'."),
        ("train = 3", "error: train must be a section, got 3."),
        ("[reading]\nseed = 3", "error: unknown setting 'reading.seed': "),
        ("= 3", "is not valid TOML: "),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert message in refusal(capsys, tmp_path / "new", "--config", str(tmp_path / "run.toml"))


# ---- resuming


@pytest.mark.parametrize("repeated", [True, False])
def test_resume_goes_on_where_the_run_was_cut(
    repeated: bool,
    spec: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--model", spec, *SMALL]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(patch, 1)
        train(tmp_path, *argv)
    assert len(read_log(tmp_path)) == 1
    assert train(tmp_path, *(argv if repeated else []), "--resume") == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")] == ["2"]
    assert read_log(tmp_path) == read_log(trained)
    assert (tmp_path / "head.safetensors").read_bytes() == (trained / "head.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1"], "train.lr must be 0.003, as in"),
        (["--num", "4"], "reading.num must be 3, as in"),
        (["--config", "settings.toml"], "no settings file at settings.toml"),
    ],
)
def test_resume_refuses_another_run(
    options: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_log(trained)
    assert message in refusal(capsys, trained, "--resume", *options)
    assert read_log(trained) == before


def test_a_run_is_not_written_over(spec: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in trained.iterdir()}
    message = refusal(capsys, trained, "--model", spec, *SMALL, "--lr", "1")
    assert "holds a run: resume it, or choose another folder." in message
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


def test_resume_refuses_pictures_that_changed(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", spec, "--data", f"coco:{asset_path('photos')}", "--epochs", "1"]
    assert train(tmp_path, *argv) == 0
    from arrcoc.data.splits import Splits, read_splits, write_splits

    splits = read_splits(tmp_path / "splits.json")
    names = {**splits.names, "train": (*splits.names["train"], "gone.jpg")}
    write_splits(tmp_path / "splits.json", Splits(seed=splits.seed, shares=splits.shares, names=names))
    assert "the pictures of coco:" in refusal(capsys, tmp_path, "--resume")


# ---- blocks of the backbone


def test_blocks_are_trained_validated_resumed_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"open_clip:local-dir:{write_folder(tmp_path / 'model', VIT)}"
    argv = ["--model", spec, *SMALL, "--train-blocks", "1", "--backbone-lr-factor", "1"]
    assert train(tmp_path / "a", *argv) == 0
    assert (tmp_path / "a" / "blocks.safetensors").is_file()
    tuned, plain = arrcoc.load_scorer(tmp_path / "a"), arrcoc.load_scorer(spec)
    photo = asset_path("photos") / "images" / "rocket.jpg"
    assert not torch.equal(tuned.encode_image(photo).patches, plain.encode_image(photo).patches)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(patch, 1)
        train(tmp_path / "b", *argv)
    assert train(tmp_path / "b", "--resume") == 0
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    for name in ("head", "blocks"):
        files = [tmp_path / run / f"{name}.safetensors" for run in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "coco"], "error: data must be one of "),
        (["--data", "coco:/no/such"], "error: path must be a folder with images/ in it, got '/no/such'."),
        (["--optimizer", "adam"], "error: optimizer must be one of 'sam', 'asam', "),
        (["--optimizer-options", "k"], "argument --optimizer-options: must be KEY=VALUE, got 'k'"),
        (["--base-optimizer", "Adm"], "error: base_optimizer must name a class of torch.optim, got 'Adm'."),
        (["--loss", "hinge"], "error: loss must be one of 'bce', 'mse', 'listwise', 'smooth_ap', got 'hinge'."),
        (["--rho", "-1"], "error: rho must be >= 0, got -1.0."),
        (["--seed", "-1"], "error: seed must be an integer >= 0, got -1."),
        (["--device", "warp"], "error: --device must be one that this machine has, got 'warp'."),
        (["--resume"], "error: no checkpoint to resume from at"),
        (["--model", "open_clip:local-dir:/no/such"], "error: open_clip local-dir '/no/such' is not a folder."),
        (["--epoch", "1"], "error: unrecognized arguments: --epoch 1"),
        (["--epochs", "0"], "error: epochs must be an integer >= 1, got 0."),
        (["--batch-size", "0"], "error: batch_size must be an integer >= 1, got 0."),
        (["--num", "x"], "error: argument --num: invalid int value: 'x'"),
        (["--augment-options", "flip=0"], "error: augment must be true for augment_options, got {'flip': 0}"),
        (["--augment", "--augment-options", "flop=0"], "error: augment_options must be arguments of Relevance"),
        (["--patience", "1", "--monitor", "ap"], "error: monitor must be one of ap_held-out, ap_photos, got 'ap'."),
        (
            ["--data", f"coco:{asset_path('photos')}", "--val-share", "0.01"],
            "error: data must have pictures for training and validation, got 4 in train, 0 in val: choose",
        ),
        (["--train-blocks", "99", "--num", "2"], "error: num_blocks must be in 1.."),
    ],
)
def test_training_refuses(
    options: list[str], message: str, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv: list[Any] = options if "--model" in options else ["--model", spec, *options]
    assert message in refusal(capsys, tmp_path / "new", *argv)
    assert not (tmp_path / "new").exists()
