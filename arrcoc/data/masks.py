"""Masks from outlines and from run lengths: polygons by the pixel-centre rule, COCO's run-length encoding.

Pixel (row, column) spans [column, column + 1] x [row, row + 1] and belongs to a polygon if its centre does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Picture = NDArray[np.float32]


def fill_polygons(rings: Sequence[NDArray[np.floating[Any]]], height: int, width: int) -> Mask:
    """Pixels whose centre lies inside an odd number of the rings (even-odd rule, so a ring inside a ring is a hole).

    On every row of pixel centres, each edge that crosses it flips inside and outside from the crossing to the right.

    Args:
        rings: closed outlines, each [P, 2] of (x, y) in pixels; may leave the picture.
        height, width: of the picture, in pixels.

    Returns:
        bool array [height, width].
    """
    flips = np.zeros((height, width + 1), dtype=np.uint8)
    for ring in rings:
        x0, y0 = np.asarray(ring, dtype=np.float64).T
        x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
        # Rows with min(y0, y1) <= row + 0.5 < max(y0, y1): half open, so that a shared vertex counts once.
        first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
        last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
        num_rows = last - first
        edge = np.repeat(np.arange(len(x0)), num_rows)
        rows = np.arange(len(edge)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows) + first[edge]
        share = (rows + 0.5 - y0[edge]) / (y1 - y0)[edge]
        crossings = x0[edge] + share * (x1 - x0)[edge]
        columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)
        np.bitwise_xor.at(flips, (rows, columns), 1)
    return np.bitwise_xor.accumulate(flips[:, :width], axis=1).view(np.bool_)


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


def decode_run_lengths(counts: Sequence[int] | str, height: int, width: int) -> Mask:
    """Mask from run lengths of 0, 1, 0, ... down the columns, as a list or as COCO's compressed string.

    Returns:
        bool array [height, width].

    Raises:
        ValueError: if the runs are negative or do not sum to height * width.
    """
    runs = np.asarray(uncompress_counts(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise ValueError(
            f"run lengths must be >= 0 and sum to {height} * {width} = {height * width}, got {runs.sum()}."
        )
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def decode_segmentation(segmentation: object, height: int, width: int) -> Mask:
    """Mask [height, width] of a COCO ``segmentation``: a list of polygons (their union) or run lengths.

    Raises:
        ValueError: if it is neither, empty, or made for a picture of another size.
    """
    if isinstance(segmentation, Mapping):
        size = segmentation.get("size")
        if list(size or []) != [height, width]:
            raise ValueError(f"run-length size must be {[height, width]}, as the picture, got {size!r}.")
        counts = segmentation.get("counts")
        if not isinstance(counts, str | list):
            raise ValueError(f"run-length counts must be a list or a string, got {counts!r}.")
        return decode_run_lengths(counts, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"segmentation must be polygons or run lengths, got {segmentation!r}.")
    mask = np.zeros((height, width), dtype=np.bool_)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must be [x, y, x, y, ...] with at least 3 points, got {polygon!r}.")
        ring = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(ring).all():
            raise ValueError(f"a polygon's coordinates must be finite, got {polygon!r}.")
        mask |= fill_polygons([ring], height, width)
    return mask
