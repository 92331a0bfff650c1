"""Visual tokens of an image batch, with the grid they came from.

Axes: B batch, N tokens (row-major over the grid), D embedding width, H and W grid height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Patch tokens in the joint image-text space, and the image embedding.

    Args:
        patches: float tensor [B, N, D], row-major over the grid, in the backbone's own units.
        pooled: float tensor [B, D], the embedding that the backbone gives the whole image; not normalised.
        grid: (height, width) in tokens; height * width == N.
        levels: the scales that were averaged into ``patches``, on the same grid; empty for a single scale.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    patches: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    levels: tuple[VisualTokens, ...] = ()

    def __post_init__(self) -> None:
        if self.patches.ndim != 3:
            raise ValueError(f"patches must have shape [B, N, D], got {list(self.patches.shape)}.")
        batch, num_tokens, width = self.patches.shape
        if self.pooled.shape != (batch, width):
            raise ValueError(f"pooled must have shape [{batch}, {width}], got {list(self.pooled.shape)}.")
        if len(self.grid) != 2 or min(self.grid) < 1 or self.grid[0] * self.grid[1] != num_tokens:
            raise ValueError(f"grid must be (height, width) with height * width = {num_tokens}, got {self.grid!r}.")
        for level in self.levels:
            if level.patches.shape != self.patches.shape or level.grid != self.grid:
                raise ValueError(f"levels must lie on the grid {self.grid}, got one on {level.grid}.")

    def __len__(self) -> int:
        return self.patches.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, N."""
        return self.patches.shape[1]

    def with_patches(self, patches: Tensor) -> VisualTokens:
        """The same image with other patch tokens [B, N, D] on the same grid, as a single scale."""
        return VisualTokens(patches, self.pooled, self.grid)

    def select(self, index: Tensor) -> VisualTokens:
        """The images that an integer tensor [P] names, repeated where it repeats them."""
        levels = tuple(level.select(index) for level in self.levels)
        return VisualTokens(self.patches[index], self.pooled[index], self.grid, levels)

    def resample(self, grid: tuple[int, int]) -> VisualTokens:
        """The same image on another grid: antialiased bilinear interpolation of the tokens, a single scale."""
        if grid == self.grid:
            return self
        return VisualTokens(resample_maps(self.patches.mT, self.grid, grid).mT, self.pooled, grid)


def resample_maps(maps: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased interpolation of maps [B, C, N] from one grid to another, [B, C, N']."""
    maps_BCHW = rearrange(maps, "b c (h w) -> b c h w", h=grid[0], w=grid[1])
    return F.interpolate(maps_BCHW, new_grid, mode="bilinear", align_corners=False, antialias=True).flatten(2)


def fuse(levels: tuple[VisualTokens, ...]) -> VisualTokens:
    """Average the scales of one image on the grid of the first, and keep them as levels."""
    levels = tuple(level.resample(levels[0].grid) for level in levels)
    if len(levels) == 1:
        return levels[0]
    patches = torch.stack([level.patches for level in levels]).mean(0)
    pooled = torch.stack([level.pooled for level in levels]).mean(0)
    return VisualTokens(patches, pooled, levels[0].grid, levels)


def concatenate(parts: list[VisualTokens]) -> VisualTokens:
    """Images of several batches of one grid and as many scales in one."""
    levels = tuple(concatenate(list(level)) for level in zip(*(part.levels for part in parts), strict=True))
    patches = torch.cat([part.patches for part in parts])
    return VisualTokens(patches, torch.cat([part.pooled for part in parts]), parts[0].grid, levels)
