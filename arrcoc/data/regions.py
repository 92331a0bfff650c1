"""Where something is in a picture: polygons, run lengths, boxes or a mask picture, in JSON form, as a bool mask.

Pixel (row, column) spans [column, column + 1] x [row, row + 1]. It belongs to a polygon or box if its centre does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arrcoc.data.masks import (
    LARGEST,
    Mask,
    check_run_lengths,
    count_polygons,
    decode_segmentation,
    segmentation_counts,
    segmentation_rings,
)
from arrcoc.data.pictures import describe, open_picture
from arrcoc.data.skips import ItemError

KINDS = ("mask", "boxes", "polygons", "rle")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Region:
    """One region of a picture, as it is written down.

    Args:
        kind: its form.

            - "mask": a picture (path, bytes or PIL) of the picture's size; what is neither zero nor fully transparent
              is inside. A JPEG is refused: its zeros are not zero.
            - "boxes": [[x, y, width, height], ...] in pixels, their union; may leave the picture.
            - "polygons": [[x, y, x, y, ...], ...] in pixels, their union; may leave the picture.
            - "rle": {"size": [height, width], "counts": ...}, COCO's run lengths, a list or compressed.
        value: the region in that form.
    """

    kind: str
    value: Any

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}.")

    def decode(self, height: int, width: int) -> Mask:
        """The region as a mask.

        Args:
            height, width: of the picture, in pixels.

        Returns:
            bool array [height, width].

        Raises:
            ItemError: if the region is broken or made for a picture of another size.
        """
        if self.kind == "mask":
            return _read_mask(self.value, height, width)
        try:
            if self.kind == "boxes":
                mask = np.zeros((height, width), dtype=np.bool_)
                for top, bottom, left, right in _box_edges(self.value, height, width).tolist():
                    mask[top:bottom, left:right] = True
                return mask
            return decode_segmentation(self.value, height, width)
        except ValueError as error:
            raise ItemError(str(error), reason="region broken") from error


def count_pixels(regions: Sequence[Region], height: int, width: int) -> list[tuple[int, int]]:
    """Least and greatest number of pixels of each region, from the outlines; a mask picture is decoded.

    The two are equal unless a region has several parts, which may overlap.

    Raises:
        ItemError: as `Region.decode`.
    """
    parts: list[NDArray[np.int64]] = []
    rings: list[NDArray[np.float64]] = []
    try:
        for region in regions:
            if region.kind == "polygons":
                own = segmentation_rings(region.value)
                # Their numbers, until all are counted at once.
                parts.append(np.arange(len(rings), len(rings) + len(own)))
                rings += own
            elif region.kind == "boxes":
                top, bottom, left, right = _box_edges(region.value, height, width).T
                parts.append((bottom - top) * (right - left))
            elif region.kind == "rle":
                runs = check_run_lengths(segmentation_counts(region.value, height, width), height, width)
                parts.append(runs[1::2].sum(keepdims=True))
            else:
                parts.append(np.array([np.count_nonzero(region.decode(height, width))]))
    except ItemError:
        raise
    except ValueError as error:
        raise ItemError(str(error), reason="region broken") from error
    if rings:
        counts = count_polygons(rings, height, width)
        parts = [counts[own] if region.kind == "polygons" else own for region, own in zip(regions, parts, strict=True)]
    return [(int(own.max()), min(int(own.sum()), height * width)) for own in parts]


def _box_edges(boxes: object, height: int, width: int) -> NDArray[np.int64]:
    """First and last row and column of each box, [B, 4] as (top, bottom, left, right), the last ones excluded."""
    if not isinstance(boxes, list) or not boxes:
        raise ValueError(f"boxes must be [[x, y, width, height], ...], at least one, got {boxes!r}.")
    for box in boxes:
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
        if not numbers or not all(abs(side) < LARGEST for side in box) or min(box[2:]) <= 0:
            raise ValueError(f"a box must be [x, y, width, height] with width and height > 0, got {box!r}.")
    x, y, box_width, box_height = np.array(boxes, dtype=np.float64).T
    edges = np.stack([y, y + box_height, x, x + box_width], axis=1)
    return np.clip(np.ceil(edges - 0.5), 0, [height, height, width, width]).astype(np.int64)


def _read_mask(source: Any, height: int, width: int) -> Mask:
    try:
        with open_picture(source) as picture:
            if (picture.height, picture.width) != (height, width):
                raise ItemError(
                    f"{describe(source)} must have the picture's (height, width) {height, width}, "
                    f"got {picture.height, picture.width}.",
                    reason="picture of another size",
                )
            if picture.format == "JPEG":
                message = f"{describe(source)} is a JPEG, whose compression blurs what is zero; save it as PNG."
                raise ItemError(message, reason="picture is a JPEG")
            pixels = _mask_pixels(picture)
    except ItemError as error:
        raise ItemError(f"mask: {error}", reason=error.reason.replace("picture", "mask")) from error
    inside: Mask = np.not_equal(pixels, 0)
    return np.logical_or.reduce(inside, axis=2) if inside.ndim == 3 else inside


def _mask_pixels(picture: Image.Image) -> NDArray[Any]:
    """Values [H, W] or colours [H, W, 3]; what is fully transparent is zero, whatever its colour."""
    if picture.mode in ("1", "L", "P", "I", "I;16", "F"):
        return np.asarray(picture)
    if "A" not in picture.getbands():
        return np.asarray(picture.convert("RGB"))
    pixels_HWC = np.asarray(picture.convert("RGBA"))
    return pixels_HWC[..., :3] * (pixels_HWC[..., 3:] > 0)
