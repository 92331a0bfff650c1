"""What pictures and tokens suffer in the field: noise, blur, JPEG, brightness, contrast and token noise, 1 to 5 strong.

Every perturbation is ``f(thing, severity, *, generator)``: a new thing of the same kind and size, a pure function of
its arguments. The strengths of the picture corruptions are those of ImageNet-C (Hendrycks & Dietterich 2019, public
code) or near them where Pillow's operation is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from arrcoc.model.robustness import perturb_tokens
from arrcoc.tokens import VisualTokens

SEVERITIES: Mapping[str, tuple[float, float, float, float, float]] = MappingProxyType(
    {
        "token_noise": (0.1, 0.2, 0.4, 0.7, 1.0),  # rho, relative to the RMS of the patches
        "gaussian_noise": (0.04, 0.08, 0.12, 0.18, 0.26),  # sigma, white = 1
        "blur": (1.0, 2.0, 3.0, 4.0, 6.0),  # sigma in pixels, per 224 pixels of the shorter side
        "jpeg": (25, 18, 15, 10, 7),  # Pillow's quality
        "brightness": (1.2, 1.4, 1.7, 2.0, 2.5),  # factor; what grows beyond white is lost
        "contrast": (0.5, 0.4, 0.3, 0.2, 0.1),  # factor on the distance from the mean grey
    }
)
"""Strength of severity 1 to 5 of each perturbation, by name."""


class Corruption(Protocol):
    """RGB picture -> RGB picture of the same size."""

    def __call__(self, image: Image.Image, severity: int, *, generator: torch.Generator) -> Image.Image: ...


def strength(name: str, severity: int) -> float:
    """The number behind a perturbation's severity, e.g. the quality of a JPEG.

    Raises:
        ValueError: for an unknown name, or a severity that is not one of 1, 2, 3, 4, 5.
    """
    if name not in SEVERITIES:
        raise ValueError(f"perturbation must be one of {', '.join(SEVERITIES)}, got {name!r}.")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}.")
    return SEVERITIES[name][int(severity) - 1]


def token_noise(visual_tokens: VisualTokens, severity: int, *, generator: torch.Generator) -> VisualTokens:
    """Gaussian noise on the patches, relative to their RMS; see :func:`arrcoc.model.robustness.perturb_tokens`."""
    return perturb_tokens(visual_tokens, strength("token_noise", severity), generator)


def gaussian_noise(image: Image.Image, severity: int, *, generator: torch.Generator) -> Image.Image:
    """Independent Gaussian noise on each channel of each pixel, clipped to [0, 1]."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    noisy = pixels + strength("gaussian_noise", severity) * torch.randn(pixels.shape, generator=generator)
    return Image.fromarray((noisy.clamp(0, 1) * 255).round().byte().numpy())


def blur(image: Image.Image, severity: int, *, generator: torch.Generator) -> Image.Image:
    """Gaussian blur whose width grows with the picture, so that severity means the same at any resolution."""
    return image.filter(ImageFilter.GaussianBlur(strength("blur", severity) * min(image.size) / 224))


def jpeg(image: Image.Image, severity: int, *, generator: torch.Generator) -> Image.Image:
    """Through a JPEG file of low quality and back."""
    file = BytesIO()
    image.save(file, "JPEG", quality=int(strength("jpeg", severity)))
    return Image.open(file).convert("RGB")


def brightness(image: Image.Image, severity: int, *, generator: torch.Generator) -> Image.Image:
    """Overexposure: all channels multiplied, and cut at white."""
    return ImageEnhance.Brightness(image).enhance(strength("brightness", severity))


def contrast(image: Image.Image, severity: int, *, generator: torch.Generator) -> Image.Image:
    """Haze: all channels drawn towards the mean grey of the picture."""
    return ImageEnhance.Contrast(image).enhance(strength("contrast", severity))


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {"gaussian_noise": gaussian_noise, "blur": blur, "jpeg": jpeg, "brightness": brightness, "contrast": contrast}
)
"""The picture corruptions by name."""
