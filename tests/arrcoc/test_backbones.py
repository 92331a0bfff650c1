"""The contract that every backbone keeps, on tiny random models loaded from files like real ones.

A new kind of backbone is one more line in CASES.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arrcoc.backbones import Backbone, load_backbone
from tiny_open_clip import CONVOLUTION, STATISTICS, VIT, write_folder


def open_clip_embedding(backbone: Backbone, pixels: Tensor) -> Tensor:
    """What open_clip itself gives for normalised pixels."""
    model: Any = backbone.model
    embedding: Tensor = model.encode_image(pixels)
    return embedding


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of backbone: how it is made, and what the wrapped model says of an image at its native size."""

    name: str
    spec: Callable[[Path], str]
    embedding: Callable[[Backbone, Tensor], Tensor]
    native_size: tuple[int, int]
    orientation: int


CASES = [
    Case(
        name="open_clip transformer",
        spec=lambda folder: f"open_clip:local-dir:{write_folder(folder, VIT)}",
        embedding=open_clip_embedding,
        native_size=(32, 32),
        orientation=-1,
    ),
    Case(
        name="open_clip convolution",
        spec=lambda folder: f"open_clip:local-dir:{write_folder(folder, CONVOLUTION)}",
        embedding=open_clip_embedding,
        native_size=(64, 64),
        orientation=1,
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def spec(case: Case, tmp_path_factory: pytest.TempPathFactory) -> str:
    return case.spec(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(spec: str) -> Backbone:
    return load_backbone(spec)


def images_for(backbone: Backbone, rows: int, columns: int, batch: int = 2) -> Tensor:
    size = (rows * backbone.stride[0], columns * backbone.stride[1])
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def test_tokens_have_the_shape_of_the_picture(backbone: Backbone) -> None:
    tokens = backbone(images_for(backbone, 3, 5))
    assert tokens.grid == (3, 5)
    assert tokens.patches.shape == (2, 15, backbone.embed_dim)
    assert tokens.pooled.shape == (2, backbone.embed_dim)
    assert tokens.patches.isfinite().all() and tokens.pooled.isfinite().all()


def test_pooled_is_the_image_embedding_of_the_wrapped_model(case: Case, backbone: Backbone) -> None:
    images = torch.rand(2, 3, *case.native_size, generator=torch.Generator().manual_seed(2))
    mean, std = torch.tensor(STATISTICS["mean"]), torch.tensor(STATISTICS["std"])
    with torch.no_grad():
        expected = case.embedding(backbone, (images - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(backbone(images).pooled, expected, atol=1e-5, rtol=1e-5)


def test_patches_are_row_major(backbone: Backbone) -> None:
    before = images_for(backbone, 3, 5, batch=1)
    after = before.clone()
    rows, columns = backbone.stride
    after[:, :, rows : 2 * rows, 4 * columns :] = 1 - after[:, :, rows : 2 * rows, 4 * columns :]
    moved = (backbone(after).patches - backbone(before).patches).norm(dim=-1)
    assert moved.argmax().item() == 1 * 5 + 4


def test_a_picture_does_not_depend_on_its_batch(backbone: Backbone) -> None:
    images = images_for(backbone, 2, 3)
    torch.testing.assert_close(backbone(images).patches[1:], backbone(images[1:]).patches, atol=1e-5, rtol=1e-5)


def test_patches_have_unit_norm_where_it_is_declared(backbone: Backbone) -> None:
    tokens = backbone(images_for(backbone, 3, 5))
    if backbone.normalize_patches:
        torch.testing.assert_close(tokens.patches.norm(dim=-1), torch.ones(2, 15))
    else:
        torch.testing.assert_close(tokens.patches.mean(1), tokens.pooled, atol=1e-5, rtol=1e-5)


def test_orientation_is_declared(case: Case, backbone: Backbone) -> None:
    assert backbone.orientation == case.orientation


def test_text_embeddings_have_unit_norm_and_follow_their_text(backbone: Backbone) -> None:
    both = backbone.encode_text(["a red cup", "a photo of a dog"])
    assert both.shape == (2, backbone.embed_dim)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(backbone.encode_text(("a photo of a dog",)), both[1:], atol=1e-5, rtol=1e-5)
    assert (both[0] - both[1]).norm() > 1e-3


def test_long_vocabularies_and_long_texts(backbone: Backbone) -> None:
    many = backbone.encode_text(["a dog", "a cup"] * 200)
    torch.testing.assert_close(many[-2:], many[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.encode_text(["dog " * 100]).norm(dim=-1), torch.ones(1))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a cup", r"texts must be a sequence of str, got the single str 'a cup'; write \['a cup'\]\."),
        ([], r"texts must hold at least one str, got \[\]\."),
        (["a cup", 3], r"texts must hold nothing but str, got 3\."),
    ],
)
def test_texts_that_are_refused(backbone: Backbone, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone.encode_text(texts)


def test_images_that_are_refused(backbone: Backbone) -> None:
    good = images_for(backbone, 2, 2)
    with pytest.raises(ValueError, match=r"images must be a float tensor in \[0, 1\], got torch\.uint8\."):
        backbone((good * 255).to(torch.uint8))
    with pytest.raises(ValueError, match=r"images must be a float tensor in \[0, 1\], got ndarray\."):
        backbone(good.numpy())
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\] with B >= 1, got \[2, 1,"):
        backbone(good[:, :1])
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\] with B >= 1, got \[3,"):
        backbone(good[0])
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\] with B >= 1, got \[0,"):
        backbone(good[:0])
    rows, columns = backbone.stride
    with pytest.raises(ValueError, match=rf"height a multiple of {rows} and width a multiple of {columns}, got \("):
        backbone(good[:, :, 1:])
    with pytest.raises(ValueError, match=rf"height a multiple of {rows} and width a multiple of {columns}, got \("):
        backbone(good[:, :, :, :0])
    for bad in (good * 2, good - 0.5, good / 0 * 0):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from .* to .*\."):
            backbone(bad)


def test_overshoot_of_resampling_is_let_through(backbone: Backbone) -> None:
    backbone((images_for(backbone, 2, 2) * 1.0005).clamp(max=1.0005))


def test_input_size(backbone: Backbone) -> None:
    (rows, columns), side = backbone.stride, backbone.tokens_per_side
    assert backbone.input_size(480, 480) == (side * rows, side * columns)
    for height, width in [(300, 500), (500, 300), (1, 1000), (1000, 1), (7, 7)]:
        for scale in (0.5, 0.625, 0.7, 0.75, 1.0, 1.4, 2.0):
            size = backbone.input_size(height, width, scale)
            grid = (size[0] / rows, size[1] / columns)
            longest = max(1, int(side * scale + 0.5))  # halves up
            shorter = longest * min(height, width) / max(height, width)
            assert grid == (int(grid[0]), int(grid[1]))
            assert max(grid) == longest and (grid[0] >= grid[1]) == (height >= width or grid[0] == grid[1])
            assert min(grid) >= 1 and abs(min(grid) - max(shorter, 1)) <= 0.5
    assert backbone.input_size(10, 10, 1e-6) == backbone.stride
    with pytest.raises(ValueError, match=r"height and width must be >= 1, got \(0, 5\)\."):
        backbone.input_size(0, 5)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale must be a number > 0, got"):
            backbone.input_size(5, 5, scale)


def test_the_wrapped_model_is_left_as_it_was(backbone: Backbone) -> None:
    def attributes() -> list[tuple[str, str]]:
        return [
            (name, repr(sorted((key, value) for key, value in vars(module).items() if not key.startswith("_"))))
            for name, module in backbone.model.named_modules()
        ]

    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    seen = attributes()
    backbone(images_for(backbone, 3, 5))
    backbone.encode_text(["a cup"])
    backbone.fingerprint()
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert attributes() == seen
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_tokens_have_no_graph_but_can_enter_one(backbone: Backbone) -> None:
    patches = backbone(images_for(backbone, 2, 2).requires_grad_()).patches
    assert not patches.requires_grad
    scale = torch.ones((), requires_grad=True)
    (patches * scale).sum().backward()
    assert scale.grad is not None


def test_fingerprint_tells_weights_apart(spec: str, backbone: Backbone) -> None:
    again = load_backbone(spec)
    assert backbone.fingerprint() == again.fingerprint()
    assert len(backbone.fingerprint()) == 16 and int(backbone.fingerprint(), 16) >= 0
    other = load_backbone(spec)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    other._fingerprint = None  # it was computed when the weights were loaded, once
    assert other.fingerprint() != backbone.fingerprint()


def test_half_precision_gives_float32_tokens_of_the_same_weights(spec: str, backbone: Backbone) -> None:
    half = load_backbone(spec, dtype=torch.bfloat16)
    images = images_for(backbone, 3, 2)
    tokens, expected = half(images), backbone(images)
    assert half.dtype == torch.bfloat16 and tokens.patches.dtype == torch.float32
    assert half.encode_text(["a cup"]).dtype == torch.float32
    assert half.fingerprint() == backbone.fingerprint()
    assert F.cosine_similarity(tokens.patches, expected.patches, dim=-1).min() > 0.99


def test_loading_keeps_the_random_stream_and_the_spec(spec: str) -> None:
    state = torch.get_rng_state()
    assert load_backbone(spec, mode="raw").spec == spec
    assert torch.equal(torch.get_rng_state(), state)


def test_mode_and_dtype_that_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"mode must be one of \('raw',\) or None, got 'rwa'\."):
        load_backbone(spec, mode="rwa")
    with pytest.raises(ValueError, match=r"dtype must be a floating point type, got torch\.int8\."):
        load_backbone(spec, dtype=torch.int8)


def test_embedded_is_the_shipped_folder(spec: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(spec.removeprefix("open_clip:local-dir:"))
    monkeypatch.setattr("arrcoc.backbones.asset_path", lambda name: {"embedded_clip": folder}[name])
    embedded = load_backbone("embedded")
    assert embedded.spec == "embedded" and embedded.fingerprint() == backbone.fingerprint()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("embeded", r"backbone must be 'embedded', .*got 'embeded', did you mean 'embedded'\?\."),
        ("openclip:ViT-B-16/openai", r"got 'openclip:ViT-B-16/openai', did you mean 'open_clip'"),
        ("open_clip:", r"backbone must be 'embedded', 'open_clip:NAME/TAG'"),
        ("", r"backbone must be 'embedded'"),
        (None, r"backbone must be 'embedded', .* got None\."),
        ("hf:openai/clip-vit-base-patch16", r"'hf:' backbones are not available in this version, got 'hf:openai/clip"),
    ],
)
def test_specs_that_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(bad)


def test_importing_backbones_is_cheap() -> None:
    heavy = "{'open_clip', 'timm', 'transformers', 'torchvision'}"
    code = f"import sys, arrcoc.backbones; assert not {heavy} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)
