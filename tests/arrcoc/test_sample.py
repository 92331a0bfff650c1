"""Samples, lazily made data sets, and token coverage against an area-by-area sum."""

from __future__ import annotations

import pytest
import torch

from arrcoc.data.sample import RelevanceDataset, RelevanceSample, coverage


def slow_coverage(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Sum of the pixels' areas inside each cell, one pixel at a time."""
    height, width = mask.shape
    result = torch.zeros(grid, dtype=torch.float64)
    cell_height, cell_width = height / grid[0], width / grid[1]
    for cell_row in range(grid[0]):
        for cell_column in range(grid[1]):
            for row in range(height):
                for column in range(width):
                    overlap_y = min(row + 1, (cell_row + 1) * cell_height) - max(row, cell_row * cell_height)
                    overlap_x = min(column + 1, (cell_column + 1) * cell_width) - max(column, cell_column * cell_width)
                    area = max(overlap_y, 0) * max(overlap_x, 0)
                    result[cell_row, cell_column] += float(mask[row, column]) * area
    return (result / (cell_height * cell_width)).flatten()


@pytest.mark.parametrize(
    ("size", "grid"), [((7, 5), (3, 2)), ((9, 13), (4, 5)), ((6, 8), (3, 4)), ((3, 4), (5, 7)), ((5, 5), (1, 1))]
)
def test_coverage_is_the_covered_area(size: tuple[int, int], grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, *size, generator=generator) < 0.4
    expected = torch.stack([slow_coverage(mask, grid) for mask in masks]).float()
    torch.testing.assert_close(coverage(masks, grid), expected, rtol=0, atol=1e-6)


def test_coverage_keeps_the_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 3, 37, 53, generator=generator) < 0.3
    cells = coverage(masks, (7, 11))
    assert cells.shape == (2, 3, 77)
    torch.testing.assert_close(cells.mean(-1), masks.float().mean((-2, -1)), rtol=0, atol=1e-6)


def test_coverage_of_soft_masks_is_linear() -> None:
    mask = torch.rand(10, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(coverage(mask / 2, (3, 4)), coverage(mask, (3, 4)) / 2)


def test_coverage_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"masks must have shape \[\.\.\., H, W\], got \[4\]"):
        coverage(torch.zeros(4), (2, 2))
    with pytest.raises(ValueError, match=r"grid must be \(height, width\), both >= 1, got \(0, 3\)"):
        coverage(torch.zeros(4, 4), (0, 3))


def test_sample_says_what_is_wrong() -> None:
    image, masks = torch.zeros(3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"image must have shape \[3, H, W\], got \[4, 5\]"):
        RelevanceSample(image=image[0], queries=("a", "b"), masks=masks, name="x")
    with pytest.raises(ValueError, match=r"masks must be bool of shape \[1, 4, 5\], got torch\.bool \[2, 4, 5\]"):
        RelevanceSample(image=image, queries=("a",), masks=masks, name="x")
    with pytest.raises(ValueError, match=r"masks must be bool of shape \[2, 4, 5\], got torch\.float32"):
        RelevanceSample(image=image, queries=("a", "b"), masks=masks.float(), name="x")


class Numbers(RelevanceDataset):
    def __len__(self) -> int:
        return 3

    def make_sample(self, index: int) -> RelevanceSample:
        masks = torch.zeros(0, 1, 1, dtype=torch.bool)
        return RelevanceSample(image=torch.zeros(3, 1, 1), queries=(), masks=masks, name=str(index))


def test_data_set_is_a_sequence() -> None:
    numbers = Numbers()
    assert [sample.name for sample in numbers] == ["0", "1", "2"]
    assert numbers[-1].name == "2"
    assert [sample.name for sample in numbers[::-2]] == ["2", "0"]
    with pytest.raises(IndexError, match=r"index must be in \[-3, 3\), got 3"):
        numbers[3]
    with pytest.raises(IndexError, match=r"index must be in \[-3, 3\), got -4"):
        numbers[-4]
