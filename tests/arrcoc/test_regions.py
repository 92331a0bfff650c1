"""Regions of every kind against hand-made masks and pycocotools, and their counts against the masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycoco

from arrcoc.data.regions import Region, count_pixels
from arrcoc.data.skips import ItemError
from data_cases import HEIGHT, WIDTH, noise, png, rectangle, save


def jpeg(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "JPEG")
    return content.getvalue()


TRUTH = rectangle(5, 10, 25, 40).numpy()
RUNS = pycoco.encode(np.asfortranarray(TRUTH.astype(np.uint8)))

FORMS: dict[str, tuple[str, Any]] = {
    "polygon": ("polygons", [[10, 5, 40, 5, 40, 25, 10, 25]]),
    "polygons": ("polygons", [[10, 5, 30, 5, 30, 25, 10, 25], [20, 5, 40, 5, 40, 25, 20, 25]]),
    "box": ("boxes", [[10, 5, 30, 20]]),
    "boxes": ("boxes", [[10, 5, 15, 20], [20.2, 4.8, 20, 20]]),
    "compressed": ("rle", {"size": [HEIGHT, WIDTH], "counts": RUNS["counts"].decode()}),
    "mask": ("mask", Image.fromarray(TRUTH)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_gives_the_same_mask(form: str) -> None:
    kind, value = FORMS[form]
    region = Region(kind=kind, value=value)
    np.testing.assert_array_equal(region.decode(HEIGHT, WIDTH), TRUTH)
    low, high = count_pixels([region], HEIGHT, WIDTH)[0]
    assert low <= 600 <= high and (form in ("polygons", "boxes") or low == high)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools
def test_boxes_are_those_of_pycocotools() -> None:
    boxes = [[3, 4, 10, 20], [50, 30, 10, 10], [0, 0, WIDTH, HEIGHT]]
    for box in boxes:
        theirs = pycoco.decode(pycoco.frPyObjects(np.array([box], dtype=np.float64), HEIGHT, WIDTH))[..., 0]
        np.testing.assert_array_equal(Region(kind="boxes", value=[box]).decode(HEIGHT, WIDTH), theirs.astype(bool))


def test_pixel_centres_decide_about_boxes() -> None:
    mask = Region(kind="boxes", value=[[0.6, 0.4, 1.8, 1.2]]).decode(3, 4)
    np.testing.assert_array_equal(mask, [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert Region(kind="boxes", value=[[-5, -5, 7, 6]]).decode(3, 4).sum() == 2
    assert not Region(kind="boxes", value=[[50, 50, 7, 6]]).decode(3, 4).any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16", "F", "LA"])
@pytest.mark.parametrize("source", ["path", "bytes", "picture"])
def test_mask_pictures(tmp_path: Path, mode: str, source: str) -> None:
    grey = Image.fromarray(TRUTH.astype(np.uint8) * 7)
    picture = Image.fromarray(TRUTH.astype(np.uint16) * 700) if mode == "I;16" else grey.convert(mode)
    if mode == "1":
        picture = Image.fromarray(TRUTH)
    if mode == "P":
        picture = Image.fromarray(TRUTH.astype(np.uint8) * 3)
        picture.putpalette([0] * 768)  # black in all colours: the index counts
    file = save(tmp_path / "mask.tiff", picture)
    value = {"path": file, "bytes": file.read_bytes(), "picture": picture}[source]
    np.testing.assert_array_equal(Region(kind="mask", value=value).decode(HEIGHT, WIDTH), TRUTH)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_outside_whatever_its_colour(mode: str) -> None:
    picture = Image.new(mode, (WIDTH, HEIGHT), (255,) * len(mode))
    picture.putalpha(Image.fromarray(TRUTH.astype(np.uint8) * 9))
    np.testing.assert_array_equal(Region(kind="mask", value=png(picture)).decode(HEIGHT, WIDTH), TRUTH)


def test_counts_of_many_regions_at_once() -> None:
    rng = np.random.default_rng(0)
    regions = [Region(kind=kind, value=value) for kind, value in FORMS.values()]
    for _ in range(30):
        rings = [rng.uniform(-10, 60, 2 * rng.integers(3, 8)).tolist() for _ in range(rng.integers(1, 4))]
        regions.append(Region(kind="polygons", value=rings))
    counts = count_pixels(regions, HEIGHT, WIDTH)
    for region, (low, high) in zip(regions, counts, strict=True):
        exact = region.decode(HEIGHT, WIDTH).sum()
        assert low <= exact <= high
        if region.kind in ("rle", "mask") or len(region.value) == 1:
            assert low == high
    assert count_pixels([], HEIGHT, WIDTH) == []


@pytest.mark.parametrize(
    ("kind", "value", "message", "reason"),
    [
        ("boxes", [], r"boxes must be \[\[x, y, width, height\], ...\], at least one, got \[\]", "region broken"),
        (
            "boxes",
            [3, 4, 5, 6],
            r"a box must be \[x, y, width, height\] with width and height > 0, got 3",
            "region broken",
        ),
        ("boxes", [[3, 4, 0, 6]], r"width and height > 0, got \[3, 4, 0, 6\]", "region broken"),
        ("boxes", [[3, 4, float("inf"), 6]], r"a box must be", "region broken"),
        ("boxes", [[3, 4, "5", 6]], r"a box must be", "region broken"),
        ("boxes", [[3, 4, 10**400, 6]], r"a box must be", "region broken"),
        ("polygons", [[1, 2, 3, 4]], r"a polygon must be", "region broken"),
        (
            "rle",
            {"size": [1, 2], "counts": [2]},
            r"run-length size must be \[40, 60\], as the picture",
            "region broken",
        ),
        ("rle", None, r"run lengths.*, got None", "region broken"),
        ("rle", {"size": 40, "counts": [2]}, r"run-length size must be .*, got 40", "region broken"),
        ("mask", b"nothing", r"mask: 7 bytes is not a picture that Pillow can read", "mask unreadable"),
        ("mask", "nowhere.png", r"mask: .*No such file.*nowhere\.png", "mask missing"),
        (
            "mask",
            png(noise(height=41)),
            r"mask: \d+ bytes must have .* \(40, 60\), got \(41, 60\)",
            "mask of another size",
        ),
        ("mask", jpeg(noise()), r"mask: \d+ bytes is a JPEG, whose compression blurs .*; save it", "mask is a JPEG"),
        ("mask", png(noise())[:900], r"mask: cannot read the pixels of 900 bytes", "mask unreadable"),
    ],
)
def test_broken_regions(kind: str, value: Any, message: str, reason: str) -> None:
    region = Region(kind=kind, value=value)
    with pytest.raises(ItemError, match=message) as caught:
        region.decode(HEIGHT, WIDTH)
    assert caught.value.reason == reason
    with pytest.raises(ItemError, match=message):
        count_pixels([region], HEIGHT, WIDTH)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of mask, boxes, polygons, rle, got 'bbox'"):
        Region(kind="bbox", value=[])
