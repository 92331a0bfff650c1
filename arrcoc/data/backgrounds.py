"""Backgrounds of drawn scenes: plain, gradient, noise, or cut from a photographic texture; and what stands out on them.

Axes: H and W picture height and width. Pictures are float32 arrays [3, H, W], sRGB in [0, 1].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arrcoc.assets import asset_path
from arrcoc.data.masks import Picture
from arrcoc.data.vocabulary import COLOURS

BACKGROUNDS = ("plain", "gradient", "noise", "photo")
_SHARES = (0.2, 0.15, 0.25, 0.4)

TEXTURES = ("brick", "grass", "gravel", "wood", "sky", "canvas")
# A grey texture is multiplied by one of its tints.
_TINTS = {
    "brick": ((1.25, 0.78, 0.66), (1.2, 1.12, 1.0), (0.85, 0.9, 1.0)),
    "grass": ((0.72, 1.05, 0.5), (1.05, 1.04, 0.86)),
    "gravel": ((1.0, 1.0, 1.02), (1.3, 1.2, 1.05), (0.65, 0.62, 0.6)),
}

# Least Oklab distance of a colour, and of its ink, from the background, so that a thing stands out.
_LEAST_CONTRAST = 0.17
_LEAST_INK_CONTRAST = 0.08

# A background with at least this Oklab chroma has a hue, and colours within this angle of it are not asked for: a navy
# blue sky is "anything blue" too.
_LEAST_CHROMA = 0.035
_SAME_HUE = np.radians(32)


@cache
def _texture(name: str) -> Image.Image:
    with Image.open(asset_path("textures") / f"{name}.jpg") as picture:
        picture.load()
        return picture


def _dull_colour(rng: np.random.Generator) -> Picture:
    """A random colour of any brightness and little saturation, so that few of the scene's colours come near it."""
    brightness = rng.uniform(0.12, 0.97)
    tint = rng.uniform(-0.09, 0.09, size=3)
    colour: Picture = np.clip(brightness + tint - tint.mean(), 0, 1).astype(np.float32)
    return colour


def _gradient(rng: np.random.Generator, height: int, width: int) -> Picture:
    """0 to 1 across the picture in a random direction, [H, W]."""
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :] * np.float32(np.cos(angle))
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    ramp: Picture = x + y
    ramp -= ramp.min()
    ramp /= ramp.max()
    return ramp


def _noise(rng: np.random.Generator, height: int, width: int) -> Picture:
    """Value noise in [0, 1], [H, W]: random grids of four finenesses, smoothly enlarged and added."""
    total = np.zeros((height, width), dtype=np.float32)
    stretch = rng.uniform(0.3, 1.0)  # finer in one direction than in the other, like cloth or brushed metal
    for octave in range(4):
        cells = 4 * 2**octave
        shape = (cells, max(2, round(cells * stretch)))
        grid = Image.fromarray(rng.random(shape, dtype=np.float32))
        total += np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR)) / 2**octave
    return total / np.float32(1.875)


def _photo(rng: np.random.Generator, height: int, width: int) -> Picture:
    name = TEXTURES[rng.integers(len(TEXTURES))]
    texture = _texture(name)
    zoom = rng.uniform(0.6, 1.0) * min(texture.width / width, texture.height / height)
    crop_width, crop_height = width * zoom, height * zoom
    left = rng.uniform(0, texture.width - crop_width)
    top = rng.uniform(0, texture.height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    crop = np.asarray(texture.resize((width, height), Image.Resampling.BILINEAR, box=box), dtype=np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    tints = _TINTS.get(name, ((1.0, 1.0, 1.0),))
    light = np.array(tints[rng.integers(len(tints))], dtype=np.float32) * np.float32(rng.uniform(0.85, 1.15) / 255)
    picture: Picture = (crop.transpose(2, 0, 1) if crop.ndim == 3 else crop) * light[:, None, None]
    return np.minimum(picture, 1, out=picture)


def sample_background(rng: np.random.Generator, height: int, width: int) -> Picture:
    """A random background, float32 [3, H, W] in [0, 1]."""
    kind = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=_SHARES)]
    if kind == "photo":
        return _photo(rng, height, width)
    colour = _dull_colour(rng)[:, None, None]
    if kind == "plain":
        return np.broadcast_to(colour, (3, height, width)).copy()
    other = np.clip(colour + rng.choice([-1, 1]) * rng.uniform(0.12, 0.3), 0, 1).astype(np.float32)
    mix = _gradient(rng, height, width) if kind == "gradient" else _noise(rng, height, width)
    picture: Picture = colour + mix * (other - colour)
    return picture


def oklab(rgb: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """sRGB [..., 3] in [0, 1] as Oklab (Ottosson 2020), where distance is about how different colours look."""
    rgb = np.asarray(rgb, dtype=np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lab: NDArray[np.float64] = np.cbrt(cones) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return lab


_COLOURS_OKLAB = oklab(np.array([base for base, _ in COLOURS.values()]) / 255)
_INKS_OKLAB = oklab(np.array([ink for _, ink in COLOURS.values()]) / 255)


def visible_colours(background: Picture) -> tuple[str, ...]:
    """The names of the colours that stand out everywhere on a background, plain and patterned.

    A query for any other colour has no clear answer, for the background itself is about that colour.
    """
    step = max(1, min(background.shape[1:]) // 64)
    sparse = (background[:, ::step, ::step] * 255).astype(np.uint8).transpose(1, 2, 0)
    thumbnail = Image.fromarray(sparse).resize((5, 5), Image.Resampling.BOX)
    patches = oklab(np.asarray(thumbnail).reshape(-1, 3) / 255)

    colours, inks = _COLOURS_OKLAB[:, None], _INKS_OKLAB[:, None]
    stands_out = (np.linalg.norm(colours - patches, axis=-1) >= _LEAST_CONTRAST).all(axis=1)
    ink_stands_out = (np.linalg.norm(inks - patches, axis=-1) >= _LEAST_INK_CONTRAST).all(axis=1)

    chroma, patch_chroma = (np.linalg.norm(lab[..., 1:], axis=-1) for lab in (colours, patches))
    alignment = (colours[..., 1:] * patches[:, 1:]).sum(axis=-1)
    both_have_hue = np.minimum(chroma, patch_chroma) >= _LEAST_CHROMA
    same_hue = both_have_hue & (alignment >= np.cos(_SAME_HUE) * chroma * patch_chroma)

    visible = stands_out & ink_stands_out & ~same_hue.any(axis=1)
    return tuple(name for name, seen in zip(COLOURS, visible, strict=True) if seen)
