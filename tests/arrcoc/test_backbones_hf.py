"""transformers backbones equal transformers itself, and open_clip on the same weights in every dense mode."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

import tiny_hf
from arrcoc.backbones import HuggingFaceBackbone, OpenClipBackbone
from arrcoc.backbones.dense import MODES

SIZES = [(32, 32), (64, 64), (16, 16), (16, 48), (40, 24)]  # native, twice, half, and not square
STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
same = partial(torch.testing.assert_close, atol=1e-10, rtol=1e-10)
near = partial(torch.testing.assert_close, atol=1e-6, rtol=1e-4)  # where transformers computes a part in float32
CLOSE = {"sdpa": same, "eager": near}


def random_images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def wrap(kind: str, mode: str | None = None, **vision: Any) -> HuggingFaceBackbone:
    model = tiny_hf.build_model(kind, **vision).double()
    return HuggingFaceBackbone(model, tiny_hf.build_tokenizer(kind), spec="test", mode=mode, **STATISTICS)


# ---- open_clip and transformers on the same weights


def open_clip_twin() -> tuple[nn.Module, nn.Module]:
    """An open_clip CLIP of eight blocks, and transformers' CLIP with the weights of its image tower."""
    vision = {"image_size": 32, "layers": 8, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = open_clip.CLIP(24, vision, text)
        tiny_hf.shake(theirs)
    ours: Any = tiny_hf.build_model("clip", num_hidden_layers=8, hidden_act="gelu")
    state = {name: value.clone() for name, value in theirs.visual.state_dict().items()}
    renamed = {
        "embeddings.class_embedding": state.pop("class_embedding"),
        "embeddings.position_embedding.weight": state.pop("positional_embedding"),
        "embeddings.patch_embedding.weight": state.pop("conv1.weight"),
    }
    ours.visual_projection.weight.data = state.pop("proj").T.contiguous()
    for name, value in state.items():
        name = name.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm")
        name = name.replace("transformer.resblocks", "encoder.layers").replace("attn.out_proj", "self_attn.out_proj")
        name = name.replace("ln_", "layer_norm").replace("c_fc", "fc1").replace("c_proj", "fc2")
        renamed |= dict(split_qkv(name, value, "attn.in_proj_", "self_attn."))
    ours.vision_model.load_state_dict(renamed)
    return theirs.eval().double(), ours.double()


def timm_twin() -> tuple[nn.Module, nn.Module]:
    """open_clip around timm's SigLIP of eight blocks, and transformers' SigLIP with the weights of its image tower."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2, "mlp_ratio": 2.0}
    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 32}
    text = {"context_length": 8, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = open_clip.CustomTextCLIP(32, vision, text, init_logit_bias=-10)
        assert isinstance(theirs.visual, TimmModel)
        theirs.visual.trunk = timm.create_model(
            "vit_base_patch16_siglip_224", num_classes=0, act_layer="gelu_tanh", **size
        )
        tiny_hf.shake(theirs)
    ours: Any = tiny_hf.build_model("siglip", num_hidden_layers=8)
    state = {name: value.clone() for name, value in theirs.visual.trunk.state_dict().items()}
    head = {name: state.pop(f"attn_pool.{name}") for name in ("q.weight", "q.bias", "kv.weight", "kv.bias", "latent")}
    renamed = {
        "embeddings.position_embedding.weight": state.pop("pos_embed")[0],
        "head.probe": head["latent"],
        "head.attention.in_proj_weight": torch.cat([head["q.weight"], head["kv.weight"]]),
        "head.attention.in_proj_bias": torch.cat([head["q.bias"], head["kv.bias"]]),
    }
    for name, value in state.items():
        name = name.replace("patch_embed.proj", "embeddings.patch_embedding").replace("blocks", "encoder.layers")
        name = name.replace("attn_pool.proj", "head.attention.out_proj").replace("attn_pool.norm", "head.layernorm")
        name = name.replace("attn_pool.mlp", "head.mlp").replace("attn.proj", "self_attn.out_proj")
        name = "post_layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name
        name = name.replace(".norm", ".layer_norm")
        renamed |= dict(split_qkv(name, value, "attn.qkv.", "self_attn."))
    ours.vision_model.load_state_dict(renamed)
    return theirs.eval().double(), ours.double()


def split_qkv(name: str, value: Tensor, joined: str, split: str) -> list[tuple[str, Tensor]]:
    if joined not in name:
        return [(name, value)]
    before, _, kind = name.partition(joined)
    return [(f"{before}{split}{part}_proj.{kind}", piece) for part, piece in zip("qkv", value.chunk(3), strict=True)]


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text) % 9, 9, 0, 0, 0, 0, 0, 0] for text in texts])


@pytest.fixture(scope="module")
def twins() -> dict[str, tuple[nn.Module, nn.Module]]:
    return {"clip": open_clip_twin(), "siglip": timm_twin()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_both_libraries_give_the_same_tokens(
    twins: dict[str, tuple[nn.Module, nn.Module]], kind: str, mode: str
) -> None:
    theirs, ours = twins[kind]
    first = OpenClipBackbone(theirs, tokenize, spec="test", mode=mode, **STATISTICS)
    second = HuggingFaceBackbone(ours, tiny_hf.build_tokenizer(kind), spec="test", mode=mode, **STATISTICS)
    for name in ("mode", "modes", "stride", "orientation", "normalize_patches", "tokens_per_side"):
        assert getattr(first, name) == getattr(second, name), name
    for size in SIZES:
        expected, tokens = first(random_images(*size)), second(random_images(*size))
        assert tokens.grid == expected.grid == (size[0] // 8, size[1] // 8)
        assert tokens.patches.dtype == torch.float64
        same(tokens.patches, expected.patches)
        same(tokens.pooled, expected.pooled)


# ---- against transformers itself


def pixels_of(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(STATISTICS[name], dtype=images.dtype)[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["clip", "metaclip_2"])
def test_clip_equals_transformers_at_the_native_size(kind: str, attention: str) -> None:
    backbone = wrap(kind, "raw")
    model: Any = backbone.model
    model.set_attn_implementation(attention)
    images = random_images(32, 32)
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels_of(images))
        expected = model.visual_projection(model.vision_model.post_layernorm(output.last_hidden_state))[:, 1:]
    tokens = backbone(images)
    CLOSE[attention](tokens.patches, F.normalize(expected, dim=-1))
    CLOSE[attention](tokens.pooled, output.pooler_output)
    assert (backbone.orientation, backbone.normalize_patches, backbone.logit_bias) == (-1, True, None)
    assert backbone.logit_scale == pytest.approx(7.389056)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_siglip_equals_transformers_at_the_native_size(attention: str) -> None:
    backbone = wrap("siglip", "raw")
    model: Any = backbone.model
    model.set_attn_implementation(attention)
    images = random_images(32, 32)
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels_of(images))
        alone = [model.vision_model.head(output.last_hidden_state[:, n : n + 1]) for n in range(16)]
    tokens = backbone(images)
    # the head, asked about each patch alone
    CLOSE[attention](tokens.patches, F.normalize(torch.stack(alone, dim=1), dim=-1))
    CLOSE[attention](tokens.pooled, output.pooler_output)
    assert (backbone.orientation, backbone.normalize_patches, backbone.logit_bias) == (1, True, -3.0)


@pytest.mark.parametrize("size", SIZES)
def test_naflex_equals_transformers_at_every_size(size: tuple[int, int]) -> None:
    backbone = wrap("siglip2", "raw")
    model: Any = backbone.model
    images = random_images(*size)
    grid = (size[0] // 8, size[1] // 8)
    patches = torch.stack([convert_image_to_patches(image, 8) for image in pixels_of(images)])
    padded = F.pad(patches, (0, 0, 0, 5), value=1.0)  # what the mask must hide
    mask = torch.cat([torch.ones(2, patches.shape[1]), torch.zeros(2, 5)], dim=1).int()
    with torch.no_grad():
        output = model.get_image_features(
            pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor([grid, grid])
        )
        count = patches.shape[1]
        alone = [model.vision_model.head(output.last_hidden_state[:, n : n + 1]) for n in range(count)]
    tokens = backbone(images)
    near(tokens.patches, F.normalize(torch.stack(alone, dim=1), dim=-1))  # positions are resampled in float32
    near(tokens.pooled, output.pooler_output)
    assert tokens.grid == grid and backbone.tokens_per_side == 4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_other_sizes_are_near_what_transformers_interpolates(kind: str) -> None:
    """Its bicubic kernel is another one, and it does not antialias; the towers' docstring says so."""
    backbone = wrap(kind, "raw")
    model: Any = backbone.model
    for side in (64, 16):
        images = random_images(side, side)
        with torch.no_grad():
            theirs = model.get_image_features(pixel_values=pixels_of(images), interpolate_pos_encoding=True)
        distance = (backbone(images).pooled - theirs.pooler_output).norm() / theirs.pooler_output.norm()
        assert 1e-5 < distance < 0.05


def test_naflex_compiles_to_one_graph() -> None:
    """Each of its sizes resamples positions; test_backbones.py compiles the other towers."""
    backbone, images = wrap("siglip2", "raw"), random_images(16, 24)
    torch.compiler.reset()
    tokens = torch.compile(backbone, backend="aot_eager", fullgraph=True)(images)
    same(tokens.patches, backbone(images).patches)
    same(tokens.pooled, backbone(images).pooled)


# ---- texts


def test_clip_texts_are_cut_and_padding_does_not_matter() -> None:
    backbone = wrap("clip")
    texts = ["a red cup", "dog " * 100]
    numbers = backbone.tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = backbone.model.get_text_features(**numbers).pooler_output
    same(backbone.encode_text(texts), F.normalize(expected, dim=-1))
    same(backbone.encode_text(texts[:1]), F.normalize(expected[:1], dim=-1))


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_siglip_texts_are_small_letters_padded_to_the_context_without_a_mask(kind: str) -> None:
    backbone = wrap(kind)
    letters = [backbone.tokenizer.convert_tokens_to_ids(letter) for letter in ["▁", *"redcup"]]
    space, red, cup = letters[0], letters[1:4], letters[4:]
    numbers = torch.tensor([[*red, space, *cup, 1, *[0] * 8]])
    with torch.no_grad():
        expected = backbone.model.get_text_features(input_ids=numbers).pooler_output
    same(backbone.encode_text(["Red CUP"]), F.normalize(expected, dim=-1))
    same(backbone.encode_text(["red cup", "dog " * 100])[:1], F.normalize(expected, dim=-1))
    backbone.tokenizer.padding_side = "left"  # Siglip2Tokenizer's own default; training padded on the right
    same(backbone.encode_text(["red cup"]), F.normalize(expected, dim=-1))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model, tokenizer = tiny_hf.build_model("clip"), tiny_hf.build_tokenizer("clip")
    vocabulary = model.text_model.embeddings.token_embedding
    model.text_model.embeddings.token_embedding = nn.Embedding(20, 32).eval()
    with pytest.raises(ValueError, match=r"tokenizer must be the model's own, but its numbers do not fit: .*range"):
        HuggingFaceBackbone(model, tokenizer, spec="test", **STATISTICS)
    model.text_model.embeddings.token_embedding = vocabulary
    model.text_model.eos_token_id = 50
    with pytest.raises(
        ValueError, match=r"tokenizer must end each text with 50, where the model reads its embedding\."
    ):
        HuggingFaceBackbone(model, tokenizer, spec="test", **STATISTICS)
    model.text_model.eos_token_id = 2  # old configurations: the largest number, which ends the text
    HuggingFaceBackbone(model, tokenizer, spec="test", **STATISTICS)


# ---- models of the user


def test_a_model_of_the_user_keeps_its_flags() -> None:
    model = tiny_hf.build_model("siglip")
    model.vision_model.head.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    backbone = HuggingFaceBackbone(model, tiny_hf.build_tokenizer("siglip"), spec="mine", mode="gem", **STATISTICS)
    backbone(torch.rand(1, 3, 24, 40))
    backbone.train().eval()
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(flags.values()) and not model.training and backbone.model is model
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "tail"),
    [
        ("clip", ("vision_model.post_layernorm", "visual_projection")),
        ("siglip", ("vision_model.post_layernorm", "vision_model.head")),
        ("siglip2", ("vision_model.post_layernorm", "vision_model.head")),
    ],
)
def test_fine_tuning_trains_the_last_block_and_what_follows_it(kind: str, tail: tuple[str, ...]) -> None:
    twin = wrap(kind).trainable_copy(1)
    parts = ("vision_model.encoder.layers.2.", *(f"{name}." for name in tail))
    expected = {name for name, _ in twin.model.named_parameters() if name.startswith(parts)}
    assert set(twin.trained_state_dict()) == expected and len(expected) > 16
    tokens = twin(random_images(16, 24))
    (tokens.patches.square() * torch.linspace(-1, 1, tokens.patches.shape[-1])).sum().backward()
    assert all(p.grad is None or name in expected for name, p in twin.model.named_parameters())


