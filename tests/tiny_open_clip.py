"""Tiny random open_clip models in folders, loaded by the tests like real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "red", "cup", "dog"]
STATISTICS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
VIT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CONVOLUTION = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "test_efficientnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "image_size": 64,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": len(WORDS),
        "hf_tokenizer_name": "local",
        "width": 16,
        "heads": 2,
        "layers": 1,
        "pad_id": 0,
        "eos_id": 3,
        "pool_type": "eos",
        "proj_bias": True,
    },
}


def build_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A random open_clip model whose normalisation layers do something, in eval mode."""
    config = json.loads(json.dumps(config))
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind(**config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A model in open_clip's local-dir format."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": STATISTICS}))
    state = {name: value.contiguous() for name, value in build_model(config).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in config["text_cfg"]:
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
