"""open_clip backbones against open_clip itself: other sizes, poolings and projections; names, tags and files."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arrcoc.backbones import OpenClipBackbone, load_backbone
from arrcoc.backbones.open_clip_towers import check_config
from tiny_open_clip import COCA, CONVOLUTION, EVA02, SIGLIP, VIT, build_model, timm_tower, write_folder

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def varied(config: dict[str, Any], **vision: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["vision_cfg"].update(vision)
    return changed


def tokenize(texts: list[str]) -> Tensor:
    """Any eight numbers below the tiny vocabularies, closed by the convolution's end-of-text number."""
    return torch.tensor([[len(text) % 10, 3, 0, 0, 0, 0, 0, 0] for text in texts])


def wrap(config: dict[str, Any], mode: str | None = None) -> OpenClipBackbone:
    return OpenClipBackbone(build_model(config), tokenize, spec="test", mode=mode, **PLAIN)


def random_images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def patches_by_open_clip(model: Any, pixels: Tensor) -> Tensor:
    """Projected patches by open_clip's public way to intermediate features."""
    with torch.no_grad():
        output = model.forward_intermediates(
            image=pixels, image_indices=1, normalize_intermediates=True, image_output_fmt="NLC"
        )
        return output["image_intermediates"][0] @ model.visual.proj


@pytest.mark.parametrize(
    ("vision", "orientation", "normalized"),
    [
        ({}, -1, True),
        ({"no_ln_pre": True}, -1, True),
        ({"patch_dropout": 0.5}, -1, True),
        ({"ls_init_value": 0.1}, -1, True),
        ({"pos_embed_type": "sin_cos_2d"}, -1, True),
        ({"final_ln_after_pool": True}, -1, True),
        ({"pool_type": "avg"}, 1, False),
        ({"pool_type": "avg", "final_ln_after_pool": True}, 1, True),
        ({"qk_norm": True, "scale_heads": True, "scale_attn_inner": True}, -1, True),
        ({"scale_attn": True, "scale_fc": True, "ls_init_value": 0.1}, -1, True),
    ],
    ids=str,
)
def test_transformer_equals_open_clip(vision: dict[str, Any], orientation: int, normalized: bool) -> None:
    backbone = wrap(varied(VIT, **vision), mode="raw")
    images = random_images(32, 32)
    tokens = backbone(images)
    patches = patches_by_open_clip(backbone.model, images)
    assert (backbone.orientation, backbone.normalize_patches) == (orientation, normalized)
    expected = F.normalize(patches, dim=-1) if normalized else patches
    torch.testing.assert_close(tokens.patches, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        embedding = backbone.model.encode_image(images)
    torch.testing.assert_close(tokens.pooled, embedding, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (16, 48), (40, 24), (8, 8)])
