"""The photos and textures that ship with the package."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arrcoc.assets import asset_path
from arrcoc.data.backgrounds import TEXTURES
from arrcoc.data.masks import decode_segmentation
from arrcoc.data.photos import sample_photos


def test_what_the_photos_show() -> None:
    assert {sample.name: sample.queries for sample in sample_photos()} == {
        "astronaut.jpg": ("flag", "helmet", "person", "rocket", "space shuttle"),
        "chelsea.jpg": ("cat", "eye", "nose"),
        "coffee.jpg": ("coffee", "cup", "plate", "spoon"),
        "rocket.jpg": ("rocket", "tower"),
    }


def test_outlines_lie_where_the_things_are() -> None:
    """Colours under the masks: an orange suit, a red nose, a red plate, a rocket brighter than the sky."""
    means = {}
    for sample in sample_photos():
        for query, mask in zip(sample.queries, sample.masks, strict=True):
            means[sample.name, query] = sample.image[:, mask].mean(1).tolist()
        means[sample.name, "rest"] = sample.image[:, ~sample.masks.any(0)].mean(1).tolist()
    red, green, blue = means["astronaut.jpg", "person"]
    assert red > 1.4 * green > 1.4 * blue
    red, green, blue = means["chelsea.jpg", "nose"]
    assert red > 2 * green > 3 * blue
    red, green, blue = means["coffee.jpg", "plate"]
    assert red > 3 * green and red > 3 * blue
    assert min(means["rocket.jpg", "rocket"]) > 1.3 * max(means["rocket.jpg", "rest"])


def test_areas_and_boxes_are_those_of_the_outlines() -> None:
    coco = json.loads((asset_path("photos") / "instances.json").read_text(encoding="utf-8"))
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    for annotation in coco["annotations"]:
        height, width = sizes[annotation["image_id"]]
        mask = decode_segmentation(annotation["segmentation"], height, width)
        assert mask.sum() == annotation["area"]
        rows, columns = np.nonzero(mask)
        left, top, box_width, box_height = annotation["bbox"]
        assert 0 <= left <= columns.min() + 1 and 0 <= top <= rows.min() + 1
        assert columns.max() <= left + box_width <= width and rows.max() <= top + box_height <= height


def test_absent_queries_are_of_the_other_photos() -> None:
    for sample, without in zip(sample_photos(absent_queries=3), sample_photos(), strict=True):
        added = sample.queries[len(without.queries) :]
        assert len(added) == 3 and not sample.masks[-3:].any()
    with pytest.raises(ValueError, match=r"absent_queries must be >= 0, got -1"):
        sample_photos(absent_queries=-1)


def test_every_file_is_credited_and_small() -> None:
    for folder, pattern in (("photos", "images/*"), ("textures", "*.jpg")):
        readme = (asset_path(folder) / "README.md").read_text(encoding="utf-8")
        files = list(asset_path(folder).glob(pattern))
        assert files and all(f"| {path.name} |" in readme for path in files)
        assert sum(path.stat().st_size for path in files) < 500_000
    assert {path.stem for path in asset_path("textures").glob("*.jpg")} == set(TEXTURES)
