"""Every kind of backbone, tiny and random and loaded from a folder: what the contract tests run over.

A new kind of backbone is one more line in CASES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

import tiny_hf
import tiny_open_clip
from arrcoc.backbones import Backbone
from arrcoc.backbones.dense import MODES


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of backbone.

    Args:
        name: of the kind.
        spec: writes the model into a folder and says how it is loaded.
        embedding: what the wrapped model itself says of normalised pixels at its native size.
        native_size: (height, width) in pixels.
        orientation: of mode raw.
        default_mode: of ``mode=None``.
        modes: all that it offers.
    """

    name: str
    spec: Callable[[Path], str]
    embedding: Callable[[Backbone, Tensor], Tensor]
    native_size: tuple[int, int] = (32, 32)
    orientation: int = 1
    default_mode: str = "raw"
    modes: tuple[str, ...] = tuple(MODES)


def open_clip_embedding(backbone: Backbone, pixels: Tensor) -> Tensor:
    """What open_clip itself gives; CoCa's tower gives its tokens as well."""
    model: Any = backbone.model
    embedding = model.visual(pixels)
    return embedding[0] if isinstance(embedding, tuple) else embedding


def transformers_embedding(backbone: Backbone, pixels: Tensor) -> Tensor:
    """What transformers itself gives; NaFlex takes flattened patches, a mask and the grid."""
    model: Any = backbone.model
    inputs = {"pixel_values": pixels}
    if model.config.model_type == "siglip2":
        rows, columns = backbone.stride
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=rows, q=columns)
        grid = torch.tensor([[pixels.shape[2] // rows, pixels.shape[3] // columns]] * len(pixels))
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": grid}
    embedding: Tensor = model.get_image_features(**inputs).pooler_output
    return embedding


def open_clip_case(name: str, config: dict[str, Any], **other: Any) -> Case:
    return Case(
        name=f"open_clip {name}",
        spec=lambda folder: f"open_clip:local-dir:{tiny_open_clip.write_folder(folder, config)}",
        embedding=open_clip_embedding,
        **other,
    )


def transformers_case(kind: str, **other: Any) -> Case:
    return Case(
        name=f"transformers {kind}",
        spec=lambda folder: f"hf:{tiny_hf.write_folder(folder, kind)}",
        embedding=transformers_embedding,
        **other,
    )


UPSIDE_DOWN: dict[str, Any] = {"orientation": -1, "default_mode": "clearclip"}  # pooled by a class token

CASES = [
    open_clip_case("transformer", tiny_open_clip.VIT, **UPSIDE_DOWN),
    open_clip_case("coca", tiny_open_clip.COCA),
    open_clip_case("siglip", tiny_open_clip.SIGLIP),
    open_clip_case("pe-core", tiny_open_clip.PE_CORE),
    open_clip_case("average", tiny_open_clip.TIMM_PLAIN_AVERAGE),
    open_clip_case("convolution", tiny_open_clip.CONVOLUTION, native_size=(64, 64), modes=("raw",)),
    transformers_case("clip", **UPSIDE_DOWN),
    transformers_case("metaclip_2", **UPSIDE_DOWN),
    transformers_case("siglip"),
    transformers_case("siglip2"),
]
EMBEDDED = Case(
    name="embedded",
    spec=lambda folder: "embedded",
    embedding=open_clip_embedding,
    native_size=(256, 256),  # a convolution has none
    modes=("raw",),
)