def test_transformer_at_other_sizes_equals_open_clip_built_for_them(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = write_folder(tmp_path, VIT)
    backbone = load_backbone(f"open_clip:local-dir:{folder}", mode="raw")
    resized = open_clip.create_model(f"local-dir:{folder}", force_image_size=size).eval()
    images = random_images(*size)
    pixels = (images - torch.tensor(backbone.mean)[:, None, None]) / torch.tensor(backbone.std)[:, None, None]
    tokens = backbone(images)
    expected = F.normalize(patches_by_open_clip(resized, pixels), dim=-1)
    torch.testing.assert_close(tokens.patches, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(tokens.pooled, resized.encode_image(pixels), atol=1e-5, rtol=1e-5)
    assert tokens.grid == (size[0] // 8, size[1] // 8)


def test_transformer_native_grid_and_patches_need_not_be_square() -> None:
    backbone = wrap(varied(VIT, image_size=[32, 48], patch_size=[8, 16]), mode="raw")
    images = random_images(32, 48)
    assert backbone.stride == (8, 16) and backbone.tokens_per_side == 4
    assert backbone(images).grid == (4, 3)
    expected = F.normalize(patches_by_open_clip(backbone.model, images), dim=-1)
    torch.testing.assert_close(backbone(images).patches, expected, atol=1e-5, rtol=1e-5)
    assert backbone.input_size(100, 100) == (32, 32) and backbone.input_size(50, 100) == (32, 64)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (128, 64)])
def test_convolution_tokens_are_the_projected_features(size: tuple[int, int]) -> None:
    model = build_model(CONVOLUTION)
    backbone = OpenClipBackbone(model, tokenize, spec="test", **PLAIN)
    images = random_images(*size)
    visual: Any = model.visual
    with torch.no_grad():
        expected = visual.head(visual.trunk.forward_features(images).permute(0, 2, 3, 1)).flatten(1, 2)
        embedding = model.encode_image(images)
    tokens = backbone(images)
    torch.testing.assert_close(tokens.patches, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.pooled, embedding, atol=1e-5, rtol=1e-5)
    assert tokens.grid == (size[0] // 32, size[1] // 32)
    assert backbone.tokens_per_side == 14 and not backbone.normalize_patches


@pytest.mark.parametrize(
    ("vision", "normalized"),
    [
        ({"timm_proj": ""}, False),
        ({"timm_proj": "mlp"}, True),
        ({"timm_model_name": "test_convnext", "timm_pool": ""}, True),
        ({"timm_model_name": "test_convnext", "timm_proj": ""}, True),
    ],
    ids=str,
)
def test_a_convolution_token_is_the_embedding_of_its_own_cell(vision: dict[str, Any], normalized: bool) -> None:
    backbone = wrap(varied(CONVOLUTION, **vision))
    images = random_images(64, 96)
    visual: Any = backbone.model.visual
    with torch.no_grad():
        features = visual.trunk.forward_features(images)
        cell = visual.head(visual.trunk.forward_head(features[:, :, 1:, 2:]))
        torch.testing.assert_close(backbone(images).pooled, backbone.model.encode_image(images), atol=1e-5, rtol=1e-5)
    assert backbone.normalize_patches == normalized
    expected = F.normalize(cell, dim=-1) if normalized else cell
    torch.testing.assert_close(backbone(images).patches[:, 5], expected, atol=1e-5, rtol=1e-5)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer must be the model's own, but its numbers do not fit: .*77"):
        OpenClipBackbone(build_model(VIT), open_clip.tokenize, spec="test", **PLAIN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            varied(VIT, attentional_pool="parallel", attn_pooler_heads=2, width=24, head_width=12),
            "VisionTransformer with attentional pooling 'parallel' is not supported. Towers that work:",
        ),
        (varied(VIT, scaled_cosine_attn=True), "VisionTransformer with scaled_cosine_attn is not supported"),
        (varied(VIT, pool_type="none"), "VisionTransformer with pool_type 'none' is not supported"),
        (
            varied(VIT, layers=[1, 1, 1, 1], width=8, image_size=64),
            "ModifiedResNet is not supported. Towers that work:",
        ),
        (timm_tower("test_vit2", "max"), "timm VisionTransformer is not supported: it pools by 'max'. Towers that w"),
        (
            timm_tower("deit_tiny_distilled_patch16_224", "token"),
            "timm VisionTransformerDistilled is not supported: it is not a convolutional tower",
        ),
        (varied(CONVOLUTION, timm_pool="max"), "not a convolutional tower with average pooling"),
        (varied(CONVOLUTION, timm_model_name="resnet10t", timm_pool="abs_attn"), "timm ResNet is not supported"),
    ],
    ids=["parallel", "cosine", "none", "resnet", "max", "distilled", "maximum", "abs_attn"],
)
def test_towers_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(config)


def test_timm_transformers_with_other_parts_are_refused() -> None:
    """What EVA02-E (norms behind), gated attention, mixed rotations and ViTamin (a convolution before) would be."""
    changes: list[tuple[Callable[[Any], None], str]] = [
        (lambda trunk: trunk.blocks.__setitem__(1, nn.Identity()), "its blocks are Identity"),
        (lambda trunk: setattr(trunk.blocks[1], "attn", nn.Identity()), "its attention is Identity"),
        (lambda trunk: setattr(trunk.blocks[1].attn, "gate", nn.Identity()), "its attention is gated or shares keys"),
        (lambda trunk: setattr(trunk, "rope", nn.Identity()), "its positions are rotated by Identity"),
        (lambda trunk: setattr(trunk, "patch_embed", nn.Identity()), "its patches come from Identity"),
    ]
    for change, reason in changes:
        model: Any = build_model(EVA02)
        change(model.visual.trunk)
        model.eval()
        with pytest.raises(ValueError, match=f"image tower timm Eva is not supported: {reason}.*Towers that work:"):
            OpenClipBackbone(model, tokenize, spec="test", **PLAIN)


@pytest.mark.parametrize("rest", ["EVA02-E-14/laion2b_s4b_b115k", "RN50/openai", "ViTamin-B/datacomp1b"])
def test_towers_are_refused_before_their_weights_are_fetched(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: pytest.fail("asked for the weights"))
    with pytest.raises(ValueError, match=rf"image tower of '{rest.partition('/')[0]}' is not supported. Towers that w"):
        load_backbone(f"open_clip:{rest}")


