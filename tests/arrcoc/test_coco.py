"""COCO folders: queries and masks, and an answer to everything that can be broken."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrcoc.data.coco import CocoFolder
from arrcoc.data.coco_records import mentions
from arrcoc.data.splits import split_by_image

HEIGHT, WIDTH = 40, 60


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def make_folder(root: Path, **changes: Any) -> Path:
    """Two pictures: a dog and two cats (one a crowd) in the first, a bus in the second."""
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)).save(root / "images" / name)
    crowd = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    crowd[30:40, 40:60] = 1
    changed = np.flatnonzero(np.diff(np.concatenate([[0], crowd.T.ravel(), [0]])))
    runs = np.diff(np.concatenate([[0], changed, [crowd.size]])).tolist()
    coco = {
        "images": [
            {"id": 1, "file_name": "one.png", "height": HEIGHT, "width": WIDTH},
            {"id": "b", "file_name": "two.png", "height": HEIGHT, "width": WIDTH},
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(["dog", "cat", "bus", "cherry"])],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 0, "segmentation": box(0, 0, 30, 20)},
            {"id": 2, "image_id": 1, "category_id": 1, "segmentation": box(30, 0, 60, 10)},
            {
                "id": 3,
                "image_id": 1,
                "category_id": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs},
                "iscrowd": 1,
            },
            {"id": 4, "image_id": "b", "category_id": 2, "segmentation": box(10, 10, 50, 30)},
        ],
        **changes,
    }
    (root / "instances.json").write_text(json.dumps(coco))
    return root


def expected_masks() -> dict[str, torch.Tensor]:
    masks = {name: torch.zeros(HEIGHT, WIDTH, dtype=torch.bool) for name in ("dog", "cat", "bus")}
    masks["dog"][:20, :30] = True
    masks["cat"][:10, 30:] = True
    masks["cat"][30:, 40:] = True
    masks["bus"][10:30, 10:50] = True
    return masks


# Queries and masks


def test_categories_are_queries_and_their_masks_are_united(tmp_path: Path) -> None:
    folder = CocoFolder(make_folder(tmp_path))
    assert [(sample.name, sample.queries) for sample in folder] == [("one.png", ("cat", "dog")), ("two.png", ("bus",))]
    masks = expected_masks()
    torch.testing.assert_close(folder[0].masks, torch.stack([masks["cat"], masks["dog"]]))
    torch.testing.assert_close(folder[1].masks[0], masks["bus"])
    pixels = np.asarray(Image.open(tmp_path / "images" / "two.png"))
    np.testing.assert_array_equal((folder[1].image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


def test_coverage_limits(tmp_path: Path) -> None:
    make_folder(tmp_path)  # dog .25, cat .2083, bus .3333
    assert [sample.queries for sample in CocoFolder(tmp_path, min_coverage=0.22)] == [("dog",), ("bus",)]
    assert [sample.queries for sample in CocoFolder(tmp_path, max_coverage=0.25)] == [("cat", "dog")]


def test_captions_ask_for_what_they_mention(tmp_path: Path) -> None:
    make_folder(tmp_path)
    captions = [(1, "A dog beside CATS."), (1, "Two dogs"), (1, "A dogma"), (1, "A bus"), ("b", "Busses and buses")]
    content = {"annotations": [{"image_id": number, "caption": caption} for number, caption in captions]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    folder = CocoFolder(tmp_path, queries="captions")
    assert [sample.queries for sample in folder] == [("A dog beside CATS.", "Two dogs"), ("Busses and buses",)]
    assert folder.num_captions_left_out == 2
    masks = expected_masks()
    torch.testing.assert_close(folder[0].masks, torch.stack([masks["dog"] | masks["cat"], masks["dog"]]))


@pytest.mark.parametrize(
    ("caption", "name", "expected"),
    [
        ("Hot dogs!", "hot dog", True),
        ("a bowl of cherries", "cherry", True),
        ("a cherry-red car", "cherry", True),
        ("scattered", "cat", False),
        ("benches", "bench", True),
        ("a concert", "cone", False),
    ],
)
def test_mentions(caption: str, name: str, expected: bool) -> None:
    assert mentions(caption, name) is expected


def test_absent_queries_name_what_is_not_there(tmp_path: Path) -> None:
    make_folder(tmp_path)
    folder = CocoFolder(tmp_path, absent_queries=1, min_coverage=0.22)
    for sample, present in zip(folder, ("dog", "bus"), strict=True):
        assert sample.queries[0] == present and len(sample.queries) == 2
        assert not sample.masks[1].any()
    assert folder[0].queries[1] in ("bus", "cherry")  # never the cat, which is there though too small to ask for
    assert [sample.queries for sample in CocoFolder(tmp_path, absent_queries=1, min_coverage=0.22)] == [
        sample.queries for sample in folder
    ]
    assert set(CocoFolder(tmp_path, absent_queries=9)[1].queries) == {"bus", "dog", "cat", "cherry"}


def test_the_usual_coco_layout(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "instances.json").rename(tmp_path / "annotations" / "instances_val2017.json")
    assert len(CocoFolder(tmp_path)) == 2
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"exactly one .*\(found: instances_train2017.json, instances_val2017"):
        CocoFolder(tmp_path)


def test_limit_and_split(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert [sample.name for sample in CocoFolder(tmp_path, limit=1)] == ["one.png"]
    parts = [[sample.name for sample in CocoFolder(tmp_path, split=split, val_share=0.5)] for split in ("train", "val")]
    assert sorted(itertools.chain(*parts)) == ["one.png", "two.png"]
    expected = split_by_image(["one.png", "two.png"], {"train": 0.5, "val": 0.5})
    assert parts == [expected["train"], expected["val"]]


def test_rotation_in_exif_is_not_applied(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "images" / "one.png"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(path, exif=exif)
    assert CocoFolder(tmp_path)[0].image.shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_any_kind(tmp_path: Path, mode: str) -> None:
    make_folder(tmp_path)
    path = tmp_path / "images" / "one.png"
    Image.open(path).convert(mode).save(path, format="TIFF")
    assert CocoFolder(tmp_path)[0].image.shape == (3, HEIGHT, WIDTH)


# Boxes and sentences


def test_boxes_stand_in_where_there_is_no_segmentation(tmp_path: Path) -> None:
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 0, "bbox": [0, 0, 30, 20]},
        {"id": 2, "image_id": 1, "category_id": 1, "segmentation": [], "bbox": [30, 0, 30, 10]},
        {"id": 3, "image_id": 1, "category_id": 1, "segmentation": box(40, 30, 60, 40), "bbox": [0, 30, 60, 10]},
    ]
    folder = CocoFolder(make_folder(tmp_path, annotations=annotations))
    masks = expected_masks()
    assert folder[0].queries == ("cat", "dog") and folder.num_boxes_as_masks == 2
    torch.testing.assert_close(folder[0].masks, torch.stack([masks["cat"], masks["dog"]]))
    boxes = CocoFolder(tmp_path, regions="boxes")
    masks["cat"][30:, :] = True
    torch.testing.assert_close(boxes[0].masks, torch.stack([masks["cat"], masks["dog"]]))
    assert boxes.num_boxes_as_masks == 0


@pytest.mark.parametrize(
    ("regions", "changes", "message"),
    [
        ("masks", {}, r"annotation 7 must have a segmentation or a bbox"),
        ("boxes", {"segmentation": box(0, 0, 30, 20)}, r"annotation 7 must have a bbox"),
        (
            "masks",
            {"bbox": [0, 0, 0, 20]},
            r"a box must be .* with width and height > 0, got \[0, 0, 0, 20\]",
        ),
    ],
)
def test_annotations_without_a_region(tmp_path: Path, regions: str, changes: dict[str, Any], message: str) -> None:
    make_folder(tmp_path, annotations=[{"id": 7, "image_id": 1, "category_id": 0, **changes}])
    with pytest.raises(ValueError, match=rf"^one\.png: {message}"):
        CocoFolder(tmp_path, regions=regions)


def write_refs(root: Path, *changes: dict[str, Any]) -> None:
    sound = {"ref_id": 0, "ann_id": 3, "image_id": 1, "sentences": [{"sent": "cats at the bottom"}, {"raw": " Cats "}]}
    refs = [sound, {"ann_id": 4, "sentences": [{"sent": "the bus", "raw": "The bus"}]}]
    (root / "refs.json").write_text(json.dumps(refs + [{**sound, **change} for change in changes]))


def test_sentences_refer_to_one_annotation(tmp_path: Path) -> None:
    write_refs(make_folder(tmp_path), {"ann_id": 1, "sentences": [{"sent": "dog"}]})
    folder = CocoFolder(tmp_path, queries="sentences", absent_queries=2)
    assert [sample.queries[:-2] for sample in folder] == [("cats at the bottom", "Cats", "dog"), ("the bus",)]
    assert set(folder[0].queries[-2:]) == {"bus", "cherry"}  # names of categories that are not in the picture
    masks = expected_masks()
    bottom = masks["cat"].clone()
    bottom[:10] = False
    torch.testing.assert_close(folder[0].masks[:3], torch.stack([bottom, bottom, masks["dog"]]))
    torch.testing.assert_close(folder[1].masks[0], masks["bus"])


def test_a_sentence_for_several_annotations_unites_them(tmp_path: Path) -> None:
    same = {"sentences": [{"sent": "Cats"}]}
    write_refs(make_folder(tmp_path), same, {"ann_id": 2, **same})
    (sample,) = CocoFolder(tmp_path, queries="sentences", limit=1)
    assert sample.queries == ("cats at the bottom", "Cats")
    torch.testing.assert_close(sample.masks[1], expected_masks()["cat"])


@pytest.mark.parametrize(
    ("change", "message", "reason"),
    [
        ({"ann_id": 9}, r"reference 0: ann_id 9 is not among the annotations", "annotation missing"),
        ({"image_id": "b"}, r"reference 0: image_id is 'b', that of annotation 3 1", "annotation of another picture"),
        ({"sentences": [{"sent": " "}]}, r"reference 0: a sentence must have a text \"sent\" or \"raw\"", "no text"),
    ],
)
def test_broken_references(tmp_path: Path, change: dict[str, Any], message: str, reason: str) -> None:
    write_refs(make_folder(tmp_path), change)
    with pytest.raises(ValueError, match=message):
        CocoFolder(tmp_path, queries="sentences")
    folder = CocoFolder(tmp_path, queries="sentences", on_error="skip")
    assert len(folder) == 2 and folder.skips.broken == {reason: 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"refs\.json must be a list of references, got dict"),
        ([{"ann_id": 3}], r"must have ann_id and a list of sen"),
    ],
)
def test_not_in_the_format_of_references(tmp_path: Path, content: Any, message: str) -> None:
    (make_folder(tmp_path) / "refs.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CocoFolder(tmp_path, queries="sentences")


def test_pickled_references_are_refused_unopened(tmp_path: Path) -> None:
    refs = [{"ann_id": 4, "sentences": [{"sent": "the bus"}]}]
    make_folder(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p is a pickle, and opening a pickle runs whatever") as caught:
        CocoFolder(tmp_path, queries="sentences")
    command = re.search(r'python -c "(.*)"$', str(caught.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command[1]], check=True)
    assert CocoFolder(tmp_path, queries="sentences")[0].queries == ("the bus",)


def test_masks_are_not_decoded_when_a_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full COCO opens in a minute, not in twenty."""
    make_folder(tmp_path)
    monkeypatch.setattr("arrcoc.data.regions.Region.decode", lambda *arguments: pytest.fail("a mask was decoded"))
    assert len(CocoFolder(tmp_path)) == 2


