"""Masks from polygons and run lengths, against pycocotools and hand-made truths."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from pycocotools import mask as pycoco

from arrcoc.data.masks import (
    count_polygons,
    decode_run_lengths,
    decode_segmentation,
    fill_polygons,
    uncompress_counts,
)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (13, 29), (64, 200)])
def test_run_lengths_are_those_of_pycocotools(size: tuple[int, int], density: float) -> None:
    mask = np.random.default_rng(0).random(size) < density
    encoded = pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))
    text = encoded["counts"].decode()
    np.testing.assert_array_equal(decode_run_lengths(text, *size), mask)
    np.testing.assert_array_equal(decode_run_lengths(uncompress_counts(text), *size), mask)
    assert pycoco.frPyObjects({"size": list(size), "counts": uncompress_counts(text)}, *size) == encoded


def test_long_run_lengths() -> None:
    mask = np.zeros((1500, 2000), dtype=bool)
    mask[:, 1:900] = True
    mask[700:, 1950] = True
    text = pycoco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(decode_run_lengths(text, 1500, 2000), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools
@pytest.mark.parametrize("seed", range(5))
def test_polygons_agree_with_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 15))
    radii = rng.uniform(40, 90, 15)
    polygon = np.stack([100 + radii * np.cos(angles), 110 + radii * np.sin(angles)], axis=1).ravel().tolist()
    island = [1.5, 2.5, 31.0, 5.0, 20.0, 33.0]
    ours = decode_segmentation([polygon, island], 220, 200)
    theirs = pycoco.decode(pycoco.merge(pycoco.frPyObjects([polygon, island], 220, 200))).astype(bool)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


def test_polygons_are_cut_at_the_border() -> None:
    triangle = np.array([[-50.0, -50.0], [200.0, 10.0], [10.0, 200.0]])
    whole = fill_polygons([triangle + 50], 300, 300)
    np.testing.assert_array_equal(fill_polygons([triangle], 40, 60), whole[50:90, 50:110])
    assert not fill_polygons([triangle + 500], 40, 60).any()


def test_pixel_centres_decide() -> None:
    mask = fill_polygons([np.array([[0.6, 0.4], [2.4, 0.4], [2.4, 1.6], [0.6, 1.6]])], 3, 4)
    np.testing.assert_array_equal(mask, [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], r"segmentation must be polygons or run lengths, got \[\]"),
        (None, r"segmentation must be polygons or run lengths, got None"),
        ([[1, 2, 3, 4]], r"a polygon must be .* at least 3 points, got \[1, 2, 3, 4\]"),
        ([[1, 2, 3, 4, 5, 6, 7]], r"a polygon must be"),
        ([[1, 2, 3, float("nan"), 5, 6]], r"a polygon's coordinates must be finite"),
        ([[1, 2, "3", None, 5, 6]], r"a polygon's coordinates must be numbers"),
        ([[1, 2, 1e300, 4, 5, 6]], r"a polygon's coordinates must be finite, below 1e\+30"),
        ([[[1, 2], [3, 4], [5, 6]] * 2], r"a polygon's coordinates must be numbers"),
        ([7], r"a polygon must be"),
        ({"size": [4, 6], "counts": [20.5, 3.5]}, r"run lengths must be whole numbers, got \[20\.5, 3\.5\]"),
        ({"size": [4, 6], "counts": [20, 5]}, r"run lengths must be >= 0 and sum to 4 \* 6 = 24, got 25"),
        ({"size": [4, 6], "counts": [30, -6]}, r"run lengths must be >= 0 and sum"),
        ({"size": [4, 6], "counts": [2**62] * 4 + [24]}, r"run lengths must be >= 0 and sum"),
        ({"size": [4, 6], "counts": [[20], [4]]}, r"run lengths must be whole numbers, got \[\[20\], \[4\]\]"),
        ({"size": 4, "counts": [24]}, r"run-length size must be \[4, 6\], as the picture, got 4"),
        ({"size": [6, 4], "counts": [24]}, r"run-length size must be \[4, 6\], as the picture, got \[6, 4\]"),
        ({"size": [4, 6]}, r"run-length counts must be a list or a string, got None"),
        ({"size": [4, 6], "counts": "0!"}, r"run-length string has the character '!', outside '0' to 'o'"),
        ({"size": [4, 6], "counts": "P"}, r"run-length string ends inside a number"),
    ],
)
def test_broken_segmentations(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 4, 6)


def test_even_odd_rings_and_packed_polygons() -> None:
    outer = np.array([[1.0, 1.0], [9.0, 1.0], [9.0, 9.0], [1.0, 9.0]])
    inner = np.array([[3.0, 3.0], [6.0, 3.0], [6.0, 6.0], [3.0, 6.0]])
    expected = np.zeros((10, 12), dtype=bool)
    expected[1:9, 1:9] = True
    expected[3:6, 3:6] = False
    np.testing.assert_array_equal(fill_polygons([outer, inner], 10, 12), expected)
    packed = decode_segmentation([array("d", outer.ravel())], 10, 12)
    np.testing.assert_array_equal(packed, fill_polygons([outer], 10, 12))


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_the_masks(seed: int) -> None:
    """Rings of any kind: crossing themselves, outside the picture, with corners on pixel centres."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2).tolist()
    rings = [rng.uniform(-15, 50, (rng.integers(3, 9), 2)).round(rng.integers(0, 3)) for _ in range(12)]
    rings += [np.round(ring) + 0.5 for ring in rings[:4]]
    expected = [fill_polygons([ring], height, width).sum() for ring in rings]
    assert count_polygons(rings, height, width).tolist() == expected
    by_points = [_inside(ring, height, width).sum() for ring in rings[:3]]
    assert by_points == expected[:3]


def _inside(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel centres inside a ring, each by its own ray to the right."""
    mask = np.zeros((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x:
                    mask[row, column] ^= True
    return mask