def test_models_that_are_refused() -> None:
    model, tokenizer = tiny_hf.build_model("clip"), tiny_hf.build_tokenizer("clip")
    make = partial(HuggingFaceBackbone, tokenizer=tokenizer, spec="test", **STATISTICS)
    with pytest.raises(ValueError, match=r"model must be a CLIPModel, .* of transformers, got CLIPVisionModel\."):
        make(model.vision_model)
    with pytest.raises(ValueError, match=r"model must be a CLIPModel, .* of transformers, got Linear\."):
        make(nn.Linear(1, 1).eval())
    with pytest.raises(
        ValueError, match=r"SiglipModel has no pooling head \(vision_use_head\), and so no image embedd"
    ):
        make(tiny_hf.build_model("siglip", vision_use_head=False))
    with pytest.raises(ValueError, match=r"tokens_per_side must be >= 1, got 0\."):
        make(model, tokens_per_side=0)
    with pytest.raises(ValueError, match=r"tokenizer must be callable, got NoneType\."):
        HuggingFaceBackbone(model, None, spec="test", **STATISTICS)
    with pytest.raises(ValueError, match=r"mode must be one of \('raw', .*\) or None, got 'dense'\."):
        make(model, mode="dense")
    with pytest.raises(ValueError, match=r"std must be three numbers > 0, image_std of the model's .* got \(1\.0,\)\."):
        HuggingFaceBackbone(model, tokenizer, spec="test", mean=(0.0, 0.0, 0.0), std=(1.0,))
    model.vision_model.post_layernorm.train()
    with pytest.raises(
        ValueError, match=r"must be in eval mode, got training mode in 'vision_model.post_layernorm'; c"
    ):
        make(model)
