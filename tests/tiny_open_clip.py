"""Tiny random open_clip models in folders, loaded by the tests like real ones.

open_clip knows a timm model by its name alone, so tiny SigLIP, PE-Core and EVA-CLIP towers are made known to timm here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
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


def timm_tower(name: str, pool: str, proj: str | None = None) -> dict[str, Any]:
    """Configuration of a model with a timm image tower."""
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 32}
    return {"embed_dim": 24, "custom_text": True, "vision_cfg": vision, "text_cfg": CONVOLUTION["text_cfg"]}


def _tiny(kind: type[nn.Module], given: dict[str, Any], **own: Any) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    asked = {name: given[name] for name in ("num_classes", "global_pool") if name in given}
    return kind(**{**size, **own, **asked})


@register_model
def tiny_siglip(pretrained: bool = False, **given: Any) -> nn.Module:
    """As SigLIP and SigLIP 2: no class token, pooled by a map head."""
    return _tiny(VisionTransformer, given, class_token=False, global_pool="map")


@register_model
def tiny_pe_core(pretrained: bool = False, **given: Any) -> nn.Module:
    """As PE-Core: positions are added and rotated, pooled by a map head over all tokens, then projected."""
    rotation = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}
    own = {"attn_type": "rope", "use_pre_transformer_norm": True, "attn_pool_num_heads": 4, **rotation}
    return _tiny(Eva, given, global_pool="map", **own)


@register_model
def tiny_eva01(pretrained: bool = False, **given: Any) -> nn.Module:
    """As EVA01: queries and values have biases and keys have none."""
    return _tiny(Eva, given, global_pool="token", init_values=0.5)


@register_model
def tiny_eva02(pretrained: bool = False, **given: Any) -> nn.Module:
    """As EVA02: separate projections, norms inside attention and MLP, rotated positions."""
    own = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    return _tiny(Eva, given, global_pool="token", use_rot_pos_emb=True, ref_feat_shape=(6, 6), **own)


@register_model
def tiny_average(pretrained: bool = False, **given: Any) -> nn.Module:
    """A plain mean behind the norm, queries and keys normalised, position-free prefix."""
    own = {"qk_norm": True, "fc_norm": False, "no_embed_class": True, "reg_tokens": 2, "init_values": 0.5}
    return _tiny(VisionTransformer, given, global_pool="avg", class_token=False, **own)


COCA = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {**VIT["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**CONVOLUTION["text_cfg"], "pool_type": "argmax", "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 8, "vocab_size": len(WORDS), "width": 24, "heads": 2, "layers": 1},
}
SIGLIP = timm_tower("tiny_siglip", "map", "none")
PE_CORE = timm_tower("tiny_pe_core", "map")
EVA01, EVA02 = timm_tower("tiny_eva01", "token"), timm_tower("tiny_eva02", "token")
TIMM_CLASS_TOKEN = timm_tower("test_vit", "token")
TIMM_AVERAGE, TIMM_PLAIN_AVERAGE = timm_tower("test_vit2", "avg", "linear"), timm_tower("tiny_average", "avg")


def build_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A random open_clip model whose normalisation layers and learned queries do something, in eval mode."""
    config = json.loads(json.dumps(config))
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    kind = open_clip.CoCa if "multimodal_cfg" in config else kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = kind(**config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        if "multimodal_cfg" in config:
            nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves it as the memory was
        for name, parameter in model.named_parameters():
            timm = "timm_model_name" in config["vision_cfg"] and parameter.ndim < 4  # learned queries, tiny by default
            if name.startswith("visual.") and (timm or parameter.ndim == 1 or name.endswith("head_scale")):
                nn.init.normal_(parameter, parameter.mean().item(), 0.2)
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