@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32", "ViT-L-14-CLIPA", "roberta-ViT-B-32", "convnext_base_w", "MobileCLIP-S1", "ViT-B-16-SigLIP2",
        "ViT-SO400M-14-SigLIP-384", "coca_ViT-L-14", "EVA01-g-14", "EVA02-L-14-336", "PE-Core-B-16", "MobileCLIP2-L-14",
    ],
)  # fmt: skip
def test_supported_architectures_are_not_refused_early(name: str) -> None:
    check_config(name, open_clip.get_model_config(name)["vision_cfg"])


def test_a_model_in_training_mode_is_refused() -> None:
    model = build_model(VIT)
    model.visual.ln_post.train()
    with pytest.raises(
        ValueError, match=r"must be in eval mode, got training mode in 'visual.ln_post'; call model.eval"
    ):
        OpenClipBackbone(model, tokenize, spec="test", **PLAIN)


def test_things_that_are_no_model_or_tokenizer_are_refused() -> None:
    model = build_model(VIT)
    for wrong, name in (((model, None, None), "tuple"), (nn.Linear(1, 1).eval(), "Linear")):
        with pytest.raises(
            ValueError, match=rf"model must be a CLIP, CustomTextCLIP or CoCa of open_clip, got {name}\."
        ):
            OpenClipBackbone(wrong, tokenize, spec="test", **PLAIN)
    with pytest.raises(ValueError, match=r"tokenizer must be callable, got NoneType\."):
        OpenClipBackbone(model, None, spec="test", **PLAIN)  # type: ignore[arg-type]


def test_missing_statistics_and_bad_sizes_are_refused() -> None:
    model = build_model(VIT)
    with pytest.raises(ValueError, match=r"mean must be three numbers, .* got None\."):
        OpenClipBackbone(model, tokenize, spec="test")
    with pytest.raises(ValueError, match=r"std must be three numbers > 0, .* got \(1\.0,\)\."):
        OpenClipBackbone(model, tokenize, spec="test", mean=(0.0, 0.0, 0.0), std=(1.0,))
    for wrong in (0.5, (0.2, float("nan"), 0.2), (0.2, 0.0, 0.2)):
        with pytest.raises(ValueError, match=rf"std must be three numbers > 0, .* got {re.escape(str(wrong))}\."):
            OpenClipBackbone(model, tokenize, spec="test", mean=(0.0, 0.0, 0.0), std=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens_per_side must be >= 1, got 0\."):
        OpenClipBackbone(model, tokenize, spec="test", tokens_per_side=0, **PLAIN)


def test_a_model_of_the_user_keeps_its_flags() -> None:
    model = build_model(VIT)
    model.visual.conv1.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    backbone = OpenClipBackbone(model, tokenize, spec="test", **PLAIN)
    backbone(random_images(64, 32))
    backbone.train().eval()
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(flags.values()) and not model.training
    assert backbone.model is model


def test_logit_scale_and_bias_are_the_models_own() -> None:
    model = build_model({**VIT, "init_logit_bias": -10.0})
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    backbone = OpenClipBackbone(model, tokenize, spec="test", **PLAIN)
    assert backbone.logit_scale == pytest.approx(20.0855, rel=1e-4) and backbone.logit_bias == -10.0
    assert wrap(VIT).logit_bias is None


# ---- names, tags and files


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("weights"), VIT) / "open_clip_model.safetensors"


