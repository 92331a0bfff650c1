"""timm's transformers inside open_clip, in parts: VisionTransformer and Eva (SigLIP, SigLIP 2, EVA-CLIP, PE-Core).

A patch goes the way of what is pooled: through the final norm, the head and open_clip's projection. A map head
(attention of a learned query over all tokens, then an MLP) is run on each patch alone: attention over one key is its
value.

Axes: B images, T tokens inside the tower (prefix, then N patches), C width, A heads, K width of a head, h and w grid.
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

POOLINGS = {"token": "class token", "avg": "average", "map": "attention"}
"""What timm calls a way of pooling -> what a `TransformerTower` calls it."""


def reason_against(trunk: Any) -> str | None:
    """Why a VisionTransformer or Eva of timm cannot be read, or None if it can."""
    from timm.layers import AttentionPoolLatent, PatchEmbed
    from timm.layers.attention import Attention, AttentionRope
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.vision_transformer import Block as VitBlock

    rope = getattr(trunk, "rope", None)
    pool = trunk.attn_pool
    if type(trunk.patch_embed) is not PatchEmbed:
        return f"its patches come from {type(trunk.patch_embed).__name__}"
    if trunk.global_pool not in POOLINGS:
        return f"it pools by {trunk.global_pool!r}"
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        return "its pooling head depends on positions"
    for block in trunk.blocks:
        if type(block) not in (VitBlock, EvaBlock):
            return f"its blocks are {type(block).__name__}"
        if type(block.attn) not in (Attention, AttentionRope, EvaAttention):
            return f"its attention is {type(block.attn).__name__}"
        if getattr(block.attn, "gate", None) is not None or getattr(block.attn, "num_kv_groups", 1) > 1:
            return "its attention is gated or shares keys among heads"
    if rope is not None and (type(rope) is not RotaryEmbeddingCat or getattr(rope, "rotate_half", False)):
        return f"its positions are rotated by {type(rope).__name__}"
    return None


class TimmBlock(Block):
    """timm's Block (VisionTransformer) or EvaBlock.

    Args:
        module: the block.
        rope: sines and cosines [N, 2 K] that rotate queries and keys of patches, or None.
    """

    def __init__(self, module: Any, rope: Tensor | None = None) -> None:
        super().__init__(module, module.attn.scale)
        self.rope = rope

    def norm_1(self, tokens: Tensor) -> Tensor:
        return self.module.norm1(tokens)  # type: ignore[no-any-return]

    def qkv(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.module.attn
        if attn.qkv is None:
            joined = torch.stack([attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)])
            q, k, v = rearrange(joined, "three b t (a k) -> three b a t k", a=attn.num_heads)
        else:
            bias = attn.qkv.bias
            if bias is None and getattr(attn, "q_bias", None) is not None:  # Eva: no bias of keys
                bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            joined = F.linear(normed, attn.qkv.weight, bias)
            q, k, v = rearrange(joined, "b t (three a k) -> three b a t k", three=3, a=attn.num_heads)
        return self._rotate(attn.q_norm(q)), self._rotate(attn.k_norm(k)), v

    def _rotate(self, heads_BATK: Tensor) -> Tensor:
        if self.rope is None:
            return heads_BATK
        from timm.layers import apply_rot_embed_cat

        num_prefix = heads_BATK.shape[2] - len(self.rope)
        rotated = apply_rot_embed_cat(heads_BATK[:, :, num_prefix:], self.rope).type_as(heads_BATK)
        return torch.cat([heads_BATK[:, :, :num_prefix], rotated], dim=2)

    def output(self, heads: Tensor) -> Tensor:
        attn = self.module.attn
        return self._scaled(attn.proj(attn.norm(heads)), 1)

    def norm_2(self, tokens: Tensor) -> Tensor:
        return self.module.norm2(tokens)  # type: ignore[no-any-return]

    def mlp(self, normed: Tensor) -> Tensor:
        return self._scaled(self.module.mlp(normed), 2)

    def _scaled(self, branch: Tensor, number: int) -> Tensor:
        if hasattr(self.module, f"ls{number}"):
            return getattr(self.module, f"ls{number}")(branch)  # type: ignore[no-any-return]
        gamma = getattr(self.module, f"gamma_{number}")
        return branch if gamma is None else gamma * branch


class TimmTower(TransformerTower):
    """timm's VisionTransformer or Eva; what drops patches or paths in training is left out."""

    def __init__(self, visual: Any, mode: str | None = None) -> None:
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        self.stride = (int(trunk.patch_embed.patch_size[0]), int(trunk.patch_embed.patch_size[1]))
        self.native_grid = (int(trunk.patch_embed.grid_size[0]), int(trunk.patch_embed.grid_size[1]))
        self.num_prefix = int(trunk.num_prefix_tokens)
        self.pooling = POOLINGS[trunk.global_pool]
        self.blocks = [TimmBlock(block) for block in trunk.blocks]
        self.mean_is_embedding = (
            self.pooling == "average"
            and not getattr(trunk, "pool_include_prefix", False)
            and isinstance(trunk.fc_norm, nn.Identity)
            and not hasattr(visual.head, "mlp")
        )
        self.read_in(mode)

    def embed(self, pixels: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.patch_embed.norm(rearrange(trunk.patch_embed.proj(pixels), "b c h w -> b (h w) c"))
        prefix = [token.expand(len(x), -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        if trunk.no_embed_class:
            x = torch.cat([*prefix, self._placed(x, pixels, 0)], dim=1)
        else:
            x = self._placed(torch.cat([*prefix, x], dim=1), pixels, self.num_prefix)
        return trunk.norm_pre(x)  # type: ignore[no-any-return]

    def _placed(self, x: Tensor, pixels: Tensor, num_prefix: int) -> Tensor:
        if self.trunk.pos_embed is None:
            return x
        embedding = self.trunk.pos_embed[0]
        return x + resample_positions(embedding, self.native_grid, self.grid_of(pixels), num_prefix).to(x.dtype)

    def blocks_at(self, grid: tuple[int, int]) -> Sequence[Block]:
        rope = getattr(self.trunk, "rope", None)
        if rope is None:
            return self.blocks
        from timm.layers import build_rotary_pos_embed

        angles = build_rotary_pos_embed(
            list(grid),
            dim=rope.dim,
            max_res=rope.max_res,
            temperature=rope.temperature,
            linear_bands=rope.linear_bands,
            in_pixels=rope.in_pixels,
            ref_feat_shape=rope.ref_feat_shape,
            grid_offset=rope.grid_offset,
            grid_indexing=rope.grid_indexing,
            device=self.trunk.patch_embed.proj.weight.device,
        )
        return [TimmBlock(block, torch.cat(angles, -1)) for block in self.trunk.blocks]

    def tail(self) -> Sequence[nn.Module]:
        parts = (self.trunk.norm, self.trunk.attn_pool, self.trunk.fc_norm, self.trunk.head, self.visual.head)
        return [part for part in parts if part is not None]

    def project(self, patches: Tensor) -> Tensor:
        trunk = self.trunk
        x = trunk.norm(patches)
        if trunk.attn_pool is not None:
            x = _value_path(trunk.attn_pool, x)
        return self.visual.head(trunk.head(trunk.fc_norm(x)))  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(tokens)))  # type: ignore[no-any-return]


def _value_path(pooler: Any, patches: Tensor) -> Tensor:
    """timm's AttentionPoolLatent of each patch alone: its value, the output projection and the MLP."""
    width = pooler.kv.weight.shape[0] // 2
    bias = None if pooler.kv.bias is None else pooler.kv.bias[width:]
    x: Tensor = pooler.proj(F.linear(patches, pooler.kv.weight[width:], bias))
    return x if pooler.mlp is None else x + pooler.mlp(pooler.norm(x))
