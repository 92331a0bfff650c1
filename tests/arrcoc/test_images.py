"""Pictures of every mode against the pixel values that people expect."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrcoc.images import load_image, to_tensor

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def pixels(image: Any) -> list[list[tuple[int, int, int]]]:
    """RGB triples by row and column, of what load_image makes of it."""
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return [[tuple(pixel) for pixel in row] for row in np.asarray(loaded).tolist()]


def row(*greys: int) -> list[list[tuple[int, int, int]]]:
    return [[(grey, grey, grey) for grey in greys]]


def single(mode: str, *colours: Any) -> Image.Image:
    """One row of pixels in a mode."""
    image = Image.new(mode, (len(colours), 1))
    for column, colour in enumerate(colours):
        image.putpixel((column, 0), colour)
    return image


# ---- PIL modes


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (single("RGB", RED, (1, 2, 3)), [[RED, (1, 2, 3)]]),
        (single("L", 0, 77, 255), row(0, 77, 255)),
        (single("1", 0, 1), row(0, 255)),
        (single("LA", (10, 255), (10, 0), (0, 51)), row(10, 255, 204)),
        (single("RGBA", (*RED, 255), (*RED, 0), (*BLACK, 51)), [[RED, WHITE, (204, 204, 204)]]),
        (single("CMYK", (0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)), [[WHITE, RED, BLACK]]),
        (single("YCbCr", (128, 128, 128), (255, 128, 128)), row(128, 255)),
        (single("HSV", (0, 255, 255), (0, 0, 128)), [[RED, (128, 128, 128)]]),
        (single("I;16", 0, 257 * 40, 65535), row(0, 40, 255)),
        (single("I;16", 200), row(1)),
        (single("I", 0, 257 * 40, 65535), row(0, 40, 255)),
        (single("I", 0, 40, 255), row(0, 40, 255)),
        (single("F", 0.0, 0.2, 1.0), row(0, 51, 255)),
        (single("F", 0.0, 40.0, 255.0), row(0, 40, 255)),
        (single("F", 0.0, 257.0 * 40, 65535.0), row(0, 40, 255)),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else "",
)
def test_modes(image: Image.Image, expected: Any) -> None:
    before = (image.mode, image.tobytes())
    assert pixels(image) == expected
    assert (image.mode, image.tobytes()) == before


def test_big_endian_sixteen_bits() -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257 * 40, 65535))
    assert pixels(image) == row(40, 255)


def palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLACK])
    for column in range(3):
        image.putpixel((column, 0), column)
    return image


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    assert pixels(palette()) == [[RED, GREEN, BLACK]]
    palette().save(tmp_path / "one.png", transparency=1)
    assert pixels(tmp_path / "one.png") == [[RED, WHITE, BLACK]]
    palette().save(tmp_path / "many.png", transparency=bytes([255, 0, 51]))
    assert pixels(tmp_path / "many.png") == [[RED, WHITE, (204, 204, 204)]]
    palette().save(tmp_path / "one.gif", transparency=0)
    assert pixels(tmp_path / "one.gif") == [[WHITE, GREEN, BLACK]]


def test_a_transparent_colour_of_rgb_and_grey(tmp_path: Path) -> None:
    single("RGB", RED, GREEN).save(tmp_path / "rgb.png", transparency=GREEN)
    assert pixels(tmp_path / "rgb.png") == [[RED, WHITE]]
    single("L", 10, 20).save(tmp_path / "grey.png", transparency=20)
    assert pixels(tmp_path / "grey.png") == row(10, 255)


@pytest.mark.parametrize("value", [-1.0, 70000.0, float("nan")])
def test_deep_grey_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"image of mode F must lie in \[0, 65535\], got from .* to .*\."):
        load_image(single("F", 0.5, value))


def test_a_mode_that_has_no_rgb() -> None:
    with pytest.raises(ValueError, match=r"image mode 'La' cannot be turned into RGB: "):
        load_image(Image.new("La", (1, 1)))


# ---- files


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)), (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))],
)
def test_exif_rotation(tmp_path: Path, suffix: str, orientation: int, corner: tuple[int, int]) -> None:
    """The bright patch in the first stored corner belongs where the camera says (EXIF 2.3, tag 0x0112)."""
    stored = np.zeros((32, 64), np.uint8)
    stored[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(stored).convert("RGB").save(path, exif=exif.tobytes())
    upright = np.asarray(load_image(path))
    assert upright.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
    assert upright[corner].min() > 240 and (upright > 128).mean() == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize("mode", ["I;16", "L", "CMYK", "RGBA"])
def test_exif_rotation_of_other_modes(tmp_path: Path, mode: str) -> None:
    stored = Image.new(mode, (5, 3))
    stored.paste(
        Image.new(mode, (5, 1), {"L": 255, "I;16": 65535, "RGBA": (0, 0, 0, 255)}.get(mode, (255,) * 4)), (0, 0)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right-hand side
    stored.save(tmp_path / "picture.tif", exif=exif)
    upright = np.asarray(load_image(tmp_path / "picture.tif"))
    assert upright.shape == (5, 3, 3)
    assert (upright == upright[:1, :, :1]).all() and upright[0, 2, 0] != upright[0, 1, 0] == upright[0, 0, 0]


def test_damaged_exif_is_refused(tmp_path: Path) -> None:
    """Pixels without knowing which side is up would be a silent guess."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.webp", exif=b"Exif\0\0" + b"MM\0\x7c" + bytes(20))
    with pytest.raises(ValueError, match="image has EXIF data that are damaged, so which side is up is not known: "):
        load_image(tmp_path / "picture.webp")