@pytest.fixture
def known_to_open_clip(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip with one more architecture, tiny-vit, whose tags are a file and a place that cannot be reached."""
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    tags = {
        "on_disk": {"file": str(weights), "quick_gelu": True, **cfg},
        "far_away": {"hf_hub": "arrcoc-tests/no-such-model/", "quick_gelu": True, **cfg},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", VIT)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit-quickgelu", {**VIT, "quick_gelu": True})
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def activations(backbone: Any) -> set[type[nn.Module]]:
    return {type(block.mlp.gelu) for block in backbone.model.visual.transformer.resblocks}


@pytest.mark.usefixtures("known_to_open_clip")
def test_a_tag_brings_its_weights_statistics_and_activation(weights: Path) -> None:
    backbone = load_backbone("open_clip:tiny-vit/on_disk")
    assert backbone.spec == "open_clip:tiny-vit/on_disk"
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert activations(backbone) == {QuickGELU}
    for name, value in load_file(weights).items():
        assert torch.equal(backbone.model.state_dict()[name], value), name
    with torch.no_grad():
        numbers = open_clip.get_tokenizer("tiny-vit")(["a red cup", "dog " * 100])
        expected = F.normalize(backbone.model.encode_text(numbers), dim=-1)
    torch.testing.assert_close(backbone.encode_text(["a red cup", "dog " * 100]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("known_to_open_clip")
def test_a_file_takes_the_activation_of_its_name_and_the_statistics_of_its_tags(weights: Path) -> None:
    backbone = load_backbone(f"open_clip:tiny-vit/{weights}")
    assert activations(backbone) == {nn.GELU}
    assert backbone.mean == (0.1, 0.2, 0.3)
    assert backbone.fingerprint() == load_backbone("open_clip:tiny-vit/on_disk").fingerprint()
    assert activations(load_backbone(f"open_clip:tiny-vit-quickgelu/{weights}")) == {QuickGELU}


@pytest.mark.parametrize("tower", [SIGLIP, COCA, EVA02], ids=["siglip", "coca", "eva02"])
def test_files_of_other_towers_load_by_name(
    tower: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {**VIT["text_cfg"], **({"embed_cls": True, "output_tokens": True} if tower is COCA else {})}
    folder = write_folder(tmp_path, {**tower, "text_cfg": text})
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", {**tower, "text_cfg": text})
    file = folder / "open_clip_model.safetensors"
    by_name = load_backbone(f"open_clip:tiny/{file}", mode="gem")
    by_folder = load_backbone(f"open_clip:local-dir:{folder}", mode="gem")
    assert by_name.fingerprint() == by_folder.fingerprint() and by_name.mode == "gem"
    for name, value in load_file(file).items():
        assert torch.equal(by_name.model.state_dict()[name], value), name
    by_folder.mean, by_folder.std = by_name.mean, by_name.std  # a file says neither
    images = random_images(24, 40)
    torch.testing.assert_close(by_name(images).patches, by_folder(images).patches, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("known_to_open_clip")
def test_a_hub_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(
        ConnectionError,
        match=r"'open_clip:tiny-vit/far_away' are not on this machine .*at https://huggingface.co/arrcoc-tests/no-such-"
        r"model/ where the network works and load it as 'open_clip:tiny-vit-quickgelu/PATH', or use 'embedded'",
    ) as caught:
        load_backbone("open_clip:tiny-vit/far_away")
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.usefixtures("known_to_open_clip")
@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("tiny-vti/on_disk", r"open_clip has no model 'tiny-vti', did you mean 'tiny-vit'"),
        ("hf-hub:org/name", r"with `hf download org/name --local-dir FOLDER` and load 'open_clip:local-dir:FOLDER'"),
        ("tiny-vit", r"'open_clip:tiny-vit' names no weights; .* TAG is one of: on_disk, far_away\."),
        ("tiny-vit/", r"'open_clip:tiny-vit' names no weights"),
        ("tiny-vit-quickgelu", r"TAG is one of: \(none\)\."),
        (
            "tiny-vit/on_disc",
            r"'on_disc' is neither a weights file nor a tag of open_clip's tiny-vit, did you mean 'on_di",
        ),
        (
            "tiny-vit//no/such/file.pt",
            r"'/no/such/file.pt' is neither a weights file nor a tag .* its tags are on_disk,",
        ),
    ],
)
def test_names_and_tags_that_are_refused(rest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(f"open_clip:{rest}")


@pytest.mark.usefixtures("known_to_open_clip")
def test_weights_that_do_not_fit_are_refused(weights: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"cannot load the weights of 'open_clip:tiny-vit/.*' from '.*broken.safetensors"
    ):
        load_backbone(f"open_clip:tiny-vit/{broken}")
    partial = tmp_path / "partial.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != "visual.proj"}, partial)
    with pytest.raises(ValueError, match=r"(?s)cannot load the weights .*Missing key.*visual\.proj"):
        load_backbone(f"open_clip:tiny-vit/{partial}")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"open_clip local-dir '.*absent' is not a folder\."):
        load_backbone(f"open_clip:local-dir:{tmp_path / 'absent'}")
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config\.json\."):
        load_backbone(f"open_clip:local-dir:{tmp_path}")
    folder = write_folder(tmp_path / "model", CONVOLUTION)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of 'open_clip:local-dir:.*model'"):
        load_backbone(f"open_clip:local-dir:{folder}")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights \(\*\.safetensors, .*random weights is of no use\."):
        load_backbone(f"open_clip:local-dir:{folder}")
    (folder / "open_clip_model.safetensors").touch()
    for text in ("{", "[]", json.dumps({"vision_cfg": {}})):
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"open_clip_config\.json must be JSON with a 'model_cfg', got"):
            load_backbone(f"open_clip:local-dir:{folder}")


def test_loading_does_not_configure_logging(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    load_backbone(f"open_clip:local-dir:{weights.parent}")
    assert logging.root.handlers == []
    assert capsys.readouterr() == ("", "")
