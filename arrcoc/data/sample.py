"""One picture with its queries and masks, and the share of each token that a mask covers.

Axes: Q queries, H and W picture height and width, h and w grid height and width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

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


class RelevanceDataset(Sequence[RelevanceSample]):
    """Samples made on demand: a data set says how many there are and makes number ``index``, always the same."""

    @abstractmethod
    def make_sample(self, index: int) -> RelevanceSample:
        """Sample number ``index`` in [0, len)."""

    @overload
    def __getitem__(self, index: int) -> RelevanceSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[RelevanceSample]: ...
    def __getitem__(self, index: int | slice) -> RelevanceSample | list[RelevanceSample]:
        if isinstance(index, slice):
            return [self.make_sample(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index!r}.")
        return self.make_sample(index % len(self))


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

    Raises:
        ValueError: if the masks have fewer than two axes or the grid is not two positive numbers.
    """
    if masks.ndim < 2:
        raise ValueError(f"masks must have shape [..., H, W], got {list(masks.shape)}.")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (height, width), both >= 1, got {grid!r}.")
    rows = _overlap(masks.shape[-2], grid[0]).to(masks.device)
    columns = _overlap(masks.shape[-1], grid[1]).to(masks.device)
    return (rows @ masks.double() @ columns.T).flatten(-2).clamp(0, 1).float()
