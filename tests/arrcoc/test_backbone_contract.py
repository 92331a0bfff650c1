"""What every backbone keeps in every mode: the matrix of all kinds and all dense modes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from arrcoc import HeadConfig, RelevanceHead, RelevanceModel
from arrcoc.backbones import Backbone, load_backbone
from tiny_backbones import CASES, EMBEDDED, Case

MATRIX = [(case, mode) for case in [EMBEDDED, *CASES] for mode in case.modes]
TEXTS = ["a red cup", "a photo of a dog"]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Backbones by case and mode, each written and loaded once."""
    specs = cache(lambda name: next(c for c in [EMBEDDED, *CASES] if c.name == name).spec(tmp_path_factory.mktemp("m")))
    return cache(lambda name, mode: load_backbone(specs(name), mode=mode))


@pytest.fixture(params=MATRIX, ids=lambda pair: f"{pair[0].name} {pair[1]}")
def pair(request: pytest.FixtureRequest, load: Any) -> tuple[Case, Backbone]:
    case, mode = request.param
    return case, load(case.name, mode)


def images_for(backbone: Backbone, rows: int, columns: int, batch: int = 1) -> Tensor:
    size = (rows * backbone.stride[0], columns * backbone.stride[1])
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def state_of(backbone: Backbone) -> dict[str, object]:
    """All that could be changed in the wrapped model: weights, flags, modes, hooks, attributes."""
    model = backbone.model
    modules = dict(model.named_modules())
    return {
        "weights": {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()},
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in modules.values()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values()],
        "attributes": {
            name: {key: repr(value) for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in modules.items()
        },
        "methods": [type(module).__name__ + str("forward" in vars(module)) for module in modules.values()],
    }


def test_tokens_keep_the_contract(pair: tuple[Case, Backbone]) -> None:
    """Shape, grid, norm, sign, embedding, determinism, independence of the batch; the model is left as it was."""
    case, backbone = pair
    before = state_of(backbone)
    assert backbone.orientation == (case.orientation if backbone.mode == "raw" else 1)
    rows, columns = (case.native_size[axis] // backbone.stride[axis] for axis in (0, 1))
    grids = {"native": (rows, columns), "half": (rows // 2, columns // 2), "wide": (2, 5), "tall": (3, 1)}
    for grid in ({**grids, "twice": (2 * rows, 2 * columns)} if case is not EMBEDDED else grids).values():
        images = images_for(backbone, *grid, batch=2)
        tokens = backbone(images.requires_grad_())
        assert tokens.grid == grid and tokens.patches.shape == (2, grid[0] * grid[1], backbone.embed_dim)
        assert tokens.pooled.shape == (2, backbone.embed_dim)
        assert tokens.patches.isfinite().all() and tokens.pooled.isfinite().all()
        assert not tokens.patches.requires_grad and not tokens.pooled.requires_grad
        if backbone.normalize_patches:
            torch.testing.assert_close(tokens.patches.norm(dim=-1), torch.ones(tokens.patches.shape[:2]))
        again, alone = backbone(images), backbone(images[1:])
        assert torch.equal(again.patches, tokens.patches) and torch.equal(again.pooled, tokens.pooled)
        torch.testing.assert_close(alone.patches, tokens.patches[1:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.pooled, tokens.pooled[1:], atol=1e-5, rtol=1e-4)

    images = torch.rand(2, 3, *case.native_size, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        embedding = case.embedding(backbone, (images - mean) / std)
    torch.testing.assert_close(backbone(images).pooled, embedding, atol=1e-5, rtol=1e-4)
    assert state_of(backbone) == before


def test_patches_are_row_major(pair: tuple[Case, Backbone]) -> None:
    """A patch that changes moves its own token most, or nearly so; attention of a random model is not that sharp."""
    _, backbone = pair
    before = images_for(backbone, 2, 5)
    rows, columns = backbone.stride
    tokens = backbone(before).patches
    ranks = []
    for number in range(10):
        row, column = divmod(number, 5)
        after = before.clone()
        own = after[:, :, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
        own.copy_((1 - own).round())
        moved = (backbone(after).patches - tokens).norm(dim=-1)[0]
        ranks.append(int((moved > moved[number]).sum()))
    assert sum(ranks) / len(ranks) < 1.5, ranks  # about 4 if tokens were column-major


def test_a_saved_model_finds_its_backbone_and_mode_again(
    pair: tuple[Case, Backbone], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, backbone = pair
    head = RelevanceHead(HeadConfig(embed_dim=backbone.embed_dim))
    model = RelevanceModel(backbone, head).eval()
    model.save_pretrained(tmp_path / "saved")
    if case is EMBEDDED:  # loading it takes a second, and others have shown it
        monkeypatch.setattr("arrcoc.model.relevance.load_backbone", lambda *_, **__: backbone)
    again = RelevanceModel.from_pretrained(tmp_path / "saved")
    for name in ("spec", "mode", "orientation", "embed_dim", "stride", "logit_scale", "logit_bias", "mean", "std"):
        assert getattr(again.backbone, name) == getattr(backbone, name), name
    images = images_for(backbone, 2, 3)
    with torch.no_grad():
        assert torch.equal(again(images, TEXTS[:1]), model(images, TEXTS[:1]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_fingerprint_survives_every_move(case: Case, load: Any) -> None:
    backbone = load(case.name, case.default_mode)
    moved = load_backbone(backbone.spec, dtype=torch.bfloat16)
    assert moved.fingerprint() == backbone.fingerprint()
    assert moved.to(torch.float64).fingerprint() == backbone.fingerprint()
    assert moved.to("meta").fingerprint() == backbone.fingerprint()
    torch.testing.assert_close(backbone.encode_text(TEXTS).norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("mode", [mode for case, mode in MATRIX if case is CASES[0]])
@pytest.mark.parametrize("case", [case for case in CASES if len(case.modes) > 1], ids=lambda case: case.name)
def test_a_trainable_copy_reads_in_the_same_mode(case: Case, mode: str, load: Any) -> None:
    backbone = load(case.name, mode)
    images = images_for(backbone, 2, 3)
    twin = backbone.trainable_copy(1)
    assert twin.mode == mode
    expected, tokens = backbone(images), twin(images)
    torch.testing.assert_close(tokens.patches, expected.patches, atol=1e-5, rtol=1e-4)
    assert tokens.patches.requires_grad and not expected.patches.requires_grad
