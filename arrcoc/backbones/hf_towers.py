"""Image towers of transformers: CLIP (and MetaCLIP 2), SigLIP, and SigLIP 2 for any aspect ratio ("NaFlex").

Positions of CLIP and SigLIP are resampled by `resample_positions`, bicubic and antialiased as in open_clip and timm, so
that one set of weights gives the same tokens in both libraries at every size. transformers' own
``interpolate_pos_encoding`` does not antialias and has another kernel (a = -0.75 instead of -0.5): it agrees at the
native size alone. SigLIP 2 NaFlex was trained at many sizes with positions resampled bilinearly, antialiased; its tower
does the same.

Axes: B images, T tokens inside the tower (class token, then patches), N patches, C width, A heads, K width of a head, D
joint width, h and w grid, p and q rows and columns of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from arrcoc.backbones.dense import Block
from arrcoc.backbones.positions import resample_positions
from arrcoc.backbones.towers import TransformerTower

MODEL_TYPES = ("clip", "metaclip_2", "siglip", "siglip2")


def find_tower(model: Any, mode: str | None) -> TransformerTower:
    """The reading that fits the image tower of a transformers model.

    Raises:
        ValueError: if the model is of another kind, its tower has no pooling head, or the mode is unknown.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in MODEL_TYPES or not hasattr(model, "vision_model") or not hasattr(model, "text_model"):
        raise ValueError(
            f"model must be a CLIPModel, MetaClip2Model, SiglipModel or Siglip2Model of transformers, "
            f"got {type(model).__name__}."
        )
    if model_type in ("clip", "metaclip_2"):
        return CLIPTower(model, mode)
    if not model.vision_model.use_head:
        raise ValueError(f"{type(model).__name__} has no pooling head (vision_use_head), and so no image embedding.")
    return SiglipTower(model, mode) if model_type == "siglip" else NaFlexTower(model, mode)


class EncoderLayer(Block):
    """A block as all these models have it."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.self_attn.scale)

    def norm_1(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.module.layer_norm1(tokens)
        return normed

    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.module.self_attn
        q, k, v = (
            rearrange(project(normed), "b t (a k) -> b a t k", k=attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return q, k, v

    def output(self, heads: Tensor) -> Tensor:
        projected: Tensor = self.module.self_attn.out_proj(heads)
        return projected

    def norm_2(self, tokens: Tensor) -> Tensor:
        normed: Tensor = self.module.layer_norm2(tokens)
        return normed

    def mlp(self, normed: Tensor) -> Tensor:
        branch: Tensor = self.module.mlp(normed)
        return branch


class CLIPTower(TransformerTower):
    """CLIPVisionModel: a class token in front, norms before and after the blocks, a projection."""

    num_prefix = 1
    pooling = "class token"

    def __init__(self, model: Any, mode: str | None) -> None:
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.stride, self.native_grid = _patches(self.vision.config)
        self.blocks = [EncoderLayer(layer) for layer in self.vision.encoder.layers]
        self.read_in(mode)

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.vision.embeddings
        patches_BNC, grid = _convolve(embeddings.patch_embedding, pixels)
        class_token = embeddings.class_embedding.expand(len(pixels), 1, -1)
        positions = resample_positions(embeddings.position_embedding.weight, self.native_grid, grid, num_prefix=1)
        tokens = torch.cat([class_token, patches_BNC], dim=1)
        normed: Tensor = self.vision.pre_layrnorm(tokens + positions.to(tokens.dtype))
        return normed

    def tail(self) -> Sequence[nn.Module]:
        return (self.vision.post_layernorm, self.projection)

    def project(self, patches: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.vision.post_layernorm(patches))
        return projected

    def pool(self, tokens: Tensor) -> Tensor:
        return self.project(tokens[:, 0])


class SiglipTower(TransformerTower):
    """SiglipVisionModel: patches alone, pooled by attention of a learned probe; the head's output is the embedding."""

    num_prefix = 0
    pooling = "attention"

    def __init__(self, model: Any, mode: str | None) -> None:
        self.vision = model.vision_model
        self.stride, self.native_grid = _patches(self.vision.config)
        self.blocks = [EncoderLayer(layer) for layer in self.vision.encoder.layers]
        self.read_in(mode)

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.vision.embeddings
        patches_BNC, grid = _convolve(embeddings.patch_embedding, pixels)
        positions = resample_positions(embeddings.position_embedding.weight, self.native_grid, grid)
        return patches_BNC + positions.to(patches_BNC.dtype)

    def tail(self) -> Sequence[nn.Module]:
        return (self.vision.post_layernorm, self.vision.head)

    def project(self, patches: Tensor) -> Tensor:
        head, attention = self.vision.head, self.vision.head.attention
        width = attention.embed_dim
        weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
        attended = attention.out_proj(F.linear(self.vision.post_layernorm(patches), weight, bias))
        projected: Tensor = attended + head.mlp(head.layernorm(attended))
        return projected

    def pool(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.vision.head(self.vision.post_layernorm(tokens))
        return pooled


class NaFlexTower(SiglipTower):
    """Siglip2VisionModel: SigLIP whose patches are flattened first and whose positions are resampled at every size."""

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self.vision.embeddings
        rows, columns = self.stride
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=rows, q=columns)
        h, w = self.grid_of(pixels)
        # no rearrange of a parameter: einops would note down its type, which ends torch.compile's graph
        native = embeddings.position_embedding.weight.unflatten(0, self.native_grid).movedim(-1, 0)[None]
        native = native.to(torch.promote_types(native.dtype, torch.float32))
        resized = F.interpolate(native, size=(h, w), mode="bilinear", align_corners=False, antialias=True)
        tokens: Tensor = embeddings.patch_embedding(patches)
        positions: Tensor = rearrange(resized, "1 c h w -> (h w) c")
        return tokens + positions.to(tokens.dtype)


def _patches(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stride and native grid."""
    num_patches = getattr(config, "num_patches", None)
    side = int(num_patches**0.5) if num_patches is not None else config.image_size // config.patch_size
    return (config.patch_size, config.patch_size), (side, side)


def _convolve(embedding: nn.Module, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Patch embeddings [B, N, C] and their grid."""
    patches_BChw: Tensor = embedding(pixels)
    return rearrange(patches_BChw, "b c h w -> b (h w) c"), (patches_BChw.shape[-2], patches_BChw.shape[-1])
