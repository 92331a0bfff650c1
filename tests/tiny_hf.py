"""Tiny random transformers models in folders, with tokenizer and preprocessor, loaded by the tests like real ones."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATISTICS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
CONTEXT = {"clip": 12, "siglip": 16, "siglip2": 16, "metaclip_2": 12}
KINDS = tuple(CONTEXT)


def build_config(kind: str, **vision: Any) -> Any:
    """Configuration of a tiny model: patches of 8 pixels, a native grid of 4 x 4, two or three layers."""
    import transformers

    classes = {
        "clip": transformers.CLIPConfig,
        "metaclip_2": transformers.MetaClip2Config,
        "siglip": transformers.SiglipConfig,
        "siglip2": transformers.Siglip2Config,
    }
    tokenizer = build_tokenizer(kind)
    native = {"num_patches": 16} if kind == "siglip2" else {"image_size": 32}
    projection = {"projection_dim": 24} if kind in ("clip", "metaclip_2") else {}
    return classes[kind](
        vision_config={**SIZE, "num_hidden_layers": 3, "patch_size": 8, **native, **projection, **vision},
        text_config={
            **SIZE,
            **projection,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT[kind],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        **projection,
    )


def build_model(kind: str, seed: int = 0, **vision: Any) -> nn.Module:
    """A random model no weight of which is zero or one, in eval mode."""
    import transformers

    classes = {
        "clip": transformers.CLIPModel,
        "metaclip_2": transformers.MetaClip2Model,
        "siglip": transformers.SiglipModel,
        "siglip2": transformers.Siglip2Model,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = classes[kind](build_config(kind, **vision))
        shake(model)
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
            if hasattr(model, "logit_bias"):
                model.logit_bias.fill_(-3.0)
    return model.eval()


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every weight off what it starts at, so that none can be left out unseen."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else 0.05))


def build_tokenizer(kind: str) -> Any:
    """A tokenizer of letters, of the class that checkpoints of this kind name."""
    import transformers

    if kind == "clip":
        words = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
        vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    if kind == "metaclip_2":
        words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *string.ascii_letters]
        return transformers.XLMRobertaTokenizer(vocab=[(word, -float(n)) for n, word in enumerate(words)])
    # Checkpoints of SigLIP 2 name Gemma's tokenizer, and say that it adds no start, pads on the right, has no mask.
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters]
    options = {
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_input_names": ["input_ids"],
    }
    return transformers.GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], **options)


def write_folder(folder: Path, kind: str, *, model: nn.Module | None = None, nested: bool = False) -> Path:
    """A model in the format of the Hub: config.json, model.safetensors, tokenizer.json, preprocessor_config.json.

    With ``nested`` the statistics stand in processor_config.json, where newer checkpoints have them.
    """
    saved: Any = model or build_model(kind)
    saved.save_pretrained(folder)
    build_tokenizer(kind).save_pretrained(folder)
    name, content = (
        ("processor_config.json", {"image_processor": STATISTICS})
        if nested
        else ("preprocessor_config.json", STATISTICS)
    )
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
