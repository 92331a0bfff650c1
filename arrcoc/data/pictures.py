"""Stored pictures, opened one way: a path, the bytes of a file or a PIL picture, with errors that say what is wrong.

Masks refer to the stored pixels, so a rotation in EXIF is not applied here. Pillow applies a TIFF's own unasked, so a
TIFF with one is refused.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from arrcoc.data.skips import ItemError
from arrcoc.images import load_image

# Endings of files that are taken for pictures.
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

PictureSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image


def describe(source: PictureSource) -> str:
    """What a message calls a picture: its path in quotes, or how many bytes it has."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    return repr(source if isinstance(source, Image.Image) else str(source))


@contextmanager
def open_picture(source: PictureSource) -> Iterator[Image.Image]:
    """The picture with its header read and its pixels not yet decoded.

    Raises:
        ItemError: if there is no such file, it is no picture, it is damaged or suspiciously large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                yield source
                return
            # a file object, not a name: from a name Pillow 13 maps plain TIFFs into memory
            with (
                io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
                Image.open(file) as picture,
            ):
                if isinstance(picture, TiffImagePlugin.TiffImageFile) and _orientation(picture) != 1:
                    message = (
                        f"{describe(source)} is a TIFF that says how to turn it, and Pillow does; save it upright."
                    )
                    raise ItemError(message, reason="turned TIFF")
                yield picture
    except ItemError:
        raise
    except FileNotFoundError as error:
        raise ItemError(str(error), reason="picture missing") from error
    except UnidentifiedImageError as error:
        message = f"{describe(source)} is not a picture that Pillow can read."
        raise ItemError(message, reason="picture unreadable") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        message = f"{describe(source)} has more than {Image.MAX_IMAGE_PIXELS} pixels and may be a decompression bomb."
        raise ItemError(message, reason="picture too large") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders stumble over broken files in many ways, RuntimeError among them
        message = f"cannot read the pixels of {describe(source)}: {error}."
        raise ItemError(message, reason="picture unreadable") from error


def _orientation(picture: TiffImagePlugin.TiffImageFile) -> int:
    return int(picture.tag_v2.get(ExifTags.Base.Orientation, 1))


def picture_size(source: PictureSource) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone."""
    with open_picture(source) as picture:
        return picture.height, picture.width


def decode_picture(source: PictureSource) -> Image.Image:
    """The stored pixels as a PIL image of mode RGB: transparency over white, deep grey scaled to eight bits."""
    with open_picture(source) as picture:
        picture.load()
        if ExifTags.Base.Orientation in picture.getexif():
            picture = picture.copy()
            picture.getexif().pop(ExifTags.Base.Orientation, None)
        return load_image(picture)
