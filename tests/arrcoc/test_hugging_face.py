"""Data sets of the library datasets: columns, pictures undecoded, in a row and by number, broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from arrcoc.data.hugging_face import HuggingFaceDataset, open_hugging_face, stream_hugging_face
from arrcoc.data.selection import Selection
from data_cases import HEIGHT, WIDTH, noise, png, rectangle, save

datasets = pytest.importorskip("datasets")

TRUTH = rectangle(5, 10, 25, 40)
MASK = Image.fromarray(TRUTH.numpy())
BOX = [10, 5, 30, 20]
FEATURES = {"image": datasets.Image(), "mask": datasets.Image()}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(**columns: list[Any]) -> Any:
    made = datasets.Dataset.from_dict(columns)
    for name, feature in FEATURES.items():
        if name in columns:
            made = made.cast_column(name, feature)
    return made


def both(data: Any, selection: Selection | None = None, **options: Any) -> list[Any]:
    """By number and in a row; the two must agree."""
    by_number = HuggingFaceDataset(data, selection, **options)
    in_a_row = stream_hugging_face(data.to_iterable_dataset(), selection, **options)
    listed = list(in_a_row)
    assert [(one.name, one.queries) for one in by_number] == [(one.name, one.queries) for one in listed]
    for one, other in zip(by_number, listed, strict=True):
        torch.testing.assert_close(one.masks, other.masks)
    assert by_number.skips.broken == in_a_row.skips.broken
    return [by_number, in_a_row]


@pytest.mark.parametrize(
    "region",
    [
        {"mask": [{"bytes": png(MASK), "path": None}]},
        {"boxes": [[BOX]]},
        {"polygons": [[[10, 5, 40, 5, 40, 25, 10, 25]]]},
        {"rle": [{"size": [HEIGHT, WIDTH], "counts": [405, *[20, 20] * 29, 20, 815]}]},
    ],
)
def test_every_kind_of_column(region: dict[str, Any]) -> None:
    data = table(image=[{"bytes": png(noise()), "path": None}], text=["a red cup"], licence=["any"], **region)
    (sample,) = both(data)[0]
    assert (sample.name, sample.queries) == ("00000000", ("a red cup",))
    torch.testing.assert_close(sample.masks[0], TRUTH)
    pixels = (sample.image * 255).round().byte().permute(1, 2, 0)
    np.testing.assert_array_equal(pixels.numpy(), np.array(noise()))


def test_named_columns_paths_and_class_labels(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict(
        {
            "photo": [str(save(tmp_path / "one.png", noise())), str(save(tmp_path / "two.png", noise(1)))],
            "label": [1, 0],
            "where": [[BOX], [BOX]],
            "file": [0, None],
        }
    ).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    columns = {"image": "photo", "text": "label", "boxes": "where", "name": "file"}
    by_number, _ = both(data, columns=columns)
    assert [(one.name, one.queries) for one in by_number] == [("0", ("dog",)), ("00000001", ("cat",))]
    with_absent, _ = both(data, Selection(absent_queries=1), columns=columns, vocabulary=["cat", "dog"])
    assert [one.queries for one in with_absent] == [("dog", "cat"), ("cat", "dog")]


def test_a_label_that_is_none_is_no_text() -> None:
    """-1 is what the library's data sets say where there is no label."""
    picture = {"bytes": png(noise()), "path": None}
    data = datasets.Dataset.from_dict({"image": [picture] * 2, "text": [-1, 0], "boxes": [[BOX]] * 2})
    data = data.cast_column("text", datasets.ClassLabel(names=["cat", "dog"]))
    by_number, in_a_row = both(data, Selection(on_error="skip"))
    assert by_number.names == ("00000001",) and in_a_row.skips.broken == {"no label": 1}
    with pytest.raises(ValueError, match=r"^row 0: the class label in 'text' must be in \[0, 2\), got -1"):
        HuggingFaceDataset(data)


