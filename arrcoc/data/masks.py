"""Masks from outlines and from run lengths: polygons by the pixel-centre rule, COCO's run-length encoding.

Pixel (row, column) spans [column, column + 1] x [row, row + 1] and belongs to a polygon if its centre does.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Picture = NDArray[np.float32]

LARGEST = 1e30  # coordinate of an outline: differences and products of such are still finite


def fill_polygons(rings: Sequence[NDArray[np.floating[Any]]], height: int, width: int) -> Mask:
    """Pixels whose centre lies inside an odd number of the rings (even-odd rule, so a ring inside a ring is a hole).

    On every row of pixel centres, each edge that crosses it flips inside and outside from the crossing to the right.

    Args:
        rings: closed outlines, each [P, 2] of (x, y) in pixels; may leave the picture.
        height, width: of the picture, in pixels.

    Returns:
        bool array [height, width].
    """
    mask = np.zeros((height, width), dtype=np.bool_)
    _, rows, columns = _crossings(rings, height, width)
    if len(rows):
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max()
        flips = np.zeros((bottom - top, right - left + 1), dtype=np.uint8)
        np.bitwise_xor.at(flips, (rows - top, columns - left), 1)
        mask[top:bottom, left:right] = np.bitwise_xor.accumulate(flips[:, :-1], axis=1).view(np.bool_)
    return mask


def count_polygons(rings: Sequence[NDArray[np.floating[Any]]], height: int, width: int) -> NDArray[np.int64]:
    """Number of pixels inside each ring, [R]: the sum of ``fill_polygons([ring])``, from the crossings alone."""
    ring, rows, columns = _crossings(rings, height, width)
    # An outline crosses a row an even number of times: sorted, the crossings pair up as entry and exit.
    order = np.sort((ring * height + rows) * (width + 1) + columns)
    lengths = order[1::2] - order[::2]
    owner = order[::2] // (height * (width + 1))
    return np.bincount(owner, weights=lengths, minlength=len(rings)).astype(np.int64)


def _crossings(
    rings: Sequence[NDArray[np.floating[Any]]], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where outlines cross the rows of pixel centres: number of the ring, row, first column right of the crossing."""
    sizes = np.array([len(ring) for ring in rings])
    starts = np.cumsum(sizes) - sizes
    x0, y0 = np.concatenate([np.zeros((0, 2)), *rings]).T
    following = np.arange(1, len(x0) + 1)
    following[starts + sizes - 1] = starts  # the last point is joined to the first
    x1, y1 = x0[following], y0[following]
    # Rows with min(y0, y1) <= row + 0.5 < max(y0, y1): half open, so that a shared vertex counts once.
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    num_rows = last - first
    edge = np.repeat(np.arange(len(x0)), num_rows)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows) + first[edge]
    share = (rows + 0.5 - y0[edge]) / (y1 - y0)[edge]
    columns = np.clip(np.ceil(x0[edge] + share * (x1 - x0)[edge] - 0.5), 0, width).astype(np.int64)
    return np.repeat(np.arange(len(rings)), sizes)[edge], rows, columns


def uncompress_counts(text: str) -> list[int]:
    """Run lengths from COCO's string: 5 bits a character from '0', low bits first; from the third run on, differences.

    Raises:
        ValueError: if the string has other characters or ends inside a number.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"run-length string has the character {character!r}, outside '0' to 'o'.")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift  # the sign bit
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run-length string ends inside a number.")
    return counts


def check_run_lengths(counts: Sequence[int] | str, height: int, width: int) -> NDArray[np.int64]:
    """Run lengths of 0, 1, 0, ... down the columns as an array, from a list or from COCO's compressed string.

    Raises:
        ValueError: if the runs are negative or do not sum to height * width.
    """
    numbers = uncompress_counts(counts) if isinstance(counts, str) else counts
    if not numbers or not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"run lengths must be whole numbers, got {counts!r}.")
    if min(numbers) < 0 or sum(numbers) != height * width:
        raise ValueError(
            f"run lengths must be >= 0 and sum to {height} * {width} = {height * width}, got {sum(numbers)}."
        )
    return np.array(numbers, dtype=np.int64)


def decode_run_lengths(counts: Sequence[int] | str, height: int, width: int) -> Mask:
    """Mask [height, width] from run lengths; raises as `check_run_lengths`."""
    runs = check_run_lengths(counts, height, width)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def segmentation_counts(segmentation: object, height: int, width: int) -> Sequence[int] | str:
    """The run lengths of a COCO ``segmentation``, made for a picture of this size."""
    if not isinstance(segmentation, Mapping):
        raise ValueError(f'run lengths must be {{"size": ..., "counts": ...}}, got {segmentation!r}.')
    size = segmentation.get("size")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"run-length size must be {[height, width]}, as the picture, got {size!r}.")
    counts = segmentation.get("counts")
    if not isinstance(counts, str | list):
        raise ValueError(f"run-length counts must be a list or a string, got {counts!r}.")
    return counts


def segmentation_rings(segmentation: object) -> list[NDArray[np.float64]]:
    """The polygons of a COCO ``segmentation``, each [P, 2]."""
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"segmentation must be polygons or run lengths, got {segmentation!r}.")
    rings = []
    for polygon in segmentation:
        if not isinstance(polygon, list | array) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must be [x, y, x, y, ...] with at least 3 points, got {polygon!r}.")
        try:
            ring = np.array(polygon).astype(np.float64, casting="same_kind")
        except (TypeError, ValueError):
            ring = np.zeros((0, 0))
        if ring.ndim != 1:
            raise ValueError(f"a polygon's coordinates must be numbers, got {polygon!r}.")
        if not (abs(ring) < LARGEST).all():
            raise ValueError(f"a polygon's coordinates must be finite, below {LARGEST:g}, got {polygon!r}.")
        rings.append(ring.reshape(-1, 2))
    return rings


def decode_segmentation(segmentation: object, height: int, width: int) -> Mask:
    """Mask [height, width] of a COCO ``segmentation``: a list of polygons (their union) or run lengths.

    Raises:
        ValueError: if it is neither, empty, or made for a picture of another size.
    """
    if isinstance(segmentation, Mapping):
        return decode_run_lengths(segmentation_counts(segmentation, height, width), height, width)
    mask = np.zeros((height, width), dtype=np.bool_)
    for ring in segmentation_rings(segmentation):
        mask |= fill_polygons([ring], height, width)
    return mask
