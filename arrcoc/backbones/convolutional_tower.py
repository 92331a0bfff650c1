"""Convolutional timm towers inside open_clip, cell by cell: tokens of an average-pooled map.

Token i is what the tower would say if its pooling saw cell i alone.

Axes: B images, N tokens, C width of the tower, D joint width, h and w grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from arrcoc.backbones.towers import Tower

AVERAGES = ("avg", "fast", "fastavg")
"""What timm calls average pooling."""


def reason_against(visual: Any) -> str | None:
    """Why open_clip's TimmModel cannot be read as a convolution with average pooling, or None if it can."""
    from timm.layers import SelectAdaptivePool2d

    trunk = visual.trunk
    pools = [getattr(part, "global_pool", None) for part in (trunk, getattr(trunk, "head", None))]
    averages = any(isinstance(pool, SelectAdaptivePool2d) and pool.pool_type in AVERAGES for pool in pools)
    if not averages or hasattr(visual.head, "pool") or getattr(trunk, "output_fmt", "NCHW") != "NCHW":
        return "it is not a convolutional tower with average pooling, or its input size is fixed"
    return None


class ConvolutionalTower(Tower):
    """Tokens of an average-pooled timm tower: head(features at cell i); pooled = head(mean over cells of features).

    Where the head is affine the mean of the tokens is the image embedding, and tokens are left unnormalised. Where it
    normalises or bends (ConvNeXt, mlp projections) they have unit norm, as in Yu et al. 2023 (FC-CLIP, section 3.3).
    The stages of EfficientNet, ConvNeXt and FastViT can be trained one by one.
    """

    def __init__(self, visual: Any, mode: str | None = None) -> None:
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        stride = int(trunk.feature_info[-1]["reduction"])
        self.stride = (stride, stride)
        self.native_grid = (visual.image_size[0] // stride, visual.image_size[1] // stride)
        self.modes = ("raw",)
        self.mode, self.orientation = self._choose(mode, "raw"), 1
        self.normalize_patches = not self._head_is_affine()
        self.num_blocks = len(self._parts()[1])

    def features(self, pixels: Tensor, num_last: int = 0) -> Tensor:
        self._check_num_last(num_last)
        if not num_last:
            return self.trunk.forward_features(pixels)  # type: ignore[no-any-return]
        before, stages, _ = self._parts()
        return _run((*before, *stages[:-num_last]), pixels)

    def finish(self, features: Tensor, grid: tuple[int, int], num_last: int = 0) -> tuple[Tensor, Tensor]:
        self._check_num_last(num_last)
        _, stages, after = self._parts()
        features_BChw = _run((*stages[-num_last:], *after), features) if num_last else features
        cells = rearrange(features_BChw, "b c h w -> (b h w) c 1 1")
        patches_BND = rearrange(self._head(cells), "(b n) d -> b n d", b=len(features_BChw))
        return patches_BND, self._head(features_BChw)

    def last_parameters(self, num_last: int) -> list[nn.Parameter]:
        self._check_num_last(num_last)
        before, stages, _ = self._parts()
        kept = (*before, *stages[: len(stages) - num_last])
        frozen = {id(parameter) for part in kept for parameter in part.parameters()}
        return [parameter for parameter in self.visual.parameters() if id(parameter) not in frozen]

    def _check_num_last(self, num_last: int) -> None:
        if num_last and not self.num_blocks:
            raise ValueError(
                f"image tower timm {type(self.trunk).__name__} cannot be trained in parts: its stages are not known "
                "here; those of EfficientNet, ConvNeXt and FastVit are."
            )
        super()._check_num_last(num_last)

    def _parts(self) -> tuple[Sequence[nn.Module], Sequence[nn.Module], Sequence[nn.Module]]:
        """What the trunk's forward_features runs, in order; nothing for a trunk whose parts are not known here."""
        trunk = self.trunk
        match type(trunk).__name__:
            case "EfficientNet":
                return (trunk.conv_stem, trunk.bn1), list(trunk.blocks), (trunk.conv_head, trunk.bn2)
            case "ConvNeXt":
                return (trunk.stem,), list(trunk.stages), (trunk.norm_pre,)
            case "FastVit":
                return (trunk.stem,), list(trunk.stages), (trunk.final_conv,)
        return (), (), ()

    def _head(self, features_BChw: Tensor) -> Tensor:
        pooled: Tensor = self.visual.head(self.trunk.forward_head(features_BChw))
        return pooled

    @torch.no_grad()
    def _head_is_affine(self) -> bool:
        """Does averaging commute with the head? Tried on four features rather than read off class names."""
        weight = next(self.visual.parameters())
        probe = torch.randn(4, self.trunk.num_features, 1, 1, generator=torch.Generator().manual_seed(0)).to(weight)
        return torch.allclose(self._head(probe).mean(0), self._head(probe.mean(0, keepdim=True))[0], 1e-2, 1e-2)


def _run(parts: Sequence[nn.Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x
