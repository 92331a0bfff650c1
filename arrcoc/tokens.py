"""Visual tokens of an image batch, with the grid they came from.

Axes: B batch, N tokens (row-major over the grid), D embedding width, H and W grid height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Patch tokens in the joint image-text space, and the image embedding.

    Args:
        patches: float tensor [B, N, D], row-major over the grid; not normalised.
        pooled: float tensor [B, D], the embedding that the backbone gives the whole image; not normalised.
        grid: (height, width) in tokens; height * width == N.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    patches: Tensor
    pooled: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        if self.patches.ndim != 3:
            raise ValueError(f"patches must have shape [B, N, D], got {list(self.patches.shape)}.")
        batch, num_tokens, width = self.patches.shape
        if self.pooled.shape != (batch, width):
            raise ValueError(f"pooled must have shape [{batch}, {width}], got {list(self.pooled.shape)}.")
        if len(self.grid) != 2 or min(self.grid) < 1 or self.grid[0] * self.grid[1] != num_tokens:
            raise ValueError(f"grid must be (height, width) with height * width = {num_tokens}, got {self.grid!r}.")

    def __len__(self) -> int:
        return self.patches.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, N."""
        return self.patches.shape[1]

    def with_patches(self, patches: Tensor) -> VisualTokens:
        """The same image with other patch tokens [B, N, D] on the same grid."""
        return VisualTokens(patches, self.pooled, self.grid)
