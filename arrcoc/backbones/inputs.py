"""What a backbone takes: images and texts, and what is said of any others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_RANGE_TOLERANCE = 1e-3  # bicubic resampling and half precision overshoot [0, 1] by about this much


def check_images(images: Tensor, stride: tuple[int, int]) -> None:
    """Refuse what is no float tensor [B, 3, H, W] in [0, 1] with sides that are multiples of a stride.

    Raises:
        ValueError: if shape, type, size or, outside of torch.compile, range is wrong.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a float tensor in [0, 1], got {kind}.")
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[0] < 1:
        raise ValueError(f"images must have shape [B, 3, H, W] with B >= 1, got {list(images.shape)}.")
    if any(size < step or size % step for size, step in zip(images.shape[2:], stride, strict=True)):
        raise ValueError(
            f"images must have height a multiple of {stride[0]} and width a multiple of {stride[1]}, "
            f"got {tuple(images.shape[2:])}; resize them to input_size(height, width)."
        )
    if torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
        raise ValueError(f"images must lie in [0, 1], got values from {low} to {high}.")


def check_sequence(images: Sequence[Tensor]) -> list[Tensor]:
    """Images [3, H, W] of any sizes, as a list.

    Raises:
        ValueError: if there is none, or one is no tensor of three axes.
    """
    images = list(images)
    if not images:
        raise ValueError(f"images must hold at least one tensor [3, H, W], got {images!r}.")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"images[{number}] must be a tensor [3, H, W], got {got}.")
    return images


def check_texts(texts: Sequence[str]) -> list[str]:
    """Texts, as a list.

    Raises:
        ValueError: if there is none, or texts is a single str or holds anything else.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a sequence of str, got the single str {texts!r}; write [{texts!r}].")
    texts = list(texts)
    if not texts:
        raise ValueError(f"texts must hold at least one str, got {texts!r}.")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"texts must hold nothing but str, got {wrong[0]!r}.")
    return texts
