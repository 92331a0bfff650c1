"""Outlines of the shapes, and how a thing is painted: coverage of each pixel, exact mask, pattern.

Axes: P points, S side of the painted square in pixels. Coordinates are (x, y), x to the right, y down.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arrcoc.data.masks import Mask, Picture, fill_polygons
from arrcoc.data.vocabulary import COLOURS

Array = NDArray[np.floating[Any]]

_SUPERSAMPLING = 3  # odd, so that the middle sample of a pixel is its centre

# Largest turn to either side in degrees: beyond it a square reads as a diamond, and a cross as the letter X.
MAX_TURN = {"square": 18, "cross": 20, "heart": 35}


def _arc(start: float, stop: float, num: int, radius: float = 1.0) -> Array:
    angles = np.radians(np.linspace(start, stop, num))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _crescent() -> Array:
    """A disc less a disc of .85 its radius moved right by .5; they meet where x = (1 - .85^2 + .5^2) / (2 * .5)."""
    x = (1 - 0.85**2 + 0.5**2) / (2 * 0.5)
    outer = np.degrees(np.arccos(x))
    inner = np.degrees(np.arctan2(np.sqrt(1 - x**2), x - 0.5))
    return np.concatenate([_arc(outer, 360 - outer, 64), 0.85 * _arc(360 - inner, inner, 48) + np.array([0.5, 0])])


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


@cache
def outline(shape: str) -> tuple[Array, ...]:
    """The rings [P, 2] of a shape in its own units; a second ring is a hole."""
    match shape:
        case "circle":
            return (_arc(0, 360, 97)[:-1],)
        case "ring":
            return _arc(0, 360, 97)[:-1], _arc(0, 360, 97, radius=0.55)[:-1]
        case "square":
            return (_arc(45, 405, 5)[:-1],)
        case "triangle":
            return (_arc(-90, 270, 4)[:-1],)
        case "hexagon":
            return (_arc(-90, 270, 7)[:-1],)
        case "star":
            points = np.empty((10, 2))
            points[::2], points[1::2] = _arc(-90, 270, 6)[:-1], _arc(-54, 306, 6, radius=0.42)[:-1]
            return (points,)
        case "heart":
            return (_heart(),)
        case "crescent":
            return (_crescent(),)
        case "cross":
            quarter = np.array([[0.34, -1], [0.34, -0.34], [1, -0.34]])
            turn = np.array([[0, 1], [-1, 0]])  # (x, y) -> (-y, x)
            return (np.concatenate([quarter @ np.linalg.matrix_power(turn, number) for number in range(4)]),)
        case "arrow":
            return (np.array([[-1, -0.26], [0.1, -0.26], [0.1, -0.72], [1, 0], [0.1, 0.72], [0.1, 0.26], [-1, 0.26]]),)
    raise ValueError(f"shape must be one of the vocabulary's, got {shape!r}.")


def rasterize(shape: str, side: float, turn: float) -> tuple[Picture, Mask]:
    """A turned shape whose longest side is ``side`` pixels, in the smallest square of whole pixels around it.

    Args:
        shape: a name in ``vocabulary.SHAPES``.
        side: longest side of the bounding box after turning, in pixels.
        turn: in degrees, clockwise.

    Returns:
        (coverage [S, S] in [0, 1], the share of each pixel that is covered; mask [S, S], whether its centre is).
    """
    angle = np.radians(turn)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rings = [ring @ rotation.T for ring in outline(shape)]
    low, high = rings[0].min(axis=0), rings[0].max(axis=0)
    size = int(np.ceil(side))
    n = size * _SUPERSAMPLING
    zoom = side * _SUPERSAMPLING / (high - low).max()
    samples = fill_polygons([(ring - (low + high) / 2) * zoom + n / 2 for ring in rings], n, n)
    middle = _SUPERSAMPLING // 2
    mask = samples[middle::_SUPERSAMPLING, middle::_SUPERSAMPLING]
    coverage = np.asarray(Image.fromarray(samples.view(np.uint8) * 255).reduce(_SUPERSAMPLING), dtype=np.float32)
    return coverage / np.float32(255), mask


def paint(colour: str, pattern: str, size: int, turn: float, period: float) -> Picture:
    """A square of colour with a pattern in the colour's ink.

    Args:
        colour: a name in ``vocabulary.COLOURS``.
        pattern: a name in ``vocabulary.PATTERNS``.
        size: side of the square in pixels, S.
        turn: direction of the pattern in degrees.
        period: of the pattern, in pixels.

    Returns:
        float32 array [3, S, S], sRGB in [0, 1].
    """
    base, ink = (np.array(rgb, dtype=np.float32)[:, None, None] / np.float32(255) for rgb in COLOURS[colour])
    if pattern == "plain":
        return np.broadcast_to(base, (3, size, size))
    angle = np.radians(turn)
    axis = (np.arange(size, dtype=np.float32) - size / 2) * np.float32(2 * np.pi / period)
    x, y = axis[None, :], axis[:, None]
    u = np.cos(x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    if pattern == "striped":
        level = u - 0.1
    else:
        v = np.cos(y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)))
        level = u * v - 0.02 if pattern == "checkered" else u + v - 0.75
    # The level crosses 0 with a slope of about 2 pi / period a pixel: this blends base and ink over one pixel.
    share: Picture = np.clip(0.5 + level * np.float32(period / (2 * np.pi)), 0, 1).astype(np.float32)
    return base + share * (ink - base)
