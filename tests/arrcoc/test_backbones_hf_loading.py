"""transformers backbones from folders and from the Hub: complete or refused, quiet, and never with random weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_hf
from arrcoc.backbones import load_backbone
from arrcoc.backbones.hf import load_hf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_hf.write_folder(tmp_path / "model", "clip")


@pytest.mark.parametrize("kind", tiny_hf.KINDS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_brings_weights_statistics_and_tokenizer(kind: str, nested: bool, tmp_path: Path) -> None:
    model = tiny_hf.build_model(kind, seed=1).to(torch.bfloat16)  # many checkpoints are stored in half
    folder = tiny_hf.write_folder(tmp_path, kind, model=model, nested=nested)
    state = torch.get_rng_state()
    backbone = load_backbone(f"hf:{folder}")
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.spec == f"hf:{folder}" and backbone.dtype == torch.float32
    assert load_hf(folder, spec="mine").dtype == torch.float32
    assert (backbone.mean, backbone.std) == (
        tuple(tiny_hf.STATISTICS["image_mean"]),
        tuple(tiny_hf.STATISTICS["image_std"]),
    )
    assert backbone.mode == ("raw" if kind.startswith("siglip") else "clearclip")
    assert not any(part.training for part in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(backbone.model.state_dict()[name], value.float()), name
    assert backbone.encode_text(["a red cup"]).shape == (1, backbone.embed_dim)


def test_loading_is_quiet_and_leaves_what_the_program_chose(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_info()
    transformers.logging.enable_progress_bar()
    capfd.readouterr()
    try:
        load_backbone(f"hf:{folder}")
        assert capfd.readouterr() == ("", "")
        assert transformers.logging.get_verbosity() == logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
        transformers.logging.disable_progress_bar()
        load_backbone(f"hf:{folder}")
        assert not transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity(chosen[0])
        if chosen[1]:
            transformers.logging.enable_progress_bar()


def test_older_weight_files_and_shards_load(folder: Path) -> None:
    expected = load_backbone(f"hf:{folder}").fingerprint()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_backbone(f"hf:{folder}").fingerprint() == expected
    (folder / "pytorch_model.bin").unlink()
    names = sorted(weights)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for shard, content in shards.items():
        save_file({name: weights[name] for name in content}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, content in shards.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_backbone(f"hf:{folder}").fingerprint() == expected


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"model folder '.*' has no config\.json\."),
        ("model.safetensors", r"model folder '.*' has no weights \(model\.safetensors, model-\*-of-\*\.safetensors, "),
        ("preprocessor_config.json", r"model folder '.*' has no preprocessor_config\.json\."),
        ("tokenizer.json", r"model folder '.*' has no tokenizer \(tokenizer\.json, vocab\.json, spiece\.model, "),
    ],
)
def test_folders_that_lack_a_file_are_refused(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_backbone(f"hf:{folder}")


def test_incomplete_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if "vision_model.encoder.layers.2.mlp" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError,
        match=r"cannot load the weights of 'hf:.*': '.*' lacks vision_model\.encoder\.layers\.2\.mlp\.fc1\.bias, "
        r".*, .* and 1 more; a model with random weights is of no use\.",
    ):
        load_backbone(f"hf:{folder}")
    assert torch.equal(torch.get_rng_state(), state)  # what transformers drew for the missing ones
    save_file(weights | {"logit_scale": torch.ones(3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has other shapes for logit_scale; a model with random weights is of no use"):
        load_backbone(f"hf:{folder}")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot load the weights of 'hf:.*' from '.*': "):
        load_backbone(f"hf:{folder}")


def test_broken_files_and_other_kinds_are_refused(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "clip"', '"model_type": "blip"'))
    with pytest.raises(
        ValueError,
        match=r"is a model of type 'blip', which is not supported\. Types that work: clip, metaclip_2, siglip",
    ):
        load_backbone(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON, got "):
        load_backbone(f"hf:{folder}")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list\."):
        load_backbone(f"hf:{folder}")
    (folder / "config.json").write_text(config)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(
        ValueError, match=r"std must be three numbers > 0, image_std of the model's preprocessor, got None"
    ):
        load_backbone(f"hf:{folder}")
    tiny_hf.write_folder(folder, "clip")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of 'hf:.*' from '.*': "):
        load_backbone(f"hf:{folder}")


def test_a_tokenizer_that_needs_sentencepiece_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ImportError, match=r"the tokenizer of 'hf:.*' needs more packages: pip install 'arrcoc\[siglip"):
        load_backbone(f"hf:{folder}")


# ---- names of the Hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Hub that is out of reach, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cache(hub: Path, name: str, kind: str) -> Path:
    """A model in the Hub's cache, as a download leaves it."""
    place = hub / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return tiny_hf.write_folder(place / "snapshots" / ("0" * 40), kind)


