"""Towers in parts against the libraries' own: towers of every kind at every size, and fine-tuning of the last blocks.

Axes: B images, N tokens, C width, D joint width.
"""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from arrcoc.backbones import OpenClipBackbone
from arrcoc.backbones.base import Backbone
from arrcoc.backbones.dense import MODES
from arrcoc.backbones.open_clip_towers import find_tower
from arrcoc.backbones.positions import resample_positions
from arrcoc.backbones.towers import Tower
from arrcoc.model.similarity import level_similarity
from models import TinyBackbone
from tiny_open_clip import (
    COCA,
    CONVOLUTION,
    EVA01,
    EVA02,
    PE_CORE,
    SIGLIP,
    TIMM_AVERAGE,
    TIMM_CLASS_TOKEN,
    TIMM_PLAIN_AVERAGE,
    VIT,
    build_model,
    timm_tower,
)
from watch_operators import FusedAttention, Sizes

TRANSFORMERS = {
    "open_clip": VIT,
    "coca": COCA,
    "siglip": SIGLIP,
    "pe-core": PE_CORE,
    "eva01": EVA01,
    "eva02": EVA02,
    "class token": TIMM_CLASS_TOKEN,
    "average": TIMM_AVERAGE,
    "plain average": TIMM_PLAIN_AVERAGE,
    "map with registers": timm_tower("test_vit3", "map", "linear"),
}
CONVOLUTIONS = {
    "efficientnet": CONVOLUTION,
    "convnext": {
        **CONVOLUTION,
        "vision_cfg": {**CONVOLUTION["vision_cfg"], "timm_model_name": "test_convnext", "timm_pool": ""},
    },
}


def tokenize(texts: list[str]) -> Tensor:
    return torch.tensor([[len(text) % 10, 3, 0, 0, 0, 0, 0, 0] for text in texts])


def visual_of(config: dict[str, Any]) -> Any:
    return build_model(config).visual.double().requires_grad_(False)


def embedding_of(visual: Any, pixels: Tensor) -> Tensor:
    embedding = visual(pixels)
    return embedding[0] if isinstance(embedding, tuple) else embedding


