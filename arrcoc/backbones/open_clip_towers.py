"""open_clip's own image towers in parts: VisionTransformer, with class token, average or CoCa's attentional pooler.

Towers of timm inside open_clip are read by timm_towers.py and convolutional_tower.py.

Axes: B images, T tokens inside the tower (prefix, then N patches), C width, D joint width, A heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from arrcoc.backbones import convolutional_tower, timm_towers
from arrcoc.backbones.convolutional_tower import ConvolutionalTower
from arrcoc.backbones.dense import Block
from arrcoc.backbones.positions import resample_positions
from arrcoc.backbones.timm_towers import TimmTower
from arrcoc.backbones.towers import Tower, TransformerTower

_SUPPORTED = (
    "Towers that work: open_clip's VisionTransformer pooled by class token, average or CoCa's attentional pooler "
    "(ViT-B-32, ViT-L-14, coca_ViT-L-14, ...); timm's VisionTransformer and Eva pooled by class token, average or map "
    "(ViT-B-16-SigLIP2, EVA02-B-16, PE-Core-B-16, ...); convolutional timm towers with average pooling "
    "(tf_efficientnet_lite0, convnext_*, MobileCLIP-S1, ...)."
)


_REFUSED_MODELS = ("swin", "vitamin", "vit_relpos", "vit_base_mci", "eva02_enormous")  # as `find_tower` would, later


def find_tower(visual: nn.Module, mode: str | None = None) -> Tower:
    """The reading that fits an open_clip image tower (``model.visual``), in a mode; None for the tower's default.

    Raises:
        ValueError: if the tower is not supported (the message lists what is), or does not offer the mode.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel):
        return _find_timm_tower(visual, mode)
    if isinstance(visual, VisionTransformer):
        return OpenClipTower(visual, mode)
    raise ValueError(f"image tower {type(visual).__name__} is not supported. {_SUPPORTED}")


def check_config(name: str, vision: dict[str, Any]) -> None:
    """Refuse early, before gigabytes are fetched, what a configuration already shows `find_tower` will refuse.

    Raises:
        ValueError: if the tower is a CLIP ResNet, or pools in a way that gives patches no embedding.
    """
    if "timm_model_name" in vision:
        pool, model = vision.get("timm_pool") or "avg", str(vision["timm_model_name"])
        refused = pool not in (*timm_towers.POOLINGS, *convolutional_tower.AVERAGES) or model.startswith(
            _REFUSED_MODELS
        )
    else:
        refused = isinstance(vision.get("attentional_pool"), str) or isinstance(vision.get("layers"), list)
    if refused:
        raise ValueError(f"image tower of {name!r} is not supported. {_SUPPORTED}")


def _find_timm_tower(visual: Any, mode: str | None) -> Tower:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    trunk = visual.trunk
    transformer = type(trunk) in (VisionTransformer, Eva)
    reason = timm_towers.reason_against(trunk) if transformer else convolutional_tower.reason_against(visual)
    if reason:
        raise ValueError(f"image tower timm {type(trunk).__name__} is not supported: {reason}. {_SUPPORTED}")
    return TimmTower(visual, mode) if transformer else ConvolutionalTower(visual, mode)


class OpenClipBlock(Block):
    """ResidualAttentionBlock (nn.MultiheadAttention) or CustomResidualAttentionBlock (open_clip's own attention)."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.attn.head_dim**-0.5)

    def norm_1(self, tokens: Tensor) -> Tensor:
        return self.module.ln_1(tokens)  # type: ignore[no-any-return]

    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.module.attn
        joined = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = rearrange(joined, "b t (three a k) -> three b a t k", three=3, a=attn.num_heads)
        return (attn.ln_q(q), attn.ln_k(k), v) if hasattr(attn, "ln_q") else (q, k, v)

    def output(self, heads: Tensor) -> Tensor:
        attn = self.module.attn
        if getattr(attn, "head_scale", None) is not None:
            heads = heads * attn.head_scale.flatten().repeat_interleave(attn.head_dim)
        if hasattr(attn, "ln_inner"):
            heads = attn.ln_inner(heads)
        branch = attn.out_proj(heads)
        if hasattr(self.module, "ln_attn"):
            branch = self.module.ln_attn(branch)
        return self.module.ls_1(branch)  # type: ignore[no-any-return]

    def norm_2(self, tokens: Tensor) -> Tensor:
        return self.module.ln_2(tokens)  # type: ignore[no-any-return]

    def mlp(self, normed: Tensor) -> Tensor:
        return self.module.ls_2(self.module.mlp(normed))  # type: ignore[no-any-return]


class OpenClipTower(TransformerTower):
    """open_clip's VisionTransformer; patch dropout is a matter of training and left out.

    A patch goes the way of what is pooled: through ln_post and proj. CoCa pools by the attention of learned queries:
    there a patch goes through that head alone, attention over one key being its value.

    Raises:
        ValueError: if it pools in no way that gives a patch an embedding, or its attention is not softmax(q k^T) v.
    """

    def __init__(self, visual: Any, mode: str | None = None) -> None:
        what = None
        if visual.attn_pool is not None and visual.attn_pool_type:
            what = f"attentional pooling {visual.attn_pool_type!r}"
        elif visual.pool_type not in ("tok", "avg"):
            what = f"pool_type {visual.pool_type!r}"
        elif any(getattr(block.attn, "scaled_cosine", False) for block in visual.transformer.resblocks):
            what = "scaled_cosine_attn"
        if what:
            raise ValueError(f"image tower VisionTransformer with {what} is not supported. {_SUPPORTED}")
        self.visual = visual
        self.stride = (int(visual.patch_size[0]), int(visual.patch_size[1]))
        self.native_grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))
        self.num_prefix = 1
        self.blocks = [OpenClipBlock(block) for block in visual.transformer.resblocks]
        pooling = "average" if visual.pool_type == "avg" else "class token"
        self.pooling = "attention" if visual.attn_pool is not None else pooling
        self.mean_is_embedding = self.pooling == "average" and not visual.final_ln_after_pool
        self.read_in(mode)

    def embed(self, pixels: Tensor) -> Tensor:
        visual = self.visual
        patches_BNC = rearrange(visual.conv1(pixels), "b c h w -> b (h w) c")
        class_token = visual.class_embedding.to(patches_BNC.dtype).expand(len(pixels), 1, -1)
        x = torch.cat([class_token, patches_BNC], dim=1)
        positions = resample_positions(
            visual.positional_embedding, self.native_grid, self.grid_of(pixels), num_prefix=1
        )
        return visual.ln_pre(x + positions.to(x.dtype))  # type: ignore[no-any-return]

    def tail(self) -> Sequence[nn.Module | nn.Parameter]:
        parts = (self.visual.ln_post, self.visual.attn_pool, self.visual.proj)
        return [part for part in parts if part is not None]

    def project(self, patches: Tensor) -> Tensor:
        if self.pooling == "attention":
            patches = _value_path(self.visual.attn_pool, patches)
        return self.visual.ln_post(patches) @ self.visual.proj  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:
        return self.visual._pool(tokens)[0] @ self.visual.proj  # type: ignore[no-any-return]


def _value_path(pooler: Any, patches: Tensor) -> Tensor:
    """open_clip's AttentionalPooler of each patch alone: output projection of the patch's value."""
    attn, normed = pooler.attn, pooler.ln_k(patches)
    width = attn.embed_dim
    weight = attn.in_proj_weight[2 * width :] if attn.in_proj_weight is not None else attn.v_proj_weight
    return attn.out_proj(F.linear(normed, weight, attn.in_proj_bias[2 * width :]))  # type: ignore[no-any-return]