def test_a_name_is_found_in_the_cache(offline: Path) -> None:
    cached = cache(offline, "arrcoc-tests/tiny", "siglip2")
    backbone = load_backbone("hf:arrcoc-tests/tiny")
    assert backbone.spec == "hf:arrcoc-tests/tiny"
    assert backbone.fingerprint() == load_backbone(f"hf:{cached}").fingerprint()


@pytest.mark.usefixtures("offline")
def test_a_hub_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(
        ConnectionError,
        match=r"'hf:openai/clip-vit-base-patch16' is not on this machine and cannot be fetched\. Where the network "
        r"works, run `hf download openai/clip-vit-base-patch16 --local-dir FOLDER`, .* 'hf:FOLDER', or use 'embedded'",
    ) as caught:
        load_backbone("hf:openai/clip-vit-base-patch16")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_cache_without_weights_is_not_enough(offline: Path) -> None:
    (cache(offline, "arrcoc-tests/tiny", "clip") / "model.safetensors").unlink()
    with pytest.raises((ConnectionError, FileNotFoundError), match=r"is not on this machine|has no weights"):
        load_backbone("hf:arrcoc-tests/tiny")


def test_downloads_take_the_small_files_first_and_one_kind_of_weights(
    offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    remote = tiny_hf.write_folder(tmp_path / "remote", "clip")
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only:
            raise FileNotFoundError(name)
        asked.append(allow_patterns)
        return str(remote)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_backbone("hf:arrcoc-tests/tiny")
    assert len(asked) == 2 and asked[0] == ["*.json", "*.txt", "*.model"]
    assert "model.safetensors" in asked[1] and "pytorch_model.bin" not in asked[1]
    (remote / "model.safetensors").rename(remote / "pytorch_model.bin")
    asked.clear()
    with pytest.raises(ValueError, match=r"cannot load the weights"):  # they are no pickle
        load_backbone("hf:arrcoc-tests/tiny")
    assert "pytorch_model.bin" in asked[2] and len(asked) == 3
    (remote / "config.json").write_text('{"model_type": "blip"}')
    asked.clear()
    with pytest.raises(ValueError, match=r"'hf:arrcoc-tests/tiny' is a model of type 'blip'"):
        load_backbone("hf:arrcoc-tests/tiny")
    assert len(asked) == 1  # no weights were asked for


def test_a_model_that_the_hub_does_not_have_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def download(name: str, **options: object) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        ValueError, match=r"the Hugging Face Hub has no model 'arrcoc-tests/none', or it is gated or priv"
    ):
        load_backbone("hf:arrcoc-tests/none")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "a/b/c"])
def test_paths_that_are_no_folder_are_refused(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"'{name}' is neither a folder nor a name of the Hugging Face Hub"):
        load_backbone(f"hf:{name}")


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone must be 'embedded', .*'hf:NAME' or 'hf:FOLDER', got 'hf:'"):
        load_backbone("hf:")
