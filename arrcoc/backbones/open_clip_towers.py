"""How each kind of open_clip image tower gives patch tokens in the joint space, at any size, without being touched.

Two kinds work. A convolutional tower of timm averages its map: token i is what the tower would say if its pooling saw
cell i alone. An open_clip VisionTransformer has its last block's patches sent the way of its class token, through
ln_post and proj; positional embeddings are resampled for the grid at hand.

Axes: B images, C width of the tower, N tokens, D joint width, h and w grid, H and W pixels.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_SUPPORTED = (
    "Towers that work: VisionTransformer pooled by class token or average (ViT-B-32, ViT-B-16, ViT-L-14, ...) and "
    "convolutional timm towers with average pooling (tf_efficientnet_lite0, convnext_*, MobileCLIP-S1, ...)."
)


class Tower(Protocol):
    """An image tower read token by token; the attributes are those of `Backbone`, native_grid is that of training."""

    stride: tuple[int, int]
    native_grid: tuple[int, int]
    orientation: int
    normalize_patches: bool

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens [B, N, D] and image embedding [B, D] of normalised pixels [B, 3, H, W]."""
        ...


def find_tower(visual: nn.Module) -> Tower:
    """The reading that fits an open_clip image tower (``model.visual``).

    Raises:
        ValueError: if its patches have no embedding of their own (attention pooling), or its size is fixed.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, TimmModel):
        return ConvolutionalTower(visual)
    if isinstance(visual, VisionTransformer):
        return TransformerTower(visual)
    raise ValueError(f"image tower {type(visual).__name__} is not supported. {_SUPPORTED}")


def check_config(name: str, vision: dict[str, Any]) -> None:
    """Refuse early, before gigabytes are fetched, what a configuration already shows `find_tower` will refuse.

    Raises:
        ValueError: if the tower pools by attention or by a class token of timm's, or is a CLIP ResNet.
    """
    if "timm_model_name" in vision:
        refused = (vision.get("timm_pool") or "avg") not in ("avg", "fast", "fastavg")
    else:
        refused = bool(vision.get("attentional_pool")) or isinstance(vision.get("layers"), list)
    if refused:
        raise ValueError(f"image tower of {name!r} is not supported. {_SUPPORTED}")


class ConvolutionalTower:
    """Tokens of an average-pooled timm tower: head(features at cell i); pooled = head(mean over cells of features).

    Where the head is affine the mean of the tokens is the image embedding, and tokens are left unnormalised. Where it
    normalises or bends (ConvNeXt, mlp projections) they have unit norm, as in Yu et al. 2023 (FC-CLIP, section 3.3).
    """

    orientation = 1

    def __init__(self, visual: Any) -> None:
        from timm.layers import SelectAdaptivePool2d

        trunk = visual.trunk
        pools = [getattr(part, "global_pool", None) for part in (trunk, getattr(trunk, "head", None))]
        averages = any(isinstance(p, SelectAdaptivePool2d) and p.pool_type in ("avg", "fast", "fastavg") for p in pools)
        if not averages or hasattr(visual.head, "pool") or getattr(trunk, "output_fmt", "NCHW") != "NCHW":
            raise ValueError(
                f"image tower timm {type(trunk).__name__} is not supported: it is not a convolutional tower with "
                f"average pooling, or its input size is fixed. {_SUPPORTED}"
            )
        self.visual = visual
        stride = int(trunk.feature_info[-1]["reduction"])
        self.stride = (stride, stride)
        self.native_grid = (visual.image_size[0] // stride, visual.image_size[1] // stride)
        self.normalize_patches = not self._head_is_affine()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features_BChw = self.visual.trunk.forward_features(pixels)
        cells = rearrange(features_BChw, "b c h w -> (b h w) c 1 1")
        patches_BND = rearrange(self._head(cells), "(b n) d -> b n d", b=len(pixels))
        return patches_BND, self._head(features_BChw)

    def _head(self, features_BChw: Tensor) -> Tensor:
        pooled: Tensor = self.visual.head(self.visual.trunk.forward_head(features_BChw))
        return pooled

    @torch.no_grad()
    def _head_is_affine(self) -> bool:
        """Does averaging commute with the head? Tried on four features rather than read off class names."""
        weight = next(self.visual.parameters())
        probe = torch.randn(4, self.visual.trunk.num_features, 1, 1, generator=torch.Generator().manual_seed(0))
        probe = probe.to(weight)
        return torch.allclose(self._head(probe).mean(0), self._head(probe.mean(0, keepdim=True))[0], 1e-2, 1e-2)


class TransformerTower:
    """Tokens of an open_clip VisionTransformer: ln_post(z_i) @ proj with z the output of the last block.

    At the native size tokens and embedding equal open_clip's own. A tower that pools by its class token was never asked
    to align its patches, which shows as the opposite sign: orientation -1, unit norm. One that averages its patches is
    read like an average-pooled convolution: orientation +1, and plain where ln_post comes before the average, so that
    the tokens' mean is the embedding. Patch dropout is a matter of training and left out.
    """

    def __init__(self, visual: Any) -> None:
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            pooling = "attention pooling" if visual.attn_pool is not None else f"pool_type {visual.pool_type!r}"
            raise ValueError(f"image tower VisionTransformer with {pooling} is not supported. {_SUPPORTED}")
        self.visual = visual
        self.stride = (int(visual.patch_size[0]), int(visual.patch_size[1]))
        self.native_grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))
        self.orientation = 1 if visual.pool_type == "avg" else -1
        self.normalize_patches = visual.pool_type == "tok" or visual.final_ln_after_pool

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        visual = self.visual
        patches_BChw = visual.conv1(pixels)
        class_token = visual.class_embedding.to(patches_BChw.dtype).expand(len(pixels), 1, -1)
        x = torch.cat([class_token, rearrange(patches_BChw, "b c h w -> b (h w) c")], dim=1)
        x = x + self._positions(patches_BChw.shape[-2], patches_BChw.shape[-1]).to(x.dtype)
        x = visual.transformer(visual.ln_pre(x))
        normed = visual.ln_post(x)
        pooled = visual.ln_post(self._pool(x)) if visual.final_ln_after_pool else self._pool(normed)
        return normed[:, 1:] @ visual.proj, pooled @ visual.proj

    def _pool(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.visual.pool_type == "tok" else x[:, 1:].mean(dim=1)

    def _positions(self, height: int, width: int) -> Tensor:
        """Positional embeddings [1 + h w, C] for a grid: bicubic, antialiased, as open_clip resizes them at loading."""
        embedding: Tensor = self.visual.positional_embedding
        if (height, width) == self.native_grid:
            return embedding
        h, w = self.native_grid
        wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        native = rearrange(wide[1:], "(h w) c -> 1 c h w", h=h, w=w)
        resized = F.interpolate(native, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([wide[:1], rearrange(resized, "1 c h w -> (h w) c")])
