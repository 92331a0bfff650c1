"""Pictures of relevance: heatmaps, overlays, grids of kept tokens, contact sheets.

A map lies over the whole picture, never a crop of it: token (i, j) of a grid (h, w) covers the rectangle of rows
[i H / h, (i + 1) H / h) and columns [j W / w, (j + 1) W / w), and its value belongs to the centre of that rectangle.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[np.float32]


def heatmap(relevance: torch.Tensor | ArrayLike, size: tuple[int, int]) -> Array:
    """Relevance at every pixel, bilinear between the centres of the tokens, constant beyond the outermost ones.

    Args:
        relevance: [grid_h, grid_w] in [0, 1].
        size: (height, width) of the picture in pixels.

    Returns:
        float32 array [height, width] in [0, 1].

    Raises:
        ValueError: if relevance is no map of finite values in [0, 1].
    """
    tokens = torch.from_numpy(_as_map(relevance).astype(np.float64))  # in float32 weights may not add up to 1
    pixels = F.interpolate(tokens[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return np.asarray(pixels.numpy(), dtype=np.float32).clip(0, 1)


def overlay(
    image: Image.Image,
    relevance: torch.Tensor | ArrayLike,
    *,
    alpha: float = 0.7,
    peak: float = 1.0,
    colormap: str = "inferno",
) -> Image.Image:
    """The photo, coloured where it is relevant and left as it is where it is not.

    Colour and opacity grow together: pixel = (1 - a) photo + a colour(r), a = alpha * r, r = min(relevance / peak, 1).

    Args:
        image: the picture.
        relevance: [grid_h, grid_w] in [0, 1].
        alpha: opacity at full relevance, in [0, 1].
        peak: relevance drawn as full, > 0. At 1 maps of different queries compare; the maximum shows the shape of a
            weak map, and makes a query that is not in the picture look as if it were.
        colormap: one of matplotlib's; choose a perceptually uniform one.

    Returns:
        RGB picture of the same size.

    Raises:
        ValueError: if relevance is no map of finite values in [0, 1], or alpha or peak is out of range.
    """
    from matplotlib import colormaps

    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha!r}.")
    if not peak > 0:
        raise ValueError(f"peak must be > 0, got {peak!r}.")
    photo = _pixels(image)
    strength = (heatmap(relevance, photo.shape[:2]) / peak).clip(0, 1)
    colour = np.asarray(colormaps[colormap](strength))[..., :3]
    opacity = alpha * strength[..., None]
    return _picture((1 - opacity) * photo + opacity * colour)


def token_grid(image: Image.Image, keep: torch.Tensor | ArrayLike, *, dim: float = 0.6) -> Image.Image:
    """The photo with the kept tokens as they are, the dropped ones faded, and fine lines between them.

    Args:
        image: the picture.
        keep: [grid_h, grid_w], true or nonzero where a token is kept.
        dim: how far dropped tokens fade, in [0, 1].

    Returns:
        RGB picture of the same size.

    Raises:
        ValueError: if keep is not two-dimensional, or dim is out of range.
    """
    if not 0 <= dim <= 1:
        raise ValueError(f"dim must be in [0, 1], got {dim!r}.")
    kept_tokens = _as_array(keep) != 0
    if kept_tokens.ndim != 2 or kept_tokens.size == 0:
        raise ValueError(f"keep must have shape [grid_h, grid_w], got {list(kept_tokens.shape)}.")
    photo = _pixels(image)
    rows, columns = (_token_of_pixel(*pair) for pair in zip(photo.shape[:2], kept_tokens.shape, strict=True))
    kept = kept_tokens[rows[:, None], columns][..., None]
    grey = photo.mean(axis=-1, keepdims=True)
    picture = np.where(kept, photo, (1 - dim) * (0.3 * photo + 0.7 * grey) + dim * 0.16)
    line = (np.diff(rows, prepend=0) > 0)[:, None, None] | (np.diff(columns, prepend=0) > 0)[:, None]
    return _picture(np.where(line, 0.82 * picture + 0.18, picture))


def contact_sheet(
    pictures: Sequence[tuple[Image.Image, str]], *, columns: int | None = None, tile_width: int = 320
) -> Image.Image:
    """Pictures side by side on white, each over its caption.

    Args:
        pictures: (picture, caption) pairs, row by row; pictures keep their aspect ratio.
        columns: pictures a row; by default up to four.
        tile_width: width of each picture in pixels, >= 32.

    Returns:
        RGB picture.

    Raises:
        ValueError: if there are no pictures, or columns or tile_width is too small.
    """
    if not pictures:
        raise ValueError("pictures must hold at least one (picture, caption), got none.")
    columns = min(4, len(pictures)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns!r}.")
    if tile_width < 32:
        raise ValueError(f"tile_width must be >= 32, got {tile_width!r}.")

    gap, font = max(8, tile_width // 20), _font(max(11, round(tile_width / 19)))
    line_height = round(font.size * 1.35)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    tiles = [[_tile(picture, tile_width) for picture, _ in row] for row in rows]
    captions = [[_wrap(caption, font, tile_width) for _, caption in row] for row in rows]
    photo_heights = [max(tile.height for tile in row) for row in tiles]
    caption_heights = [line_height * max(len(lines) for lines in row) for row in captions]

    width = columns * tile_width + (columns + 1) * gap
    height = gap + sum(photo_heights) + sum(caption_heights) + len(rows) * (gap // 2 + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, lines_of_row, photo_height, caption_height in zip(
        tiles, captions, photo_heights, caption_heights, strict=True
    ):
        for column, (tile, lines) in enumerate(zip(row, lines_of_row, strict=True)):
            left = gap + column * (tile_width + gap)
            sheet.paste(tile, (left, top))
            for number, line in enumerate(lines):
                position = (left, top + tile.height + gap // 2 + number * line_height)
                draw.text(position, line, font=font, fill=(40, 40, 40))
        top += photo_height + gap // 2 + caption_height + gap
    return sheet


def _tile(picture: Image.Image, width: int) -> Image.Image:
    height = max(1, round(picture.height * width / picture.width))
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than the picture; a word too long for one is cut."""
    lines = []
    for paragraph in caption.splitlines():
        characters = len(paragraph)
        while characters > 1:
            wrapped = textwrap.wrap(paragraph, characters)
            if max(map(font.getlength, wrapped), default=0) <= width:
                break
            characters -= 1
        lines += textwrap.wrap(paragraph, max(characters, 1)) or [""]
    return lines


def _token_of_pixel(size: int, cells: int) -> NDArray[np.int64]:
    """Number of the token that holds each pixel's centre."""
    return (2 * np.arange(size) + 1) * cells // (2 * size)


def _as_array(value: torch.Tensor | ArrayLike) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _as_map(relevance: torch.Tensor | ArrayLike) -> Array:
    values = _as_array(relevance.float() if isinstance(relevance, torch.Tensor) else relevance)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"relevance must have shape [grid_h, grid_w], got {list(values.shape)}.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"relevance must be in [0, 1], got values from {values.min():.4g} to {values.max():.4g}.")
    return np.array(values, dtype=np.float32)


def _pixels(image: Image.Image) -> Array:
    """RGB as float32 [H, W, 3] in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


def _picture(pixels: NDArray[Any]) -> Image.Image:
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