def test_sixteen_bit_png_and_pgm(tmp_path: Path) -> None:
    single("I;16", 0, 257 * 40, 65535).save(tmp_path / "grey.png")
    assert pixels(str(tmp_path / "grey.png")) == row(0, 40, 255)
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 1 65535\n" + struct.pack(">HHH", 0, 257 * 40, 65535))
    assert pixels(tmp_path / "grey.pgm") == row(0, 40, 255)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    red, green, blue = pixels(tmp_path / "ink.jpg")[8][8]
    assert red > 250 and green < 5 and blue < 5


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "film.gif")[0][0] == RED


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image '.*absent\.png' does not exist\."):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=r"image must be a file, got the folder '"):
        load_image(str(tmp_path))
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"image '.*words\.png' is not a picture that Pillow can read\."):
        load_image(tmp_path / "words.png")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "png")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"image '.*half\.png' is damaged: "):
        load_image(tmp_path / "half.png")


def test_bytes_are_the_content_of_a_file() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[RED, GREEN]], np.uint8)).save(file, "png")
    assert pixels(file.getvalue()) == [[RED, GREEN]]
    with pytest.raises(ValueError, match=r"image of 5 bytes is not a picture that Pillow can read\."):
        load_image(b"words")
    with pytest.raises(ValueError, match=r"image of \d+ bytes is damaged: "):
        load_image(file.getvalue()[:50])


@pytest.mark.parametrize("side", [12, 20])  # Pillow warns above its limit and refuses above twice the limit
def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    Image.new("L", (side, side)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        ValueError, match=r"image '.*bomb\.png' has more than 100 pixels and may be a decompression bomb"
    ):
        load_image(tmp_path / "bomb.png")


def test_a_bomb_by_header_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(ValueError, match="may be a decompression bomb"):
        load_image(tmp_path / "bomb.png")


# ---- arrays and tensors


