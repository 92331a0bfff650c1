"""The assembly: shapes, text cache, components, saving and refusing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arrcoc import FlatnessAwareMultiScale, HeadConfig, RelevanceHead, RelevanceModel, RelevanceRobustness, VisualTokens
from models import TinyBackbone, tiny_model


def stripes() -> torch.Tensor:
    """Image [1, 3, 32, 32]: left half red, right half blue."""
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, :, :16], image[:, 2, :, 16:] = 1, 1
    return image


def test_relevance_follows_the_query() -> None:
    model = tiny_model()
    red, blue = model(stripes().expand(2, -1, -1, -1), ["red", "blue"]).view(2, 4, 4)
    assert bool((red[:, :2] > 0.8).all() and (red[:, 2:] < 0.2).all())
    torch.testing.assert_close(blue, red.flip(1))


def test_inputs_of_every_kind_agree() -> None:
    model = tiny_model()
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    tokens, text = model.encode_image(images), model.encode_text(["red", "green"])
    expected = model.compute_relevance(tokens, text)
    assert expected.shape == (2, 8)
    torch.testing.assert_close(model.compute_relevance(images, text), expected)
    torch.testing.assert_close(model.compute_relevance(tokens.patches, text, grid=(2, 4)), expected)
    torch.testing.assert_close(model(images, ["red", "green"]), expected)
    both = model.compute_relevance(tokens, text.expand(2, 2, -1))  # [B, Q, D]
    torch.testing.assert_close(torch.stack([both[0, 0], both[1, 1]]), expected)
    many = model.compute_relevance(tokens.select(torch.tensor([0])), text)  # one image, two texts
    torch.testing.assert_close(many[0], expected[0])
    one = model.compute_relevance(tokens, text[:1])  # two images, one text
    torch.testing.assert_close(one[0], expected[0])


def test_bad_shapes_are_named() -> None:
    model = tiny_model()
    text = model.encode_text(["red"])
    with pytest.raises(ValueError, match=r"visual_tokens must be VisualTokens, tokens \[B, N, 3\] or images"):
        model.compute_relevance(torch.zeros(1, 4, 5), text)
    with pytest.raises(ValueError, match="grid must be given for 6 tokens, which do not make a square"):
        model.compute_relevance(torch.zeros(1, 6, 3), text)
    with pytest.raises(ValueError, match=r"text_embedding must have shape \[B, 3\] or \[B, Q, 3\], got \[1, 4\]"):
        model.compute_relevance(torch.zeros(1, 4, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="text_embedding must be for 3 images, got 2"):
        model.compute_relevance(torch.zeros(3, 4, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="got the single string 'red'"):
        model.encode_text("red")
    with pytest.raises(ValueError, match=r"head must take embeddings of width 3 .*, got one of width 7"):
        RelevanceModel(TinyBackbone(), RelevanceHead(HeadConfig(embed_dim=7)))


def test_texts_are_encoded_once() -> None:
    model = tiny_model()
    first = model.encode_text(["red", "blue", "red"])
    torch.testing.assert_close(first[0], first[2])
    model.encode_text(["blue", "green"])
    assert model.backbone.num_encoded_texts == 3


def test_embeddings_of_other_weights_are_forgotten() -> None:
    model = tiny_model()
    before = model.encode_text(["red"])
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    model.backbone.model.basis.data[0] = torch.tensor([0.0, 1.0, 0.0])
    assert not torch.equal(model.encode_text(["red"]), before)


def test_zero_shot_shares_the_backbone_and_has_no_head() -> None:
    model = tiny_model()
    assert model.zero_shot().backbone is model.backbone
    assert model.zero_shot().head is None


def test_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model = tiny_model(text_rank=2, objectness_dim=2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.multiscale = FlatnessAwareMultiScale((0.5, 1.0))
    model.robustness = RelevanceRobustness(rho=0.3)
    model.save_pretrained(tmp_path / "model")
    again = RelevanceModel.from_pretrained(tmp_path / "model", backbone=TinyBackbone())
    assert torch.equal(again(stripes(), ["red"]), model(stripes(), ["red"]))
    assert again.multiscale.scales == (0.5, 1.0)
    assert again.robustness.rho == 0.3
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "head.safetensors"]


def test_a_head_refuses_another_backbone(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    other = TinyBackbone()
    with torch.no_grad():
        other.model.basis.mul_(2)
    with pytest.raises(ValueError, match="a head only fits the weights it was trained on"):
        RelevanceModel.from_pretrained(tmp_path, backbone=other)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no relevance model: config.json is missing"):
        RelevanceModel.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"head.safetensors is missing or damaged"):
        RelevanceModel.from_pretrained(tmp_path, backbone=TinyBackbone())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"format": "other"}))
    with pytest.raises(ValueError, match=r"must have format 'arrcoc-relevance-1', got 'other'"):
        RelevanceModel.from_pretrained(tmp_path, backbone=TinyBackbone())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        RelevanceModel.from_pretrained(tmp_path, backbone=TinyBackbone())


def test_robust_relevance_is_the_change_under_noise() -> None:
    model, robustness = tiny_model(), RelevanceRobustness(rho=0.5)
    tokens, text = model.encode_image(torch.rand(2, 3, 32, 32)), model.encode_text(["red", "blue"])
    generator = torch.Generator().manual_seed(3)
    relevance, penalty = robustness.compute_robust_relevance(model, tokens, text, generator=generator)
    torch.testing.assert_close(relevance, model.compute_relevance(tokens, text))
    noise = torch.randn(tokens.patches.shape, generator=torch.Generator().manual_seed(3))
    scale = tokens.patches.square().mean((1, 2), keepdim=True).sqrt()
    moved = model.compute_relevance(tokens.patches + 0.5 * scale * noise, text)
    torch.testing.assert_close(penalty, (relevance - moved).abs().mean())
    _, none = RelevanceRobustness(rho=0.0).compute_robust_relevance(model, tokens, text)
    assert none.item() == 0


def test_noise_reaches_every_scale() -> None:
    model = tiny_model()
    model.multiscale = FlatnessAwareMultiScale((0.5, 1.0))
    tokens = model.multiscale.fuse({s: model.encode_image(torch.rand(1, 3, 32, 32)) for s in (0.5, 1.0)})
    text = model.encode_text(["red"])
    _, penalty = RelevanceRobustness(0.5).compute_robust_relevance(model, tokens, text)
    assert penalty.item() > 0


def test_temperature_grows_with_sharpness() -> None:
    robustness = RelevanceRobustness()
    assert robustness.temperature_from_sharpness(0.5, base_temperature=2.0) == 3.0
    temperature = robustness.temperature_from_sharpness(torch.tensor([0.0, 1.0]))
    assert temperature.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="sharpness must be >= 0, got -1"):
        robustness.temperature_from_sharpness(-1.0)
    with pytest.raises(ValueError, match="base_temperature must be > 0, got 0"):
        robustness.temperature_from_sharpness(1.0, base_temperature=0.0)
    with pytest.raises(ValueError, match="rho must be"):
        RelevanceRobustness(-0.1)


def test_multiscale_reports_every_scale_on_one_grid() -> None:
    model = tiny_model()
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    text = model.encode_text(["red", "blue"])
    result = FlatnessAwareMultiScale((0.5, 1.0, 2.0)).process_with_flatness(model, images, text)
    assert result["combined_relevance"].shape == (2, 4, 3)
    assert set(result["per_scale"]) == set(result["weights"]) == {0.5, 1.0, 2.0}
    for scale in (0.5, 1.0, 2.0):
        assert result["per_scale"][scale].shape == (2, 4, 3)
        assert result["sharpness"][scale].shape == (2,)
    torch.testing.assert_close(sum(result["weights"].values()), torch.ones(2))
    torch.testing.assert_close(result["per_scale"][1.0].flatten(1), model.compute_relevance(images, text))
    # Weights are inverse to sharpness, image by image.
    products = torch.stack([result["weights"][s] * result["sharpness"][s] for s in (0.5, 1.0, 2.0)])
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-4, atol=0)


def test_one_scale_is_the_plain_model() -> None:
    model = tiny_model()
    images, text = torch.rand(1, 3, 32, 32), model.encode_text(["green"])
    result = FlatnessAwareMultiScale((1.0,)).process_with_flatness(model, images, text)
    torch.testing.assert_close(result["combined_relevance"].flatten(1), model.compute_relevance(images, text))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((), r"scales must be one or more positive finite numbers, got \(\)"),
        ((1.0, -2.0), "scales must be one or more positive finite numbers"),
        ((1.0, float("inf")), "scales must be one or more positive finite numbers"),
        ((1.0, 1.0), "scales must differ from each other"),
    ],
)
def test_bad_scales(scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatnessAwareMultiScale(scales)


def test_moving_a_model_keeps_tokens_and_head_together() -> None:
    model = tiny_model().double()
    tokens = model.encode_image(torch.rand(1, 3, 32, 32).double())
    assert isinstance(tokens, VisualTokens)
    assert model.compute_relevance(tokens, model.encode_text(["red"])).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_heads_of_every_kind_work_in_every_type(dtype: torch.dtype) -> None:
    model = tiny_model(text_rank=2, affinity_dim=2, objectness_dim=2)
    image = stripes()
    expected = model(image, ["red"])  # and the text is in the cache now
    moved = model.to(dtype)
    assert (moved(image.to(dtype), ["red"]).float() - expected).abs().max() < 0.1


def test_a_rounded_model_keeps_the_fingerprint_of_its_weights(tmp_path: Path) -> None:
    model = tiny_model()
    fingerprint = TinyBackbone().fingerprint()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert model.backbone.fingerprint() == fingerprint
    assert RelevanceModel.from_pretrained(tmp_path, backbone=TinyBackbone()).head is not None
