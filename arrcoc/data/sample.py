"""One picture with its queries and masks, and the share of each token that a mask covers.

Axes: Q queries, H and W picture height and width, h and w grid height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RelevanceSample:
    """A picture, what is asked of it, and where the answer is.

    Args:
        image: float tensor [3, H, W] in [0, 1].
        queries: Q texts.
        masks: bool tensor [Q, H, W]; all False where the query names nothing in the picture (an absent query).
        name: what a report calls the picture, e.g. its file name.
    """

    image: Tensor
    queries: tuple[str, ...]
    masks: Tensor
    name: str

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[0] != 3:
            raise ValueError(f"image must have shape [3, H, W], got {list(self.image.shape)}.")
        expected = (len(self.queries), *self.image.shape[1:])
        if self.masks.shape != expected or self.masks.dtype != torch.bool:
            raise ValueError(
                f"masks must be bool of shape {list(expected)}, got {self.masks.dtype} {list(self.masks.shape)}."
            )


def _overlap(size: int, cells: int) -> Tensor:
    """Matrix [cells, size]: share of each cell that each pixel fills; rows sum to 1."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * size / cells
    pixels = torch.arange(size, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], pixels)
    high = torch.minimum(edges[1:, None], pixels + 1)
    return (high - low).clamp(min=0) * cells / size


def coverage(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each token's area that the masks cover; exact for any size and grid.

    Args:
        masks: bool or float tensor [..., H, W].
        grid: (h, w) in tokens, over the whole picture.

    Returns:
        float32 tensor [..., h * w] in [0, 1], row-major.
    """
    rows = _overlap(masks.shape[-2], grid[0]).to(masks.device)
    columns = _overlap(masks.shape[-1], grid[1]).to(masks.device)
    return (rows @ masks.double() @ columns.T).flatten(-2).clamp(0, 1).float()