def pixels_for(tower: Tower, grid: tuple[int, int], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    size = (grid[0] * tower.stride[0], grid[1] * tower.stride[1])
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def resized(visual: Any, size: tuple[int, int], grid: tuple[int, int]) -> Any:
    """The library's own tower for another size: timm's set_input_size, and open_clip's resampling at loading."""
    visual = copy.deepcopy(visual)
    if hasattr(visual, "trunk"):
        visual.trunk.set_input_size(size)
        return visual
    positions = visual.positional_embedding[None]
    resampled = resample_abs_pos_embed(positions, list(grid), list(visual.grid_size), num_prefix_tokens=1)[0]
    visual.positional_embedding = nn.Parameter(resampled, requires_grad=False)
    return visual


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_the_embedding_is_the_librarys_own_at_every_size_in_every_mode(kind: str) -> None:
    """timm resamples in float32 and so do its rotations: 1e-5 where the size is not the native one."""
    visual = visual_of(TRANSFORMERS[kind])
    native = find_tower(visual).native_grid
    twice, half = (native[0] * 2, native[1] * 2), (native[0] // 2, native[1] // 2)
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    for grid in (native, twice, half, (3, 7), (1, 1)):
        pixels = pixels_for(find_tower(visual), grid)
        expected = embedding_of(resized(visual, pixels.shape[2:], grid), pixels)
        exact = grid == native and kind not in ("pe-core", "eva02")
        for mode in MODES if grid in (native, (3, 7)) else ("raw",):
            tower = find_tower(visual, mode)
            patches, pooled = tower(pixels)
            tolerance = 1e-10 if exact else 1e-5
            torch.testing.assert_close(pooled, expected, atol=tolerance, rtol=tolerance)
            assert patches.shape == (2, grid[0] * grid[1], 24) and patches.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in visual.state_dict().items())


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_raw_token_goes_the_way_of_what_is_pooled(kind: str) -> None:
    """The library's last norm, head and projection of one patch as if it were alone, nothing to weigh it against."""
    visual = visual_of(TRANSFORMERS[kind])
    tower = find_tower(visual, "raw")
    pixels = pixels_for(tower, tower.native_grid)
    patches, _ = tower(pixels)
    trunk = getattr(visual, "trunk", None)
    hidden: list[Tensor] = []
    last = visual.transformer if trunk is None else trunk.blocks[-1]
    hook = last.register_forward_hook(lambda module, given, made: hidden.append(made))
    embedding_of(visual, pixels)
    hook.remove()
    for number in (0, 5):
        alone = hidden[0][:, tower.num_prefix + number, None]  # [B, 1, C]
        if trunk is None:
            pooled = visual.ln_post(alone if visual.attn_pool is None else visual.attn_pool(alone))[:, 0] @ visual.proj
        else:
            x = trunk.norm(alone)
            x = x[:, 0] if trunk.attn_pool is None else trunk.attn_pool(x)
            pooled = visual.head(trunk.head(trunk.fc_norm(x)))
        torch.testing.assert_close(patches[:, number], pooled, atol=1e-10, rtol=1e-10)


def test_the_plain_mean_of_raw_tokens_is_the_embedding_where_it_is_declared() -> None:
    declared = {kind: find_tower(visual_of(config), "raw") for kind, config in TRANSFORMERS.items()}
    assert [kind for kind, tower in declared.items() if not tower.normalize_patches] == ["plain average"]
    tower = declared["plain average"]
    patches, pooled = tower(pixels_for(tower, (3, 4)))
    torch.testing.assert_close(patches.mean(1), pooled, atol=1e-10, rtol=1e-10)
    assert find_tower(tower.visual, "maskclip").normalize_patches


def test_pooling_decides_default_mode_and_orientation() -> None:
    expected = {
        "open_clip": ("class token", "clearclip", -1),
        "coca": ("attention", "raw", 1),
        "siglip": ("attention", "raw", 1),
        "eva02": ("class token", "clearclip", -1),
        "average": ("average", "raw", 1),
    }
    for kind, (pooling, mode, raw_orientation) in expected.items():
        visual = visual_of(TRANSFORMERS[kind])
        tower: Any = find_tower(visual)
        assert (tower.pooling, tower.mode, tower.orientation) == (pooling, mode, 1)
        assert find_tower(visual, "raw").orientation == raw_orientation


def test_a_native_size_that_is_no_multiple_of_the_patch() -> None:
    config = copy.deepcopy(VIT)
    config["vision_cfg"]["image_size"] = 37
    visual = visual_of(config)
    tower = find_tower(visual, "raw")
    assert tower.native_grid == (4, 4) and tower.stride == (8, 8)
    pixels = pixels_for(tower, (4, 4))
    expected = embedding_of(visual, F.pad(pixels, (0, 5, 0, 5), value=3.0))  # what the convolution leaves over
    torch.testing.assert_close(tower(pixels)[1], expected, atol=1e-10, rtol=1e-10)


def test_positions_are_kept_resampled_and_widened() -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2 + 12, 5, generator=generator)
    assert resample_positions(embedding, (3, 4), (3, 4), 2) is embedding
    other = resample_positions(embedding, (3, 4), (6, 2), 2)
    assert other.shape == (2 + 12, 5) and torch.equal(other[:2], embedding[:2])
    expected = resample_abs_pos_embed(embedding[None], [6, 2], [3, 4], num_prefix_tokens=2)[0]
    torch.testing.assert_close(other, expected)
    assert resample_positions(embedding.bfloat16(), (3, 4), (6, 2), 2).dtype == torch.float32
    constant = resample_positions(torch.ones(12, 5), (3, 4), (7, 9))
    torch.testing.assert_close(constant, torch.ones(63, 5))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_no_tower_makes_a_matrix_of_attention(kind: str) -> None:
    """The pooling heads attend from a few queries; their [queries, tokens] are no square of tokens."""
    visual = visual_of(TRANSFORMERS[kind]).float()
    for mode in MODES:
        tower: Any = find_tower(visual, mode)
        pixels = pixels_for(tower, (5, 7)).float()
        with FusedAttention() as attention, Sizes() as sizes, torch.no_grad():
            patches = tower(pixels)[0]
        square = sizes.with_two_axes_of({35, 35 + tower.num_prefix})
        assert patches.shape[1] == 35 and attention.calls >= tower.num_blocks
        assert not square or (mode == "naclip" and all(len(shape) == 2 for shape in square))


