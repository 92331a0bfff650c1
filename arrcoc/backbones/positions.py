"""Position embeddings learned on one grid, resampled to another: bicubic and antialiased, prefix tokens kept.

This is what open_clip and timm do when weights of one size are loaded into a model of another. It is done here at each
call instead, so that one model serves pictures of all sizes.

Axes: P prefix, N patches of the native grid, n of the other, C width, h and w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def resample_positions(
    embedding: Tensor, native: tuple[int, int], grid: tuple[int, int], num_prefix: int = 0
) -> Tensor:
    """Position embeddings for a grid.

    Args:
        embedding: [P + N, C], row-major over the native grid, prefix first.
        native: (h, w) of the embedding, in tokens.
        grid: (h, w) wanted, in tokens.
        num_prefix: P, positions of tokens that are not on the grid.

    Returns:
        [P + n, C]; the embedding itself if the grid is native, float32 or wider otherwise.
    """
    if grid == native:
        return embedding
    wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    maps = rearrange(wide[num_prefix:], "(h w) c -> 1 c h w", h=native[0], w=native[1])
    resized = F.interpolate(maps, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([wide[:num_prefix], rearrange(resized, "1 c h w -> (h w) c")])
