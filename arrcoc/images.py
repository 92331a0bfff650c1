"""Any picture a user may hand over, as people expect to see it: upright, opaque, eight bits, RGB.

Axes: H, W, C height, width, channels.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Tensor


def load_image(image: ImageInput) -> Image.Image:
    """The picture as a PIL image of mode RGB; what was handed over is left as it was.

    The camera's rotation (EXIF) is applied, transparency is laid over white, and deep grey pictures are scaled to eight
    bits: mode I;16 by 257; modes I and F, which do not say their range, by the smallest of 1 (F alone), 255 and 65535
    that holds all values. Of an animation the first frame counts.

    Args:
        image: path of a file; the bytes of one; PIL image of any mode; uint8 array [H, W] or [H, W, C] with C = 1, 3
            or 4 (RGBA); float tensor [3, H, W] or [1, H, W] in [0, 1].

    Returns:
        PIL image of mode RGB.

    Raises:
        FileNotFoundError: if the path names no file.
        ValueError: if the file is no picture, damaged or suspiciously large, or the shape, type or values are wrong.
    """
    if isinstance(image, str | os.PathLike):
        picture = _open(Path(image))
    elif isinstance(image, bytes):
        picture = _decode(io.BytesIO(image), f"of {len(image)} bytes")
    elif isinstance(image, Image.Image):
        picture = image
    elif isinstance(image, np.ndarray):
        picture = _from_array(image)
    elif isinstance(image, Tensor):
        picture = _from_tensor(image)
    else:
        raise ValueError(
            f"image must be a path, bytes, PIL image, uint8 array or float tensor, got {type(image).__name__}."
        )
    if min(picture.size) < 1:
        raise ValueError(f"image must have at least one pixel, got width and height {picture.size!r}.")
    try:
        upright = ImageOps.exif_transpose(picture)
    except (SyntaxError, struct.error) as error:
        raise ValueError(f"image has EXIF data that are damaged, so which side is up is not known: {error}") from error
    return _to_rgb(upright)


def to_pixels(image: Image.Image, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A picture as an array, resized on request (bicubic, antialiased where it shrinks).

    Args:
        image: PIL image of mode RGB, as `load_image` returns it.
        size: (height, width) in pixels, or None to keep it.

    Returns:
        uint8 array [H, W, 3].

    Raises:
        ValueError: if image is not RGB or a side of size is < 1.
    """
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        kind = f"mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
        raise ValueError(f"image must be a PIL image of mode RGB, got {kind}; call load_image first.")
    if size is not None:
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size must be (height, width) with both >= 1, got {size!r}.")
        if (size[1], size[0]) != image.size:
            image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(image)


def to_tensor(image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """A picture as a float32 tensor [3, H, W] in [0, 1]; arguments as in `to_pixels`."""
    return as_images(to_pixels(image, size)[None])[0]


def as_images(pixels: NDArray[np.uint8]) -> Tensor:
    """Arrays of `to_pixels` in one batch, uint8 [B, H, W, 3], as float32 images [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def _open(path: Path) -> Image.Image:
    if not path.exists():
        raise FileNotFoundError(f"image {str(path)!r} does not exist.")
    if path.is_dir():
        raise ValueError(f"image must be a file, got the folder {str(path)!r}.")
    # a file object, not a name: from a name Pillow 13 maps plain TIFFs into memory and scrambles rotated ones
    with path.open("rb") as file:
        return _decode(file, repr(str(path)))


def _decode(file: BinaryIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file)
            picture.load()
            return picture
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {name} has more than {Image.MAX_IMAGE_PIXELS} pixels and may be a decompression bomb; "
            "if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS or pass a smaller copy."
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"image {name} is not a picture that Pillow can read.") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders stumble over broken files in many ways: OSError, SyntaxError, struct.error
        raise ValueError(f"image {name} is damaged: {error}") from error


def _from_array(array_HWC: np.ndarray[Any, Any]) -> Image.Image:
    if array_HWC.dtype != np.uint8:
        raise ValueError(
            f"image array must be uint8 [H, W, C], got {array_HWC.dtype}; floats go in as a tensor [C, H, W]."
        )
    if array_HWC.ndim not in (2, 3) or (array_HWC.ndim == 3 and array_HWC.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"image array must have shape [H, W] or [H, W, C] with C = 1, 3 or 4, got {list(array_HWC.shape)}."
        )
    if array_HWC.size == 0:
        raise ValueError(f"image must have at least one pixel, got shape {list(array_HWC.shape)}.")
    return Image.fromarray(array_HWC[:, :, 0] if array_HWC.shape[2:] == (1,) else np.ascontiguousarray(array_HWC))


def _from_tensor(tensor_CHW: Tensor) -> Image.Image:
    if not tensor_CHW.is_floating_point():
        raise ValueError(
            f"image tensor must be float in [0, 1], got {tensor_CHW.dtype}; eight-bit pictures go in as an array."
        )
    if tensor_CHW.ndim != 3 or tensor_CHW.shape[0] not in (1, 3):
        raise ValueError(f"image tensor must have shape [3, H, W] or [1, H, W], got {list(tensor_CHW.shape)}.")
    if tensor_CHW.numel() == 0:
        raise ValueError(f"image must have at least one pixel, got shape {list(tensor_CHW.shape)}.")
    values = tensor_CHW.detach().to("cpu", torch.float32)
    if values.isnan().any():
        raise ValueError(f"image tensor must hold numbers in [0, 1], got {int(values.isnan().sum())} NaN.")
    low, high = values.min().item(), values.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"image tensor must lie in [0, 1], got values from {low} to {high}.")
    pixels_HWC = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return _from_array(pixels_HWC)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        return _scaled(picture, scales=(65535.0,))
    if picture.mode == "I":
        return _scaled(picture, scales=(255.0, 65535.0))
    if picture.mode == "F":
        return _scaled(picture, scales=(1.0, 255.0, 65535.0))
    try:
        if picture.has_transparency_data:
            opaque = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
        return picture.convert("RGB")
    except ValueError as error:
        raise ValueError(f"image mode {picture.mode!r} cannot be turned into RGB: {error}") from error


def _scaled(picture: Image.Image, *, scales: tuple[float, ...]) -> Image.Image:
    """Grey values of more than eight bits, divided by the first scale that holds them."""
    grey_HW = np.asarray(picture).astype(np.float64)
    low, high = float(grey_HW.min()), float(grey_HW.max())
    scale = next((scale for scale in scales if low >= 0 and high <= scale), None)
    if scale is None:  # NaN fails every comparison and ends here too
        raise ValueError(f"image of mode {picture.mode} must lie in [0, {scales[-1]:.0f}], got from {low} to {high}.")
    return Image.fromarray(np.rint(grey_HW * (255 / scale)).astype(np.uint8)).convert("RGB")
