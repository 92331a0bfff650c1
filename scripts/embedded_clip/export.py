"""Write the model as an open_clip folder: configuration, half-precision weights, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from arrcoc._files import atomic_path, write_json, write_text

from .space import JOINT
from .student import VERSION, Student
from .text_tower import CONTEXT, PAD, SEP

WIDTH, LAYERS, HEADS = 256, 4, 4
SIZE = 512  # longest side at which the tower is used: more tokens than the 448 pixels of its training, and better maps


def config(vocabulary: int, logit_bias: float) -> dict[str, Any]:
    """open_clip_config.json. ``logit_bias`` makes the similarity logits an absolute scale, as in SigLIP."""
    return {
        "model_cfg": {
            "embed_dim": JOINT,
            "init_logit_bias": logit_bias,
            "vision_cfg": {
                "timm_model_name": f"tf_efficientnet_lite{VERSION}",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "timm_proj_bias": True,
                "image_size": SIZE,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "local",
                "width": WIDTH,
                "heads": HEADS,
                "layers": LAYERS,
                "pad_id": PAD,
                "eos_id": SEP,
                "pool_type": "eos",
                "proj_type": "linear",
                "proj_bias": True,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "size": [SIZE, SIZE],
        },
    }


def export(folder: Path, settings: dict[str, Any], state: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write the folder."""
    write_json(folder / "open_clip_config.json", settings)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "padding_side": "right",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": False,
        },
    )
    half = {
        name: value.detach().half().contiguous() if value.is_floating_point() else value
        for name, value in state.items()
    }
    with atomic_path(folder / "open_clip_model.safetensors") as temporary:
        save_file(half, temporary, metadata={"format": "pt"})


def assemble(student: Student, text: nn.Module, settings: dict[str, Any], logit_scale: float) -> dict[str, Tensor]:
    """State dict of open_clip's CustomTextCLIP with both towers in it."""
    import open_clip

    model = open_clip.model.CustomTextCLIP(**{k: v for k, v in settings["model_cfg"].items() if k != "custom_text"})
    model.visual.trunk.load_state_dict(student.trunk.state_dict())
    model.visual.head.proj.load_state_dict(student.head.state_dict())
    model.text.load_state_dict(text.state_dict())
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(logit_scale).log())
    state: dict[str, Tensor] = model.state_dict()
    return state
