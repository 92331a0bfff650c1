"""Where the things of a drawn scene lie and who covers whom; their shadows and paint.

Axes: H and W picture height and width, S side of a thing's square, in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from arrcoc.data.masks import Mask, Picture
from arrcoc.data.shapes import MAX_TURN, paint, rasterize
from arrcoc.data.vocabulary import SIZES, Description

_LEAST_VISIBLE = 0.75  # share of a thing that others may not cover
_TRIES = 25


@dataclass(frozen=True, eq=False)
class Placed:
    """A thing, its coverage and mask in a square whose upper left corner is at (top, left)."""

    thing: Description
    coverage: Picture
    mask: Mask
    turn: float
    top: int
    left: int

    @property
    def box(self) -> tuple[slice, slice]:
        size = len(self.mask)
        return slice(self.top, self.top + size), slice(self.left, self.left + size)


def _compatible(one: Placed, other: Placed) -> bool:
    """Whether two things differ in colour or their squares do not touch."""
    if one.thing.colour != other.thing.colour:
        return True
    reach = (len(one.mask), len(other.mask))
    vertical = one.top > other.top + reach[1] or other.top > one.top + reach[0]
    horizontal = one.left > other.left + reach[1] or other.left > one.left + reach[0]
    return vertical or horizontal


def place(
    rng: np.random.Generator, things: list[Description], owners: NDArray[np.int8], side: int
) -> list[Placed] | None:
    """Lay the things on the picture, later ones on top; ``owners`` [H, W] becomes who is seen where, -1 for nobody.

    Things of one colour stay apart, and of each at least ``_LEAST_VISIBLE`` stays visible. None if one finds no place.
    """
    placed: list[Placed] = []
    areas: list[int] = []
    for number, thing in enumerate(things):
        assert thing.shape and thing.size
        max_turn = MAX_TURN.get(thing.shape, 180)
        turn = rng.uniform(-max_turn, max_turn)
        coverage, mask = rasterize(thing.shape, rng.uniform(*SIZES[thing.size]) * side, turn)
        size = len(mask)
        for _ in range(_TRIES):
            top, left = (int(rng.integers(length - size + 1)) for length in owners.shape)
            candidate = Placed(thing, coverage, mask, turn, top, left)
            if all(_compatible(candidate, other) for other in placed):
                view = owners[candidate.box]
                hidden = np.bincount(view[mask] + 1, minlength=number + 1)[1:]
                visible = np.bincount(owners.ravel() + 1, minlength=number + 1)[1:] if hidden.any() else areas
                if all(v - h >= _LEAST_VISIBLE * a for v, h, a in zip(visible, hidden, areas, strict=True)):
                    break
        else:
            return None
        view[mask] = number
        placed.append(candidate)
        areas.append(int(mask.sum()))
    return placed


def cast_shadow(rng: np.random.Generator, picture: Picture, owners: NDArray[np.int8]) -> None:
    """Darken the background softly beside the things, in place."""
    height, width = owners.shape
    side = min(height, width)
    shift = rng.uniform(-0.012, 0.012) * side, rng.uniform(0.004, 0.016) * side
    shadow = Image.fromarray((owners >= 0).astype(np.uint8) * 255).reduce(4)
    shadow = shadow.filter(ImageFilter.GaussianBlur(side / 250))
    box = (-shift[0] / 4, -shift[1] / 4)
    shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, box[0], 0, 1, box[1]))
    full = np.asarray(shadow.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    picture *= 1 - full * np.float32(0.4 / 255)


def draw(rng: np.random.Generator, picture: Picture, placed: list[Placed], side: int) -> None:
    """Paint the things onto the picture, in place."""
    for item in placed:
        assert item.thing.colour and item.thing.pattern
        size = len(item.mask)
        period = max(0.2 * size, 0.028 * side)
        colours = paint(item.thing.colour, item.thing.pattern, size, item.turn + 45, period)
        # Light from above: a little brighter at the top, a little darker at the bottom; and no two reds are the same.
        light = np.linspace(1.05, 0.92, size, dtype=np.float32)[:, None] * np.float32(rng.uniform(0.95, 1.04))
        view = picture[:, *item.box]
        view += item.coverage * (np.minimum(colours * light, 1) - view)