def test_arrays() -> None:
    array = np.array([[RED, GREEN, (1, 2, 3)]], np.uint8)
    assert pixels(array) == [[RED, GREEN, (1, 2, 3)]]
    assert pixels(array[:, ::-1]) == [[(1, 2, 3), GREEN, RED]]
    assert pixels(np.array([[0, 77]], np.uint8)) == row(0, 77)
    assert pixels(np.array([[[0], [77]]], np.uint8)) == row(0, 77)
    assert pixels(np.array([[(*RED, 255), (*RED, 0)]], np.uint8)) == [[RED, WHITE]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((2, 2, 3), np.float32),
            r"image array must be uint8 \[H, W, C\], got float32; floats go in as a tensor",
        ),
        (np.zeros((2, 2), np.uint16), r"image array must be uint8 \[H, W, C\], got uint16"),
        (np.zeros((3, 8, 8), np.uint8), r"\[H, W\] or \[H, W, C\] with C = 1, 3 or 4, got \[3, 8, 8\]\."),
        (np.zeros((1, 8, 8, 3), np.uint8), r"with C = 1, 3 or 4, got \[1, 8, 8, 3\]\."),
        (np.zeros((0, 8, 3), np.uint8), r"image must have at least one pixel, got shape \[0, 8, 3\]\."),
    ],
)
def test_arrays_that_are_refused(array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(array)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[[1.0, 0.0]], [[0.0, 0.2]], [[0.0, 1.0005]]], dtype=dtype)
    assert pixels(tensor) == [[RED, (0, 51, 255)]]
    assert pixels(tensor[1:2].requires_grad_()) == row(0, 51)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 2, 2, dtype=torch.uint8), r"image tensor must be float in \[0, 1\], got torch\.uint8"),
        (torch.zeros(2, 2, 3), r"image tensor must have shape \[3, H, W\] or \[1, H, W\], got \[2, 2, 3\]\."),
        (torch.zeros(1, 3, 2, 2), r"or \[1, H, W\], got \[1, 3, 2, 2\]\."),
        (torch.zeros(3, 0, 2), r"image must have at least one pixel, got shape \[3, 0, 2\]\."),
        (torch.full((3, 1, 2), float("nan")), r"image tensor must hold numbers in \[0, 1\], got 6 NaN\."),
        (torch.full((3, 1, 1), 255.0), r"image tensor must lie in \[0, 1\], got values from 255\.0 to 255\.0\."),
        (torch.full((3, 1, 1), -0.5), r"got values from -0\.5 to -0\.5\."),
        (torch.full((3, 1, 1), float("inf")), r"got values from inf to inf\."),
    ],
)
def test_tensors_that_are_refused(tensor: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(tensor)


@pytest.mark.parametrize("image", [None, 3, [[1, 2], [3, 4]]])
def test_other_things_are_refused(image: Any) -> None:
    with pytest.raises(ValueError, match=r"image must be a path, bytes, PIL image, uint8 array or float tensor, got "):
        load_image(image)


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image must have at least one pixel, got width and height \(0, 4\)\."):
        load_image(Image.new("RGB", (0, 4)))


# ---- to_tensor


def test_to_tensor_keeps_pixels_and_round_trips() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    tensor = to_tensor(load_image(array))
    assert tensor.shape == (3, 5, 7) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.from_numpy(array).permute(2, 0, 1).float() / 255, atol=0, rtol=0)
    assert np.array_equal(np.asarray(load_image(tensor)), array)


def test_to_tensor_resizes_height_by_width() -> None:
    picture = Image.new("RGB", (8, 4), (10, 20, 30))
    tensor = to_tensor(picture, (6, 20))
    assert tensor.shape == (3, 6, 20)
    for channel, value in zip(tensor, (10, 20, 30), strict=True):
        torch.testing.assert_close(channel, torch.full((6, 20), value / 255), atol=1e-6, rtol=0)
    assert picture.size == (8, 4)


def test_to_tensor_does_not_alias_when_it_shrinks_nor_leave_the_range() -> None:
    stripes = load_image(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = to_tensor(stripes, (8, 8))
    assert (small[:, 1:-1, 1:-1] - 0.5).abs().max() < 0.01
    large = to_tensor(stripes, (100, 100))
    assert large.min() == 0 and large.max() == 1


def test_to_tensor_refuses() -> None:
    with pytest.raises(ValueError, match=r"image must be a PIL image of mode RGB, got mode L; call load_image first\."):
        to_tensor(Image.new("L", (2, 2)))
    with pytest.raises(ValueError, match=r"image must be a PIL image of mode RGB, got ndarray"):
        to_tensor(np.zeros((2, 2, 3), np.uint8))  # type: ignore[arg-type]
    for size in [(0, 4), (4, -1), (4,)]:
        with pytest.raises(ValueError, match=r"size must be \(height, width\) with both >= 1, got \("):
            to_tensor(Image.new("RGB", (2, 2)), size)  # type: ignore[arg-type]


def test_the_callers_warning_filters_stay(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "picture.png")
    before = list(warnings.filters)
    load_image(tmp_path / "picture.png")
    assert list(warnings.filters) == before
