"""Random changes of a picture, geometric and photometric, that keep its masks and its queries true.

The parameters are drawn here, from the generator that is handed over, and the pixels are moved by torchvision's v2
functionals. Torchvision's own random classes are not used: they draw from the global random state. It is imported where
it is needed, for it takes a second.

Axes: Q queries, H and W picture height and width.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from arrcoc.data.sample import RelevanceSample
from arrcoc.data.vocabulary import COLOURS
from sam_core._checks import check_in, check_nonnegative

_TRIES = 10
_SIDES = re.compile(r"(?<![a-z])(?:left|right)(?:most|hand|wards?)?(?![a-z])", re.IGNORECASE)
_OTHER_COLOURS = (
    "gray violet lilac lavender indigo gold golden silver bronze beige tan khaki ivory cream turquoise cyan teal "
    "magenta crimson scarlet maroon navy lime olive blond blonde blu redd rainbow"  # bluish, reddish
).split()
_COLOURS = re.compile(
    rf"(?<![a-z])(?:(?:{'|'.join([*COLOURS, *_OTHER_COLOURS])})(?:ish)?(?![a-z])|\w*(?:colou?r|gr[ae]yscale))",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class RelevanceAugmentation:
    """A random change of a sample; the same state of the generator gives the same bits.

    In this order: the picture is rotated, sheared and zoomed about its centre (what comes in from outside has the
    picture's mean colour), cropped, flipped; then brightness, contrast, saturation, hue and grey, then blur, noise and
    JPEG. The picture is interpolated bilinearly, masks take the nearest pixel. A crop keeps its pixels: the
    loader, which squashes pictures to one size, makes it a resized crop.

    What a query says stays true:

    - a picture is not flipped if one of its queries names a side (left, right, leftmost, ...);
    - hue stays and nothing turns grey if a query names a colour;
    - a query of which less than ``min_kept`` is left in the picture is not asked: a remnant is neither present nor
      absent. What is gone entirely goes by ``lost``. If no query would be left, the geometry is drawn anew, and after
      ten draws the picture keeps its own.

    Args:
        rotation, shear: largest angles, to both sides, degrees in [0, 180] and [0, 60].
        zoom: smallest and largest factor of the size, > 0.
        crop: smallest and largest share of the area that is kept, in (0, 1].
        stretch: largest factor between the crop's aspect ratio and the picture's, >= 1.
        flip: probability of a horizontal flip, [0, 1].
        min_kept: least share of a mask that must stay for its query to stay, (0, 1].
        lost: "absent": a query whose object is entirely gone becomes an absent query; "drop": it is left out.
        brightness, contrast, saturation: largest relative change, [0, 1].
        hue: largest shift, in turns of the colour circle, [0, 0.5].
        grayscale: probability of a grey picture, [0, 1].
        degrade: probability, of each of blur, noise and JPEG by itself, [0, 1].
        blur: largest standard deviation of the blur, pixels, >= 0.
        noise: largest standard deviation of the noise, of a range of 1, >= 0.
        jpeg: lowest quality, 1 to 100; 100 turns it off.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> from arrcoc.data import Scenes
        >>> augment = RelevanceAugmentation(crop=(0.5, 0.5), rotation=0, shear=0, zoom=(1, 1), stretch=1)
        >>> augment(Scenes(1)[0], torch.Generator().manual_seed(0)).image.shape
        torch.Size([3, 317, 317])
    """

    rotation: float = 8.0
    shear: float = 4.0
    zoom: tuple[float, float] = (0.9, 1.1)
    crop: tuple[float, float] = (0.5, 1.0)
    stretch: float = 1.2
    flip: float = 0.5
    min_kept: float = 0.4
    lost: str = "absent"
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.25
    hue: float = 0.03
    grayscale: float = 0.05
    degrade: float = 0.15
    blur: float = 1.5
    noise: float = 0.04
    jpeg: int = 50

    def __post_init__(self) -> None:
        limits = {
            "rotation": 180.0, "shear": 60.0, "flip": 1.0, "min_kept": 1.0, "brightness": 1.0, "contrast": 1.0,
            "saturation": 1.0, "hue": 0.5, "grayscale": 1.0, "degrade": 1.0,
        }  # fmt: skip
        for name, limit in limits.items():
            value = getattr(self, name)
            check_nonnegative(name, value)
            if value > limit:
                raise ValueError(f"{name} must be <= {limit:g}, got {value!r}.")
        check_nonnegative("blur", self.blur)
        check_nonnegative("noise", self.noise)
        check_in("lost", self.lost, ("absent", "drop"))
        if self.min_kept == 0:
            raise ValueError(f"min_kept must be > 0, got {self.min_kept!r}.")
        if not (_is_pair(self.zoom) and 0 < self.zoom[0] <= self.zoom[1] < math.inf):
            raise ValueError(f"zoom must be (smallest, largest), both > 0, got {self.zoom!r}.")
        if not (_is_pair(self.crop) and 0 < self.crop[0] <= self.crop[1] <= 1):
            raise ValueError(f"crop must be (smallest, largest), both in (0, 1], got {self.crop!r}.")
        if not 1 <= self.stretch < math.inf:
            raise ValueError(f"stretch must be >= 1, got {self.stretch!r}.")
        if not 1 <= self.jpeg <= 100:
            raise ValueError(f"jpeg must be in [1, 100], got {self.jpeg!r}.")

    def __call__(self, sample: RelevanceSample, generator: torch.Generator) -> RelevanceSample:
        """The changed sample; the given one is left as it is.

        Args:
            sample: picture of at least one query.
            generator: on the CPU; every parameter is drawn from it.
        """
        moved = self._move_and_ask(sample, generator)
        named_colour = any(_COLOURS.search(query) for query in sample.queries)
        image = self._recolour(moved.image, _Draw(generator), named_colour)
        image = self._degrade(image, _Draw(generator)).clamp(0, 1)
        return RelevanceSample(image=image, queries=moved.queries, masks=moved.masks, name=sample.name)

    def _move_and_ask(self, sample: RelevanceSample, generator: torch.Generator) -> RelevanceSample:
        """The sample after the first draw of the geometry that leaves something to ask."""
        from torchvision import tv_tensors

        before_Q = sample.masks.sum((1, 2))
        for _ in range(_TRIES):
            zoom, move = self._draw_geometry(sample, _Draw(generator))
            masks = move(tv_tensors.Mask(sample.masks)).as_subclass(Tensor)
            after_Q = masks.sum((1, 2))
            stays_Q = after_Q >= self.min_kept * zoom**2 * before_Q  # so does what was absent before
            if self.lost == "absent":
                stays_Q |= after_Q == 0
            if stays_Q.any():
                image = move(tv_tensors.Image(sample.image)).as_subclass(Tensor)
                queries = tuple(query for query, stays in zip(sample.queries, stays_Q.tolist(), strict=True) if stays)
                return RelevanceSample(image=image, queries=queries, masks=masks[stays_Q], name=sample.name)
        return sample

    def _draw_geometry(self, sample: RelevanceSample, draw: _Draw) -> tuple[float, Callable[[Any], Any]]:
        """The factor of the size, and what moves a picture and its masks alike."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        height, width = sample.image.shape[1:]
        angle, shear = draw.around(0, self.rotation), draw.around(0, self.shear)
        zoom = math.exp(draw.between(math.log(self.zoom[0]), math.log(self.zoom[1])))
        share, stretch = draw.between(*self.crop), math.exp(draw.around(0, math.log(self.stretch)))
        crop_height = min(height, max(1, round(height * math.sqrt(share / stretch))))
        crop_width = min(width, max(1, round(width * math.sqrt(share * stretch))))
        top = min(height - crop_height, int(draw.between(0, height - crop_height + 1)))
        left = min(width - crop_width, int(draw.between(0, width - crop_width + 1)))
        flip = draw.happens(self.flip) and not any(_SIDES.search(query) for query in sample.queries)
        mean = sample.image.mean((1, 2)).tolist()

        def move(inpt: Any) -> Any:
            if (angle, shear, zoom) != (0, 0, 1):
                fill = mean if isinstance(inpt, tv_tensors.Image) else None
                inpt = F.affine(inpt, angle, [0, 0], zoom, [shear, 0.0], InterpolationMode.BILINEAR, fill)
            inpt = F.crop(inpt, top, left, crop_height, crop_width)
            return F.horizontal_flip(inpt) if flip else inpt

        return zoom, move

    def _recolour(self, image: Tensor, draw: _Draw, named_colour: bool) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        brightness, contrast, saturation = (
            draw.around(1, amount) for amount in (self.brightness, self.contrast, self.saturation)
        )
        hue, grey = draw.around(0, self.hue), draw.happens(self.grayscale)
        if brightness != 1:
            image = F.adjust_brightness(image, brightness)
        if contrast != 1:
            image = F.adjust_contrast(image, contrast)
        if saturation != 1:
            image = F.adjust_saturation(image, saturation)
        if hue != 0 and not named_colour:
            image = F.adjust_hue(image, hue)
        return F.rgb_to_grayscale(image, 3) if grey and not named_colour else image

    def _degrade(self, image: Tensor, draw: _Draw) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        blurred, noisy, compressed = (draw.happens(self.degrade) for _ in range(3))
        sigma, noise, quality = draw.between(0, self.blur), draw.between(0, self.noise), draw.between(self.jpeg, 100)
        if blurred and sigma > 0:
            reach = min(math.ceil(3 * sigma), (min(image.shape[1:]) - 1) // 2)
            image = F.gaussian_blur(image, [2 * reach + 1, 2 * reach + 1], [sigma, sigma])
        if noisy and noise > 0:
            image = image + noise * torch.randn(image.shape, generator=draw.generator)
        if compressed and self.jpeg < 100:
            image = _jpeg(image, round(quality))
        return image


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(part, Real) for part in value)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    """By Pillow: torchvision's own encoder is deprecated."""
    from torchvision.transforms.v2 import functional as F

    file = io.BytesIO()
    F.to_pil_image(image.clamp(0, 1)).save(file, "JPEG", quality=quality)
    eight_bits: Tensor = F.pil_to_tensor(Image.open(file))
    return eight_bits.float() / 255


@dataclass(frozen=True)
class _Draw:
    """Numbers from a generator."""

    generator: torch.Generator

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def around(self, centre: float, reach: float) -> float:
        return self.between(centre - reach, centre + reach)

    def happens(self, probability: float) -> bool:
        return self.between(0, 1) < probability