def test_several_queries_a_row(tmp_path: Path) -> None:
    cup = {"text": "cup", "boxes": [BOX]}
    queries = [[cup, {"text": "dog", "boxes": None, "absent": True}], [cup]]
    data = table(image=[{"bytes": png(noise()), "path": None}] * 2, queries=queries)
    data.save_to_disk(str(tmp_path / "saved"))
    stored = open_hugging_face(str(tmp_path / "saved"), "train")
    assert [one.queries for one in both(stored)[0]] == [("cup", "dog"), ("cup",)]
    datasets.DatasetDict({"part": data}).save_to_disk(str(tmp_path / "parts"))
    streamed = open_hugging_face(str(tmp_path / "parts"), "part", stream=True)
    assert [one.queries for one in stream_hugging_face(streamed)] == [("cup", "dog"), ("cup",)]
    with pytest.raises(ValueError, match=r"parts must have the split 'train', got part"):
        open_hugging_face(str(tmp_path / "parts"), "train")


def test_a_folder_of_pictures_is_opened_by_the_library(tmp_path: Path) -> None:
    save(tmp_path / "data" / "one.png", noise())
    line = {"file_name": "one.png", "text": "cup", "boxes": [BOX]}
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps(line))
    found = open_hugging_face(str(tmp_path / "data"), "train", stream=True)
    (sample,) = stream_hugging_face(found)
    assert sample.queries == ("cup",)
    torch.testing.assert_close(sample.masks[0], TRUTH)


def test_broken_rows(tmp_path: Path) -> None:
    picture = {"bytes": png(noise()), "path": None}
    data = table(
        image=[
            picture,
            {"bytes": b"no picture", "path": None},
            None,
            {"bytes": None, "path": "gone.png"},
            picture,
            picture,
            picture,
        ],
        text=["cup", "cup", "cup", "cup", "", "cup", "cup"],
        boxes=[[BOX], [BOX], [BOX], [BOX], [BOX], [[1, 2, 3]], None],
    )
    by_number, in_a_row = both(data, Selection(on_error="skip"))
    assert by_number.names == ("00000000",)
    assert in_a_row.skips.broken == {
        "picture unreadable": 1,
        "picture missing": 2,
        "no text": 1,
        "region broken": 1,
        "no region": 1,
    }
    with pytest.raises(ValueError, match=r"^row 0: \"text\" must be a text that is not empty, got ''"):
        HuggingFaceDataset(data.select([4]))
    with pytest.raises(ValueError, match=r"^row 0: a picture must be stored as a picture, bytes or a path, got None"):
        list(stream_hugging_face(data.select([2]).to_iterable_dataset()))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"imag": "photo"}, r"columns has the unknown key 'imag'; did you mean 'image'\?"),
        ({"zebra": "photo"}, r"columns has the unknown key 'zebra'; known are image, name"),
        ({"image": "foto"}, r"columns\['image'\] must be one of photo, text, got 'foto'"),
        ({}, r'columns must say which of photo, text is the "image"'),
    ],
)
def test_wrong_columns(columns: dict[str, str], message: str) -> None:
    data = datasets.Dataset.from_dict({"photo": [b""], "text": ["cup"]})
    with pytest.raises(ValueError, match=message):
        HuggingFaceDataset(data, columns=columns)


def test_parts_and_order() -> None:
    data = table(image=[{"bytes": png(noise()), "path": None}] * 9, text=["cup"] * 9, boxes=[[BOX]] * 9)
    whole = stream_hugging_face(data.to_iterable_dataset(), shuffle=4)
    names = [[sample.name for sample in whole.part(number, 2)] for number in range(2)]
    assert sorted(names[0] + names[1]) == [f"{number:08d}" for number in range(9)]
    assert [len(part) for part in names] == [5, 4] and names[0] != sorted(names[0])


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf data sets need the library datasets: pip install 'arrcoc\[datasets\]'"):
        open_hugging_face("any", "train")