def test_weights_are_read_live() -> None:
    visual = visual_of(SIGLIP)
    tower = find_tower(visual, "clearclip")
    pixels = pixels_for(tower, (2, 2))
    before = tower(pixels)[0]
    visual.trunk.blocks[-1].attn.qkv.weight.mul_(2)
    assert (tower(pixels)[0] - before).norm() > 1e-3


# ---- fine-tuning


@pytest.mark.parametrize("kind", ["open_clip", "siglip", "pe-core", "plain average"])
def test_features_and_finish_join_at_any_block_in_any_mode(kind: str) -> None:
    visual = visual_of(TRANSFORMERS[kind])
    for mode in MODES:
        tower = find_tower(visual, mode)
        pixels = pixels_for(tower, (2, 3))
        expected = tower(pixels)
        assert tower.num_blocks == 2
        for num_last in range(tower.num_blocks + 1):
            made = tower.finish(tower.features(pixels, num_last), (2, 3), num_last)
            assert torch.equal(made[0], expected[0]) and torch.equal(made[1], expected[1])
    with pytest.raises(ValueError, match=r"num_last must be in 0\.\.2, the blocks of this tower, got 3\."):
        tower.features(pixels, 3)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_stages_of_a_convolution_join(kind: str) -> None:
    visual = visual_of(CONVOLUTIONS[kind])
    tower = find_tower(visual)
    pixels = pixels_for(tower, (2, 3))
    expected = tower(pixels)
    assert torch.equal(tower.features(pixels), visual.trunk.forward_features(pixels))
    assert tower.num_blocks >= 3
    sizes = []
    for num_last in range(tower.num_blocks + 1):
        made = tower.finish(tower.features(pixels, num_last), (2, 3), num_last)
        torch.testing.assert_close(made, expected, atol=1e-10, rtol=1e-10)
        sizes.append(len(tower.last_parameters(num_last)))
    assert sizes == sorted(set(sizes))
    with pytest.raises(ValueError, match=r"mode must be one of \('raw',\) or None, got 'gem'\."):
        find_tower(visual, "gem")


def test_a_convolution_whose_parts_are_not_known_works_but_is_not_trained() -> None:
    config = {
        **CONVOLUTION,
        "vision_cfg": {**CONVOLUTION["vision_cfg"], "timm_model_name": "test_resnet", "timm_pool": "avg"},
    }
    backbone = OpenClipBackbone(build_model(config), tokenize, spec="mine", mean=(0, 0, 0), std=(1, 1, 1))
    assert backbone(torch.rand(1, 3, 64, 64)).grid == (2, 2)
    with pytest.raises(
        ValueError, match=r"image tower timm ResNet cannot be trained in parts: .*EfficientNet, ConvNeXt"
    ):
        backbone.trainable_copy(1)


def test_a_backbone_without_a_tower_cannot_be_trained() -> None:
    backbone: Backbone = TinyBackbone()
    for call in (lambda: backbone.trainable_copy(1), lambda: backbone.encode_features(torch.rand(1, 3, 8, 8))):
        with pytest.raises(ValueError, match=r"backbone 'tiny' has no tower that can be run in parts\."):
            call()
    assert backbone.modes == ("raw",) and backbone.text_origin is None


SECOND_LAST = {"open_clip": "transformer.resblocks.0", "siglip": "trunk.blocks.0", "efficientnet": "trunk.blocks.3"}