def test_truncated_pictures_are_found_by_a_check_of_pixels(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "images" / "one.png"
    path.write_bytes(path.read_bytes()[:2000])
    folder = CocoFolder(tmp_path, check="pixels", on_error="skip")
    assert folder.names == ("two.png",) and folder.skips.broken == {"picture unreadable": 1}


def test_three_splits(tmp_path: Path) -> None:
    make_folder(tmp_path)
    shares = {"val_share": 0.3, "test_share": 0.4, "split_seed": 2}
    names = {split: CocoFolder(tmp_path, split=split, **shares).names for split in ("train", "val", "test")}
    expected = split_by_image(["one.png", "two.png"], {"train": 1 - 0.3 - 0.4, "val": 0.3, "test": 0.4}, seed=2)
    assert {split: list(part) for split, part in names.items()} == expected


# Splits


def test_splits_share_out_names_and_do_not_move() -> None:
    names = [f"{number:06d}.jpg" for number in range(4000)]
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    splits = split_by_image(names, shares)
    assert sorted(itertools.chain(*splits.values())) == names
    for split, share in shares.items():
        assert abs(len(splits[split]) / 4000 - share) < 0.03
    half = split_by_image(names[::2], shares)
    assert all(set(half[split]) <= set(splits[split]) for split in shares)
    assert split_by_image(names, shares, seed=1) != splits
    assert split_by_image(["a.jpg", "b.jpg", "c.jpg"], {"train": 0.5, "val": 0.5}) == {
        "train": ["c.jpg"],
        "val": ["a.jpg", "b.jpg"],
    }


@pytest.mark.parametrize("shares", [{}, {"train": 0.5, "val": 0.4}, {"train": 1.2, "val": -0.2}])
def test_wrong_shares(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"shares must be > 0 and sum to 1, got \{"):
        split_by_image(["a"], shares)


# What can be broken


BOX = box(0, 0, 30, 20)


@pytest.mark.parametrize(
    ("annotation", "name", "message"),
    [
        ({"id": 7, "image_id": 5, "category_id": 0, "segmentation": BOX}, "annotation 7", "image_id 5 is not among"),
        (
            {"image_id": 1, "category_id": 9, "segmentation": BOX},
            "one.png",
            "category_id 9 is not among",
        ),
        (
            {"image_id": 1, "category_id": 0, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [2399]}},
            "one.png",
            r"run lengths must be >= 0 and sum to 40 \* 60 = 2400, got 2399",
        ),
    ],
)
def test_broken_annotations(tmp_path: Path, annotation: dict[str, Any], name: str, message: str) -> None:
    bus = {"image_id": "b", "category_id": 2, "segmentation": box(10, 10, 50, 30)}
    make_folder(tmp_path, annotations=[bus, annotation])
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        CocoFolder(tmp_path)
    folder = CocoFolder(tmp_path, on_error="skip")
    assert [sample.name for sample in folder] == ["two.png"]
    assert [broken for broken, _ in folder.skipped] == [name]


