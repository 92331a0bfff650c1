"""What a run leaves to read: lines that survive a cut, curves, overlays."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from arrcoc import train_relevance_model_with_sam
from arrcoc.training.overlays import Overlays
from arrcoc.training.run_log import JsonLines, TensorBoard
from arrcoc.viz import contact_sheet, overlay
from models import tiny_model
from training_cases import loader, samples


def test_a_line_is_added_and_what_is_there_stays(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    log.append({"epoch": 1, "loss": 0.5})
    before = (tmp_path / "log.jsonl").read_bytes()
    log.append({"epoch": 2, "loss": 0.25})
    after = (tmp_path / "log.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["epoch"] for line in after.splitlines()] == [1, 2]


def test_a_resume_drops_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')  # cut in the middle of a line, after the checkpoint
    log = JsonLines(path, [{"epoch": 1}])
    log.append({"epoch": 2, "loss": 1.0})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2, "loss": 1.0}\n'


def test_a_log_holds_json_alone(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"epoch": 1, "loss": float("nan")})
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_curves_hold_every_number_and_a_resume_replaces_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last_epoch, values in ((0, [4.0, 3.0, 9.0]), (2, [2.0])):  # a run cut after its third epoch, resumed after two
        board = TensorBoard(tmp_path, last_epoch=last_epoch)
        for number, value in enumerate(values, start=last_epoch + 1):
            board(None, {"epoch": number, "loss": value, "ap_val": value / 10})
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "ap_val"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoard logs need tensorboard: pip install 'arrcoc\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_overlays_show_the_answer_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[list[tuple[Image.Image, str]]] = []

    def recorded(tiles: list[tuple[Image.Image, str]], columns: int) -> Image.Image:
        sheets.append(tiles)
        return contact_sheet(tiles, columns=columns)

    monkeypatch.setattr("arrcoc.training.overlays.contact_sheet", recorded)
    model, pictures = tiny_model(), samples(2)
    train_relevance_model_with_sam(model, loader(model), epochs=2, callbacks=[Overlays(tmp_path, pictures)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_001.png", "epoch_002.png"]
    assert [caption for _, caption in sheets[1]] == ["red: answer", "red: model"] * 2
    (answer, _), (relevance, _) = sheets[1][2:]
    sample = pictures[1]
    photo = Image.fromarray((sample.image * 255).round().byte().permute(1, 2, 0).numpy())
    share = F.avg_pool2d(sample.masks[0].float()[None, None], 8)[0, 0]
    assert answer.tobytes() == overlay(photo, share).tobytes()
    with torch.no_grad():
        logits = model.compute_logits(sample.image[None], model.encode_text(["red"])).view(4, 4)
    drawn = overlay(photo, (logits - logits.min()) / (logits.max() - logits.min()))
    # The head was calibrated after the last sheet, which does not change the shape of a map.
    assert np.abs(np.asarray(relevance, float) - np.asarray(drawn, float)).max() <= 1


def test_no_pictures_make_no_sheet(tmp_path: Path) -> None:
    Overlays(tmp_path / "none", [])(tiny_model(), {"epoch": 1})
    assert not (tmp_path / "none").exists()
