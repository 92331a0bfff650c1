"""Visual tokens: shapes, resampling, fusing."""

from __future__ import annotations

import pytest
import torch

from arrcoc import VisualTokens
from arrcoc.tokens import fuse


def tokens(grid: tuple[int, int] = (2, 3), batch: int = 2, width: int = 4) -> VisualTokens:
    return VisualTokens(torch.randn(batch, grid[0] * grid[1], width), torch.randn(batch, width), grid)


@pytest.mark.parametrize(
    ("patches", "pooled", "grid", "message"),
    [
        ((6, 4), (2, 4), (2, 3), r"patches must have shape \[B, N, D\], got \[6, 4\]"),
        ((2, 6, 4), (2, 5), (2, 3), r"pooled must have shape \[2, 4\], got \[2, 5\]"),
        ((2, 6, 4), (2, 4), (2, 2), r"grid must be \(height, width\) with height \* width = 6, got \(2, 2\)"),
    ],
)
def test_shapes_must_belong_together(
    patches: tuple[int, ...], pooled: tuple[int, ...], grid: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VisualTokens(torch.zeros(patches), torch.zeros(pooled), grid)


def test_resampling_keeps_constant_maps_and_order_of_axes() -> None:
    ramp = torch.arange(3.0).repeat(2)[None, :, None]  # grows to the right on a 2 x 3 grid
    wide = VisualTokens(ramp, torch.zeros(1, 1), (2, 3)).resample((2, 6)).patches.view(2, 6)
    assert torch.equal(wide[0], wide[1])
    assert bool((wide[0].diff() >= 0).all())
    torch.testing.assert_close(wide[0, 2:4].mean(), torch.tensor(1.0))
    flat = VisualTokens(torch.ones(1, 6, 2), torch.zeros(1, 2), (2, 3)).resample((5, 4))
    torch.testing.assert_close(flat.patches, torch.ones(1, 20, 2))


def test_resampling_down_averages_the_cells_it_covers() -> None:
    fine = VisualTokens(torch.randn(1, 16, 3), torch.zeros(1, 3), (4, 4))
    coarse = fine.resample((1, 1)).patches[0, 0]
    torch.testing.assert_close(coarse, fine.patches[0].mean(0), atol=0.25, rtol=0)  # a triangle filter, not a box


def test_select_repeats_images() -> None:
    both = fuse((tokens(), tokens()))
    chosen = both.select(torch.tensor([1, 1, 0]))
    assert torch.equal(chosen.patches, both.patches[[1, 1, 0]])
    assert torch.equal(chosen.levels[1].patches, both.levels[1].patches[[1, 1, 0]])


def test_fuse_averages_on_the_grid_of_the_first() -> None:
    base, fine = tokens((2, 3)), tokens((4, 6))
    fused = fuse((base, fine))
    assert fused.grid == (2, 3)
    torch.testing.assert_close(fused.patches, (base.patches + fine.resample((2, 3)).patches) / 2)
    assert fuse((base,)) is base


def test_levels_must_share_the_grid() -> None:
    base = tokens()
    with pytest.raises(ValueError, match=r"levels must lie on the grid \(2, 3\), got one on \(3, 2\)"):
        VisualTokens(base.patches, base.pooled, base.grid, (tokens((3, 2)),))
