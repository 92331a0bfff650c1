"""Training the head: losses, exact resume, what is logged, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from arrcoc import RelevanceModel, TrainConfig, encode_samples, train_relevance_model_with_sam
from arrcoc.config import LOSSES
from arrcoc.training.checkpoint import load_checkpoint, save_checkpoint
from models import TinyBackbone, tiny_model
from training_cases import COLOURS, loader, samples


@pytest.mark.parametrize(
    ("optimizer", "loss"), [*(("sam", loss) for loss in LOSSES), ("asam", "listwise"), ("none", "listwise")]
)
def test_training_lowers_the_loss(optimizer: str, loss: str) -> None:
    model = tiny_model()
    config = TrainConfig(optimizer=optimizer, loss=loss, lr=0.03)
    history = train_relevance_model_with_sam(model, loader(model), epochs=8, rho=0.02, config=config)
    assert [record["epoch"] for record in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert all(record["sharpness"] >= -1e-6 for record in history)


def test_only_the_head_learns_and_pictures_pass_once() -> None:
    model = tiny_model()
    data = loader(model)
    passes = model.backbone.num_image_passes
    before = model.backbone.model.basis.detach().clone()
    train_relevance_model_with_sam(model, data, epochs=3)
    assert model.backbone.num_image_passes == passes
    assert torch.equal(model.backbone.model.basis, before)


def test_images_pass_once_a_batch_although_sam_makes_two_passes() -> None:
    model = tiny_model()
    batches = [(torch.rand(2, 3, 32, 32), ["red", "blue"], torch.rand(2, 16)) for _ in range(3)]
    train_relevance_model_with_sam(model, batches, epochs=2)
    assert model.backbone.num_image_passes == 3 * (2 + 1)  # two epochs and the calibration


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    config = TrainConfig(lr=0.03, penalty_weight=0.5)
    whole = tiny_model()
    history = train_relevance_model_with_sam(whole, loader(whole), epochs=4, config=config, output=tmp_path / "a")

    class Stop(Exception):
        pass

    def stop_after_two(model: RelevanceModel) -> dict[str, float]:
        stop_after_two.calls += 1
        if stop_after_two.calls == 3:
            raise Stop
        return {}

    stop_after_two.calls = 0
    broken = tiny_model()
    with pytest.raises(Stop):
        train_relevance_model_with_sam(
            broken, loader(broken), epochs=4, config=config, output=tmp_path / "b", evaluate=stop_after_two
        )
    resumed = tiny_model()
    again = train_relevance_model_with_sam(
        resumed, loader(resumed), epochs=4, config=config, output=tmp_path / "b", resume=True
    )
    assert again == history
    for name, value in whole.head.state_dict().items():
        assert torch.equal(resumed.head.state_dict()[name], value), name


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    """The calibration, too, sees the batches of the last epoch: three queries a sample, one shown."""

    def run(resume: bool) -> dict[str, torch.Tensor]:
        model = tiny_model()
        data = encode_samples(model, samples(), batch_size=3, num_queries=1)
        train_relevance_model_with_sam(model, data, epochs=3, output=tmp_path, resume=resume)
        assert model.head is not None
        return model.head.state_dict()

    first, again = run(resume=False), run(resume=True)
    for name, value in first.items():
        assert torch.equal(again[name], value), name


def test_resume_refuses_another_head_and_other_data(tmp_path: Path) -> None:
    model = tiny_model()
    train_relevance_model_with_sam(model, loader(model), epochs=1, output=tmp_path)
    with pytest.raises(
        ValueError,
        match=r"the checkpoint's head_config.text_rank must be 2, got 0: resume with the settings of its run",
    ):
        train_relevance_model_with_sam(tiny_model(text_rank=2), loader(model), epochs=1, output=tmp_path, resume=True)
    fewer = encode_samples(model, samples(2), batch_size=3, num_queries=2)
    with pytest.raises(ValueError, match="the checkpoint's num_batches must be 1, got 3"):
        train_relevance_model_with_sam(tiny_model(), fewer, epochs=1, output=tmp_path, resume=True)


def test_samples_are_encoded_by_a_narrow_backbone() -> None:
    model = tiny_model()
    model.backbone.to(torch.bfloat16)
    assert encode_samples(model, samples(2)).tokens.patches.dtype == torch.float32


def test_output_holds_the_model_and_the_log(tmp_path: Path) -> None:
    model = tiny_model()
    history = train_relevance_model_with_sam(
        model, loader(model), epochs=2, output=tmp_path, evaluate=lambda _: {"val_ap": 0.5}
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == history
    assert lines[0]["val_ap"] == 0.5
    again = RelevanceModel.from_pretrained(tmp_path, backbone=TinyBackbone())
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(image, ["red"]), model(image, ["red"]))


def test_resume_refuses_other_settings_and_damage(tmp_path: Path) -> None:
    model = tiny_model()
    train_relevance_model_with_sam(model, loader(model), epochs=1, output=tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint's config.epochs must be 2, got 1"):
        train_relevance_model_with_sam(model, loader(model), epochs=2, output=tmp_path, resume=True)
    with pytest.raises(ValueError, match="output must be given to resume"):
        train_relevance_model_with_sam(model, loader(model), epochs=1, resume=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        train_relevance_model_with_sam(model, loader(model), epochs=1, output=tmp_path / "other", resume=True)


def test_checkpoints_are_data_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.ones(2)})
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(2))
    torch.save({"format": "arrcoc-training-2", "code": Path("x")}, path)
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is damaged or not a checkpoint"):
        load_checkpoint(path)
    torch.save({"other": 1}, path)
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"n": 1})
    with pytest.raises(Exception, match=r"pickle|lambda|local object"):
        save_checkpoint(path, {"n": lambda: 2})
    assert load_checkpoint(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    model = tiny_model()
    train_relevance_model_with_sam(model, loader(model), epochs=1, output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds a run: resume it, or choose another folder"):
        train_relevance_model_with_sam(model, loader(model), epochs=2, output=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_resume_removes_what_a_killed_run_was_just_writing(tmp_path: Path) -> None:
    model = tiny_model()
    train_relevance_model_with_sam(model, loader(model), epochs=1, output=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    (tmp_path / ".checkpoint.8fk2.pt").write_bytes(b"half a check")
    train_relevance_model_with_sam(model, loader(model), epochs=1, output=tmp_path, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_loader_is_the_same_for_the_same_epoch() -> None:
    data = loader(tiny_model())
    assert len(data) == 3
    first = [(texts, targets) for _, texts, targets in data]
    again = [(texts, targets) for _, texts, targets in data]
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    data.set_epoch(1)
    other = [texts for _, texts, _ in data]
    assert other != [texts for texts, _ in first]


def test_loader_targets_are_the_coverage_of_the_chosen_queries() -> None:
    model = tiny_model()
    everything = samples()
    data = encode_samples(model, everything, batch_size=3, num_queries=5)  # more than the 3 there are: some repeat
    seen = 0
    for tokens, texts, targets in data:
        assert targets.shape == (len(tokens), 5, 16)
        for patches, row, target in zip(tokens.patches, texts, targets, strict=True):
            matches = [n for n in range(8) if torch.equal(data.tokens.patches[n], patches)]
            assert len(matches) == 1
            sample = everything[matches[0]]
            assert set(row) == set(COLOURS)
            for text, one in zip(row, target, strict=True):
                mask = sample.masks[COLOURS.index(text)].float()[None, None]
                torch.testing.assert_close(one, F.avg_pool2d(mask, 8).flatten())
                seen += 1
    assert seen == 40


def test_bad_training_input() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="model must have a head to train"):
        train_relevance_model_with_sam(tiny_model(head=False), loader(model))
    with pytest.raises(ValueError, match=r"targets must have shape \[2, 1, 16\], got \[2, 1, 9\]"):
        batch = (torch.rand(2, 3, 32, 32), ["red", "blue"], torch.rand(2, 9))
        train_relevance_model_with_sam(model, [batch], epochs=1)
    with pytest.raises(ValueError, match="train_loader must yield at least one batch"):
        train_relevance_model_with_sam(model, [], epochs=1)
    with pytest.raises(ValueError, match="train_loader must have a length"):
        train_relevance_model_with_sam(model, iter([]), epochs=1)
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        encode_samples(model, [])