def test_picture_of_another_size(tmp_path: Path) -> None:
    make_folder(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "images" / "one.png")
    with pytest.raises(ValueError, match=r"one.png: the picture has .* \(41, 60\), annotated is \(40, 60\)"):
        CocoFolder(tmp_path)
    folder = CocoFolder(tmp_path, on_error="skip")
    assert len(folder) == 1 and folder.skipped[0][0] == "one.png"


def test_missing_picture(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "two.png").unlink()
    with pytest.raises(ValueError, match=r"two\.png: .*No such file"):
        CocoFolder(tmp_path)
    assert CocoFolder(tmp_path, on_error="skip").skipped[0][0] == "two.png"


def test_truncated_picture_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    make_folder(tmp_path)
    path = tmp_path / "images" / "one.png"
    path.write_bytes(path.read_bytes()[:2000])
    folder = CocoFolder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot read the pixels of '.*one\.png'"):
        folder[0]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be a folder with images/ in it, got '.*nowhere'"):
        CocoFolder(tmp_path / "nowhere")
    make_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no captions file: looked for .*captions\.json .*\(found: none\)"):
        CocoFolder(tmp_path, queries="captions")
    (tmp_path / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no instances file: looked for .*instances\.json and for exactly one"):
        CocoFolder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": None}, r"must have the lists images, annotations, categories; categories is missing"),
        ({"categories": [{"id": 3}]}, r"each of categories must have id, name, got \{'id': 3\}"),
        (
            {"images": [{"id": 1, "file_name": "a", "height": "1", "width": 1}]},
            r"each image must have a file_name and a height and width >= 1, got \{'id': 1",
        ),
        (
            {"images": [{"id": 1, "file_name": "a", "height": 1, "width": 1}] * 2},
            r"image ids must differ, got 2",
        ),
        ({"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]}, r"category ids must differ, got 2"),
        ({"categories": [{"id": 3, "name": " "}]}, r"the name of a category must be a text that is not empty, got ' '"),
        (
            {"annotations": [{"image_id": [1], "category_id": 3}]},
            r"image_id must be a number or a text, got \[1\]",
        ),
    ],
)
def test_not_in_coco_format(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoFolder(make_folder(tmp_path, **changes))


def test_not_json(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances\.json is not JSON"):
        CocoFolder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": "words"}, r'queries must be "categories", "captions" or "sentences", got \'words\''),
        ({"regions": "points"}, r'regions must be "masks" or "boxes", got \'points\''),
        ({"split": "dev"}, r'split must be "train", "val", "test" or None, got \'dev\''),
        ({"val_share": 0.0}, r"val_share must be in \(0, 1\), got 0\.0"),
        ({"limit": 0}, r"limit must be >= 1 or None, got 0"),
        ({"min_coverage": 0.7}, r"0 <= min_coverage <= max_coverage <= 1 must hold, got 0\.7 and 0\.6"),
        ({"absent_queries": -1}, r"absent_queries must be >= 0, got -1"),
        ({"on_error": "ignore"}, r'on_error must be "raise" or "skip", got \'ignore\''),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoFolder(tmp_path, **arguments)