@pytest.mark.parametrize("kind", SECOND_LAST)
def test_gradients_of_a_trainable_copy_are_those_of_the_whole(kind: str) -> None:
    """Against one graph over the tower whose parameters all have gradients, and that against the library's own."""
    model = build_model({**TRANSFORMERS, **CONVOLUTIONS}[kind]).double()
    statistics = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    backbone = OpenClipBackbone(model, tokenize, spec="mine", mode="raw", **statistics)
    images = torch.rand(2, 3, *(4 * side for side in backbone.stride), dtype=torch.float64)
    probe = torch.randn(24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (backbone.tower(images)[1] @ probe).sum().backward()
    whole = {
        name: parameter.grad.clone()
        for name, parameter in model.visual.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    by_library = torch.autograd.grad(
        (embedding_of(model.visual, images) @ probe).sum(), list(model.visual.parameters()), allow_unused=True
    )
    for (name, _), grad in zip(model.visual.named_parameters(), by_library, strict=True):
        assert (grad is None) == (name not in whole)
        if grad is not None:
            torch.testing.assert_close(whole[name], grad, atol=1e-10, rtol=1e-8)

    for num_blocks in (1, 2):
        twin = backbone.trainable_copy(num_blocks)
        (twin(images).pooled @ probe).sum().backward()
        own = {name.removeprefix("visual."): p for name, p in twin.model.named_parameters() if p.requires_grad}
        for name, parameter in own.items():
            if name in whole:
                torch.testing.assert_close(parameter.grad, whole[name], atol=1e-10, rtol=1e-8)
        assert {f"visual.{name}" for name in own} == set(twin.trained_state_dict())
    assert any(name.startswith(SECOND_LAST[kind]) for name in own)


def test_features_stay_the_same_while_the_copy_is_trained() -> None:
    backbone = OpenClipBackbone(build_model(VIT), tokenize, spec="mine", mean=(0, 0, 0), std=(1, 1, 1))
    twin = backbone.trainable_copy(1)
    images = torch.rand(2, 3, 32, 32)
    features, grid = twin.encode_features(images)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    twin.finish(features, grid).patches.square().mean(0).sum().backward()
    optimizer.step()
    again, _ = twin.encode_features(images)
    assert torch.equal(again, features) and not features.requires_grad
    assert torch.equal(twin.finish(features, grid).patches, twin(images).patches)
    assert not torch.equal(twin(images).patches, backbone(images).patches)


# ---- scoring by the difference that a text makes


def test_mode_surgery_scores_relative_to_the_empty_text() -> None:
    model = build_model({**VIT, "init_logit_bias": -10.0})
    statistics = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    backbone = OpenClipBackbone(model, tokenize, spec="mine", mode="surgery", **statistics)
    tokens = backbone(torch.rand(2, 3, 24, 40))
    queries = backbone.encode_text(["a cup", "a dog!"]).expand(2, -1, -1)
    scores = level_similarity(backbone, tokens.patches, queries)
    with torch.no_grad():
        empty = F.normalize(model.encode_text(tokenize([""])), dim=-1)[0]
    for image in range(2):
        for query in range(2):
            expected = backbone.logit_scale * (tokens.patches[image] @ (queries[image, query] - empty))
            torch.testing.assert_close(scores[image, query], expected - expected.mean(), atol=1e-4, rtol=1e-4)


# ---- cost


@pytest.fixture(scope="module")
def plain_vit() -> Any:
    """A tower of the shape of ViT-B/16 without its weights."""
    with torch.device("meta"):
        return open_clip.transformer.VisionTransformer(
            image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_ratio=4.0, output_dim=512
        ).eval()


def gigaflops(tower: Tower, side: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize(
    ("mode", "at_224", "at_448"),
    [
        ("raw", 1.005, 1.005),
        ("maskclip", 1.002, 0.993),
        ("sclip", 1.01, 1.02),
        ("clearclip", 0.955, 0.96),
        ("naclip", 0.955, 0.96),
        ("surgery", 1.005, 1.05),
        ("gem", 1.105, 1.41),
    ],
)
def test_a_mode_costs_about_one_plain_forward(plain_vit: Any, mode: str, at_224: float, at_448: float) -> None:
    """Bounds on FLOPs over those of the plain forward of ViT-B/16, counted with the attention that is fused."""
    for side, bound in ((224, at_224), (448, at_448)):
        tokens, blocks = (side // 16) ** 2 + 1, 12
        width = 768
        attention = 4 * tokens**2 * width
        linear = 2 * tokens * 12 * width**2
        plain = (blocks * (attention + linear) + 2 * (tokens - 1) * width * 3 * 256 + 2 * width * 512) / 1e9
        ratio = gigaflops(find_tower(plain_vit, mode), side) / plain
        assert bound - 0.01 < ratio <= bound, (side, ratio)


def test_timm_models_of_the_user_keep_their_size() -> None:
    trunk = timm.create_model("test_vit", num_classes=24)
    visual = visual_of(TIMM_CLASS_TOKEN)
    visual.trunk = trunk.eval().double()
    find_tower(visual)(pixels_for(find_tower(visual), (2, 3)))
    assert trunk.patch_embed.grid_size == (10, 10) and trunk.pos_embed.shape[1] == 101
