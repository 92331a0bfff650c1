"""The contract that every backbone keeps, on tiny random models loaded from files like real ones.

What it keeps in each of its modes is in test_backbone_contract.py.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arrcoc.backbones import Backbone, load_backbone
from tiny_backbones import CASES, Case
from tiny_open_clip import CONVOLUTION, STATISTICS, VIT, write_folder


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
    assert backbone.normalize_patches or (backbone.mode, backbone.orientation) == ("raw", 1)
    if backbone.normalize_patches:
        torch.testing.assert_close(tokens.patches.norm(dim=-1), torch.ones(2, 15))
    else:
        torch.testing.assert_close(tokens.patches.mean(1), tokens.pooled, atol=1e-5, rtol=1e-5)


def test_modes_and_their_orientation_are_declared(case: Case, spec: str, backbone: Backbone) -> None:
    assert backbone.mode == case.default_mode and backbone.modes == case.modes
    for mode in case.modes:
        read = load_backbone(spec, mode=mode)
        assert (read.mode, read.spec) == (mode, spec) and read.modes == case.modes
        assert read.orientation == (case.orientation if mode == "raw" else 1)
        assert read.fingerprint() == backbone.fingerprint()


def test_every_mode_gives_tokens_of_its_own_and_the_same_embedding(case: Case, spec: str) -> None:
    images = torch.rand(2, 3, *case.native_size, generator=torch.Generator().manual_seed(3))
    raw = load_backbone(spec, mode="raw")(images)
    seen = [F.normalize(raw.patches, dim=-1)]
    for mode in case.modes[1:]:
        backbone = load_backbone(spec, mode=mode)
        tokens = backbone(images)
        assert backbone.normalize_patches and tokens.grid == raw.grid
        torch.testing.assert_close(tokens.patches.norm(dim=-1), torch.ones(raw.patches.shape[:2]))
        torch.testing.assert_close(tokens.pooled, raw.pooled, atol=1e-5, rtol=1e-5)
        assert min((tokens.patches - other).norm() for other in seen) > 1e-3
        seen.append(tokens.patches)


def test_the_text_origin_is_that_of_mode_surgery_alone(case: Case, spec: str, backbone: Backbone) -> None:
    assert backbone.text_origin is None
    if "surgery" in case.modes:
        surgery = load_backbone(spec, mode="surgery")
        torch.testing.assert_close(surgery.text_origin, backbone.encode_text([""])[0])
        assert surgery.text_origin is surgery.text_origin  # computed once
        assert surgery.to(torch.float64).text_origin.dtype == torch.float64


def test_pictures_of_many_sizes_at_once(backbone: Backbone) -> None:
    grids = [(2, 3), (3, 2), (2, 3), (1, 1), (3, 2)]
    images = [images_for(backbone, *grid, batch=1)[0] * (0.5 + number / 10) for number, grid in enumerate(grids)]
    passes = []
    hook = backbone.register_forward_hook(lambda module, given, made: passes.append(len(made)))
    together = backbone.encode_batch(images)
    hook.remove()
    assert sorted(passes) == [1, 2, 2]
    for image, grid, tokens in zip(images, grids, together, strict=True):
        alone = backbone(image[None])
        assert tokens.grid == grid and len(tokens) == 1
        torch.testing.assert_close(tokens.patches, alone.patches, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens.pooled, alone.pooled, atol=1e-5, rtol=1e-5)


def test_batches_that_are_refused(backbone: Backbone) -> None:
    good = images_for(backbone, 2, 2)[0]
    with pytest.raises(ValueError, match=r"images must hold at least one tensor \[3, H, W\], got \[\]\."):
        backbone.encode_batch([])
    with pytest.raises(ValueError, match=r"images\[1\] must be a tensor \[3, H, W\], got \[1, 3, "):
        backbone.encode_batch([good, good[None]])
    with pytest.raises(ValueError, match=r"images\[0\] must be a tensor \[3, H, W\], got ndarray\."):
        backbone.encode_batch([good.numpy()])


# ---- fine-tuning


def test_features_and_finish_are_the_forward(backbone: Backbone) -> None:
    images = images_for(backbone, 3, 2)
    features, grid = backbone.encode_features(images)
    tokens, expected = backbone.finish(features, grid), backbone(images)
    assert grid == tokens.grid == (3, 2) and len(features) == 2
    assert not features.requires_grad and not tokens.patches.requires_grad
    assert torch.equal(tokens.patches, expected.patches) and torch.equal(tokens.pooled, expected.pooled)


def test_a_trainable_copy_owns_its_last_blocks_and_shares_the_rest(backbone: Backbone) -> None:
    flags = {name: parameter.requires_grad for name, parameter in backbone.model.named_parameters()}
    weights = copy.deepcopy(backbone.model.state_dict())
    images = images_for(backbone, 2, 3)
    before = backbone(images)
    twin = backbone.trainable_copy(1)
    assert twin.fingerprint() == backbone.fingerprint() and twin.spec == backbone.spec and not twin.training
    own = twin.trained_state_dict()
    mine = dict(backbone.model.named_parameters())
    for name, parameter in twin.model.named_parameters():
        assert parameter.requires_grad == (name in own), name
        assert (parameter.data_ptr() == mine[name].data_ptr()) == (name not in own), name
    assert 0 < len(own) < len(mine) and backbone.trained_state_dict() == {}

    tokens = twin(images)
    torch.testing.assert_close(tokens.patches, before.patches, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert not twin(images).patches.requires_grad
    (tokens.patches.square() * torch.linspace(-1, 1, tokens.patches.shape[-1])).sum().backward()
    moved = [name for name, parameter in twin.model.named_parameters() if parameter.grad is not None]
    assert moved and set(moved) <= set(own)
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5).step()
    assert (twin(images).patches - before.patches).norm() > 1e-4
    assert not any(module.training for module in twin.modules())

    assert torch.equal(backbone(images).patches, before.patches)
    assert flags == {name: parameter.requires_grad for name, parameter in backbone.model.named_parameters()}
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())
    again = backbone.trainable_copy(1)
    again.load_trained(twin.trained_state_dict())
    assert torch.equal(again(images).patches, twin(images).patches)
    with pytest.raises(ValueError, match=r"state must hold exactly the \d+ trained tensors of this copy, differs in '"):
        again.load_trained({name: own[name] for name in list(own)[1:]})
    with pytest.raises(ValueError, match=r"must have shape \[.*\], got \[99\]\."):
        again.load_trained({**own, next(iter(own)): torch.zeros(99)})


def test_moving_a_trainable_copy_leaves_the_original_where_it_is(backbone: Backbone) -> None:
    twin = backbone.trainable_copy(1).to(torch.float64)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert twin(images_for(backbone, 2, 2)).patches.dtype == torch.float64


def test_counts_of_blocks_that_are_refused(backbone: Backbone) -> None:
    for count in (0, -1, 99):
        with pytest.raises(ValueError, match=rf"num_blocks must be in 1\.\.\d+, got {count}\."):
            backbone.trainable_copy(count)
    with pytest.raises(ValueError, match=r"num_blocks must be an int, got 1\.0\."):
        backbone.trainable_copy(1.0)  # type: ignore[arg-type]


def test_a_copy_of_a_copy_cannot_forget_what_was_trained(backbone: Backbone) -> None:
    twin = backbone.trainable_copy(2)
    with pytest.raises(ValueError, match=r"num_blocks must be >= 2, the blocks that .* owns already, got 1\."):
        twin.trainable_copy(1)  # would save the last block alone, by the fingerprint of the weights before both
    assert set(twin.trainable_copy(2).trained_state_dict()) == set(twin.trained_state_dict())


def test_parameters_that_a_move_replaces_are_still_trained(spec: str) -> None:
    expected = set(load_backbone(spec).trainable_copy(1).trained_state_dict())
    moved = load_backbone(spec).to("meta")  # where a parameter cannot keep its place in memory, a new one is made
    assert set(moved.trainable_copy(1).trained_state_dict()) == expected


# ---- compilation and half precision


def compiled_equals_eager(spec: str, mode: str | None, backend: str = "aot_eager") -> None:
    backbone = load_backbone(spec, mode=mode)
    torch.compiler.reset()
    compiled = torch.compile(backbone, backend=backend, fullgraph=True)
    images = images_for(backbone, 2, 3)
    tokens, expected = compiled(images), backbone(images)
    torch.testing.assert_close(tokens.patches, expected.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.pooled, expected.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [VIT, CONVOLUTION], ids=["transformer", "convolution"])
def test_a_compiled_backbone_gives_equal_tokens_in_one_graph(config: dict[str, Any], tmp_path: Path) -> None:
    compiled_equals_eager(f"open_clip:local-dir:{write_folder(tmp_path, config)}", None)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is none")
def test_a_backbone_compiled_by_inductor_gives_equal_tokens(spec: str) -> None:
    compiled_equals_eager(spec, None, "inductor")


@pytest.mark.slow
def test_every_mode_compiles(case: Case, spec: str) -> None:
    for mode in case.modes:
        compiled_equals_eager(spec, mode)


def test_half_precision_is_close_in_every_mode(case: Case, spec: str) -> None:
    """Cosine of at least .99 with the tokens of float32: bfloat16 keeps 8 bits."""
    for mode in case.modes:
        backbone, half = load_backbone(spec, mode=mode), load_backbone(spec, mode=mode, dtype=torch.bfloat16)
        images = images_for(backbone, 3, 4)
        tokens, expected = half(images), backbone(images)
        assert tokens.patches.dtype == torch.float32
        assert F.cosine_similarity(tokens.patches, expected.patches, dim=-1).min() > 0.99, mode
        assert F.cosine_similarity(tokens.pooled, expected.pooled, dim=-1).min() > 0.99, mode


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


def test_what_is_remembered_of_weights_goes_when_others_are_loaded(case: Case, spec: str) -> None:
    mode = case.modes[-1] if case.modes == ("raw",) else "surgery"
    backbone, other = load_backbone(spec, mode=mode), load_backbone(spec, mode=mode)
    twin = backbone.trainable_copy(1)
    before = backbone.fingerprint(), twin.fingerprint(), backbone.text_origin
    changed = {name: 1.5 * value for name, value in backbone.state_dict().items() if value.is_floating_point()}
    assembly = nn.ModuleList([backbone, twin, other])
    assembly.load_state_dict({f"{n}.{key}": value for n in "012" for key, value in changed.items()}, strict=False)
    assert backbone.fingerprint() == other.fingerprint() != before[0]
    assert twin.fingerprint() == before[1]  # that of the weights it was made from
    if before[2] is not None:
        assert torch.equal(backbone.text_origin, backbone.encode_text([""])[0])
        assert not torch.equal(backbone.text_origin, before[2])


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


def test_mode_and_dtype_that_are_refused(case: Case, spec: str) -> None:
    with pytest.raises(ValueError, match=rf"mode must be one of {re.escape(str(case.modes))} or None, got 'rwa'\."):
        load_backbone(spec, mode="rwa")
    with pytest.raises(ValueError, match=r"dtype must be a floating point type of torch, got torch\.int8\."):
        load_backbone(spec, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"dtype must be a floating point type of torch, got 'bfloat16'\."):
        load_backbone(spec, dtype="bfloat16")  # type: ignore[arg-type]


def test_mode_and_sign_of_a_backbone_cannot_be_set_to_what_is_not_so(case: Case, spec: str) -> None:
    backbone = load_backbone(spec)
    for wrong in (0, 2, "up", None):
        with pytest.raises(ValueError, match=rf"orientation must be \+1 or -1, got {wrong!r}\."):
            backbone.orientation = wrong  # type: ignore[assignment]
    backbone.orientation = -case.orientation
    assert backbone.trainable_copy(1).orientation == copy.deepcopy(backbone).orientation == -case.orientation
    with pytest.raises(
        ValueError, match=rf"mode is chosen when .* is loaded, and is {case.default_mode!r}, got 'sclip'\."
    ):
        backbone.mode = "sclip"
    assert backbone.mode == case.default_mode


def test_weights_that_are_no_numbers_are_refused(case: Case, tmp_path: Path) -> None:
    spec = case.spec(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    name = next(name for name, value in weights.items() if name.startswith("vis") and value.is_floating_point())
    weights[name].view(-1)[-1] = torch.inf
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"weights of '{spec}' must be finite numbers, and those of '{name}' are not\."
    ):
        load_backbone(spec)


def test_embedded_is_the_shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, CONVOLUTION)
    monkeypatch.setattr("arrcoc.backbones.asset_path", lambda name: {"embedded_clip": folder}[name])
    embedded = load_backbone("embedded")
    assert embedded.spec == "embedded"
    assert embedded.fingerprint() == load_backbone(f"open_clip:local-dir:{folder}").fingerprint()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("embeded", r"backbone must be 'embedded', .*got 'embeded', did you mean 'embedded'\?\."),
        ("openclip:ViT-B-16/openai", r"got 'openclip:ViT-B-16/openai', did you mean 'open_clip'"),
        ("open_clip:", r"backbone must be 'embedded', 'open_clip:NAME/TAG'"),
        ("", r"backbone must be 'embedded'"),
        (None, r"backbone must be 'embedded', .* got None\."),
        ("hf:", r"got 'hf:'\."),
        ("open_clip:local-dir:", r"got 'open_clip:local-dir:'\."),
        ("ViT-B-16/openai", r"got 'ViT-B-16/openai', did you mean 'open_clip:ViT-B-16/openai' or 'hf:ViT-B-16/openai'"),
    ],
)
def test_specs_that_are_refused(bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(bad)


def test_a_folder_of_the_other_kind_says_how_it_is_loaded(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder, name in ((mine, "open_clip_config.json"), (theirs, "config.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    for spec in (f"hf:{mine}", f"open_clip:{mine}", str(mine)):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"did you mean 'open_clip:local-dir:{mine}'\?\.$"):
            load_backbone(spec)
    for spec in (f"open_clip:local-dir:{theirs}", f"open_clip:{theirs}", str(theirs)):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"did you mean 'hf:{theirs}'\?\.$"):
            load_backbone(spec)


def test_importing_backbones_is_cheap() -> None:
    heavy = "{'open_clip', 'timm', 'transformers', 'torchvision'}"
    code = f"import sys, arrcoc.backbones; assert not {heavy} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)
