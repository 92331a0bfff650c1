"""Training the last blocks of a backbone: what moves, what does not, both passes of SAM, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arrcoc import HeadConfig, RelevanceHead, RelevanceModel, TrainConfig, load_backbone, load_scorer
from arrcoc import train_relevance_model_with_sam as train
from arrcoc.backbones.base import Backbone
from arrcoc.training.distributed import Ranks
from arrcoc.training.part import TrainedPart, trainable
from arrcoc.training.update import Update
from models import tiny_model
from tiny_hf import write_folder as write_hf
from tiny_open_clip import CONVOLUTION, VIT, write_folder
from training_cases import loader

Batch = tuple[Tensor, list[list[str]], Tensor]


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "vit": f"open_clip:local-dir:{write_folder(folder / 'vit', VIT)}",
        "convolution": f"open_clip:local-dir:{write_folder(folder / 'convolution', CONVOLUTION)}",
        "clip": f"hf:{write_hf(folder / 'clip', 'clip')}",
        "siglip": f"hf:{write_hf(folder / 'siglip', 'siglip')}",
        "embedded": "embedded",
    }


def model_of(spec: str, **options: str) -> RelevanceModel:
    backbone = load_backbone(spec, **options)
    return RelevanceModel(backbone, RelevanceHead(HeadConfig(embed_dim=backbone.embed_dim)))


def batches(backbone: Backbone, num: int = 2, side: int = 4) -> list[Batch]:
    """Random pictures of side x side tokens; each of two queries covers half of them."""
    generator = torch.Generator().manual_seed(0)
    size = (side * backbone.stride[0], side * backbone.stride[1])
    made = []
    for _ in range(num):
        targets = torch.zeros(3, 2, side * side)
        targets[:, 0, : side * side // 2], targets[:, 1, side * side // 2 :] = 1, 1
        made.append((torch.rand(3, 3, *size, generator=generator), [["a red cup", "a dog"]] * 3, targets))
    return made


def config(**options: object) -> TrainConfig:
    return TrainConfig(**{"lr": 0.02, "backbone_lr_factor": 0.1, "train_blocks": 1, "schedule": "constant", **options})


@pytest.mark.parametrize("name", ["vit", "convolution", "clip", "siglip", "embedded"])
def test_blocks_learn_are_saved_and_loaded(name: str, specs: dict[str, str], tmp_path: Path) -> None:
    model = model_of(specs[name])
    frozen = model.backbone
    before = {key: value.clone() for key, value in frozen.model.state_dict().items()}
    data = batches(frozen)
    history = train(model, data, epochs=4, config=config(penalty_weight=0.0), output=tmp_path)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(torch.equal(frozen.model.state_dict()[key], value) for key, value in before.items())
    trained = model.backbone.trained_state_dict()
    assert trained and any(not torch.equal(value, before[key]) for key, value in trained.items())
    rest = {key: value for key, value in model.backbone.model.state_dict().items() if key not in trained}
    assert all(torch.equal(value, before[key]) for key, value in rest.items())
    again = RelevanceModel.from_pretrained(tmp_path)
    image, texts = data[0][0][:1], ["a dog"]
    assert torch.equal(again(image, texts), model(image, texts))
    assert not torch.equal(again.backbone(image).patches, frozen(image).patches)
    assert load_scorer(tmp_path).model.backbone.num_trained == 1
    settings = json.loads((tmp_path / "config.json").read_text())["backbone"]
    expected = {"mode": frozen.mode, "orientation": frozen.orientation, "train_blocks": 1}
    assert expected.items() <= settings.items() and settings["fingerprint"] == frozen.fingerprint()


def test_the_step_is_that_of_sam_through_blocks_and_head(specs: dict[str, str]) -> None:
    """Against SAM by hand on the whole model, float64: first gradient, ascent over both, second gradient."""
    options = config(rho=0.1, penalty_weight=0.0, base_optimizer="SGD", weight_decay=0.0, warm_up=0.0)
    model = model_of(specs["vit"]).double()
    batch = tuple(x.double() if isinstance(x, Tensor) else x for x in batches(model.backbone, 1)[0])
    model.backbone = trainable(model.backbone, 1)
    blocks = [param for param in model.backbone.parameters() if param.requires_grad]
    groups = [{"params": list(model.head.parameters())}, {"params": blocks, "lr": options.lr * 0.1}]
    part = TrainedPart(model, options, Ranks())
    update = Update(part, groups, options, Ranks())

    def gradients() -> list[Tensor | None]:
        text = model.encode_text(["a red cup", "a dog"])[None].expand(3, -1, -1)
        logits = model.compute_logits(model.backbone(batch[0]), text.double())
        return list(torch.autograd.grad(update.loss(logits, batch[2]), update.params, allow_unused=True))

    start = [param.detach().clone() for param in update.params]
    first = gradients()
    norm = torch.sqrt(sum(g.square().sum() for g in first if g is not None))
    with torch.no_grad():
        for param, g in zip(update.params, first, strict=True):
            if g is not None:
                param.add_(0.1 * g / norm)
    second = gradients()
    with torch.no_grad():
        for param, value in zip(update.params, start, strict=True):
            param.copy_(value)
    assert any(g is not None and (g - f).abs().max() > 1e-6 for f, g in zip(first, second, strict=True))
    update([part.prepare(batch, torch.Generator())])
    rates = [options.lr] * len(groups[0]["params"]) + [options.lr * 0.1] * len(blocks)
    for param, value, g, rate in zip(update.params, start, second, rates, strict=True):
        expected = value if g is None else value - rate * g
        torch.testing.assert_close(param.detach(), expected, rtol=1e-9, atol=1e-12)


def test_what_is_frozen_runs_once_a_batch(specs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(specs["vit"])
    counts = {"encode_features": 0, "finish": 0}
    for name in counts:
        original = getattr(Backbone, name)

        def counted(self: Backbone, *args: object, _name: str = name, _original: object = original) -> object:
            counts[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(Backbone, name, counted)
    train(model, batches(model.backbone, 3), epochs=1, config=config())
    # Three steps of two passes, two looks at the sharpness, three batches of calibration.
    assert counts == {"encode_features": 3 + 3, "finish": 3 * 2 + 2 + 3}


def test_noise_is_the_same_in_every_pass_and_new_in_every_batch(specs: dict[str, str]) -> None:
    model = model_of(specs["vit"])
    model.backbone = trainable(model.backbone, 1)
    part = TrainedPart(model, config(penalty_weight=0.1), Ranks())
    (batch,) = batches(model.backbone, 1)
    generator = torch.Generator().manual_seed(0)
    first, second = part.prepare(batch, generator), part.prepare(batch, generator)
    noise = [noisy.patches - clean.patches for clean, noisy in map(part.head_inputs, (first, first, second))]
    assert torch.equal(noise[0], noise[1])
    assert (noise[0] - noise[2]).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_blocks_learn_in_narrow_precision(precision: str, specs: dict[str, str]) -> None:
    model = model_of(specs["vit"])
    history = train(model, batches(model.backbone), epochs=4, config=config(precision=precision))
    assert history[-1]["loss"] < history[0]["loss"]


def test_training_goes_on_from_a_saved_model(specs: dict[str, str], tmp_path: Path) -> None:
    model = model_of(specs["vit"])
    data = batches(model.backbone)
    train(model, data, epochs=2, config=config(), output=tmp_path)
    again = RelevanceModel.from_pretrained(tmp_path)
    before = {name: value.clone() for name, value in again.backbone.trained_state_dict().items()}
    train(again, data, epochs=1, config=config())
    assert any(not torch.equal(value, before[n]) for n, value in again.backbone.trained_state_dict().items())
    with pytest.raises(ValueError, match="train_blocks must be 1, as many as the model was trained with, got 2"):
        train(again, data, epochs=1, config=config(train_blocks=2))


def test_what_does_not_fit_is_refused(specs: dict[str, str], tmp_path: Path) -> None:
    model = model_of(specs["vit"])
    data = batches(model.backbone)
    with pytest.raises(ValueError, match=r"num_blocks must be in 1..2, got 9"):
        train(model, data, epochs=1, config=config(train_blocks=9))
    tokens = [(model.backbone(images), texts, targets) for images, texts, targets in data]
    with pytest.raises(ValueError, match="train_loader must give images to train blocks of the backbone, got tokens"):
        train(model, tokens, epochs=1, config=config())
    with pytest.raises(ValueError, match=r"backbone 'tiny' has no tower"):
        train(tiny_model(), loader(tiny_model()), epochs=1, config=config())
    several = model_of(specs["vit"])
    several.multiscale = type(several.multiscale)((0.5, 1.0))
    with pytest.raises(ValueError, match=r"scales must be \(1.0,\) to train blocks, got \(0.5, 1.0\)"):
        train(several, data, epochs=1, config=config())


def test_a_saved_model_refuses_another_mode_and_damage(specs: dict[str, str], tmp_path: Path) -> None:
    model = model_of(specs["vit"], mode="naclip")
    train(model, batches(model.backbone), epochs=1, config=config(), output=tmp_path)
    assert load_scorer(tmp_path).model.backbone.mode == "naclip"
    with pytest.raises(ValueError, match=r"was trained on tokens of mode 'naclip' and orientation \+1, got .*'raw'"):
        RelevanceModel.from_pretrained(tmp_path, backbone=load_backbone(specs["vit"], mode="raw"))
    head_alone = tmp_path / "head"
    model_of(specs["vit"], mode="naclip").save_pretrained(head_alone)
    with pytest.raises(
        ValueError, match=r"trained with 0 blocks of the backbone, got a backbone with 1 trained blocks"
    ):
        RelevanceModel.from_pretrained(head_alone, backbone=model.backbone)
    (tmp_path / "blocks.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"blocks.safetensors is missing or damaged"):
        RelevanceModel.from_pretrained(tmp_path)


def test_models_saved_before_modes_were_recorded_are_raw(specs: dict[str, str], tmp_path: Path) -> None:
    model_of(specs["vit"], mode="raw").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for name in ("mode", "orientation", "train_blocks"):
        del settings["backbone"][name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    backbone = RelevanceModel.from_pretrained(tmp_path).backbone
    assert (backbone.mode, backbone.orientation, backbone.num_trained) == ("raw", -1, 0)


def test_a_corrected_orientation_is_saved(specs: dict[str, str], tmp_path: Path) -> None:
    model = model_of(specs["vit"], mode="raw")
    model.backbone.orientation = 1  # as masks may have said
    model.save_pretrained(tmp_path)
    assert RelevanceModel.from_pretrained(tmp_path).backbone.orientation == 1
