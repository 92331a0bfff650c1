"""Manifests: every form of a line, united lines, broken lines by number, and the round trip of any data set."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from arrcoc.data.manifest import ManifestDataset, ManifestRecords, read_manifest, stream_manifest
from arrcoc.data.selection import Selection
from arrcoc.data.skips import Skips
from arrcoc.data.writers import write_manifest
from data_cases import HEIGHT, WIDTH, assert_same, noise, rectangle, samples, save

TRUTH = rectangle(5, 10, 25, 40)
BOX = [10, 5, 30, 20]
RUNS = {"size": [HEIGHT, WIDTH], "counts": [405, *[20, 20] * 29, 20, 815]}


def write(folder: Path, *lines: Any) -> Path:
    """A manifest beside two pictures and a mask."""
    for number, name in enumerate(("a.png", "b.png")):
        save(folder / "images" / name, noise(number))
    save(folder / "mask.png", TRUTH)
    path = folder / "manifest.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


@pytest.mark.parametrize(
    "region",
    [
        {"mask": "mask.png"},
        {"boxes": [BOX]},
        {"polygons": [[10, 5, 40, 5, 40, 25, 10, 25]]},
        {"rle": RUNS},
        {"rle": [RUNS, RUNS]},
        {"boxes": [[10, 5, 15, 20]], "polygons": [[25, 5, 40, 5, 40, 25, 25, 25]], "mask": None},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_every_form_of_a_region(tmp_path: Path, region: dict[str, Any], nested: bool) -> None:
    query = {"text": " a red cup ", **region}
    path = write(
        tmp_path, {"image": "images/a.png", "meta": {"licence": "any"}, **({"queries": [query]} if nested else query)}
    )
    (sample,) = ManifestDataset(path)
    assert (sample.name, sample.queries) == ("images/a.png", ("a red cup",))
    torch.testing.assert_close(sample.masks[0], TRUTH)
    assert_same(stream_manifest(path), [sample])


def test_lines_of_a_picture_are_united(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"image": "images/b.png", "text": "cup", "boxes": [BOX], "name": "second"},
        b"",
        {"image": "images/a.png", "text": "plate", "boxes": [BOX]},
        {"image": "images/b.png", "queries": [{"text": "dog", "absent": True}, {"text": "fork", "boxes": [BOX]}]},
        {"image": "images/b.png"},
    )
    records = list(read_manifest(path))
    assert [record.name for record in records] == ["second", "images/a.png"]
    assert [list(record.queries) for record in records] == [["cup", "dog", "fork"], ["plate"]]
    assert [sample.queries for sample in ManifestDataset(path)] == [("cup", "dog", "fork"), ("plate",)]
    assert not ManifestDataset(path)[0].masks[1].any()


def test_a_picture_is_one_however_its_path_is_written(tmp_path: Path) -> None:
    paths = ("images/a.png", "./images/a.png", "images/../images//a.png")
    path = write(tmp_path, *({"image": image, "text": image, "boxes": [BOX]} for image in paths))
    (sample,) = ManifestDataset(path)
    assert (sample.name, sample.queries) == ("images/a.png", paths)


def test_a_picture_with_a_broken_line_is_not_used(tmp_path: Path) -> None:
    """Its other queries would be right, but what the line is about might be asked for as absent."""
    path = write(
        tmp_path,
        {"image": "images/a.png", "text": "cup", "boxes": [BOX]},
        {"image": "images/b.png", "text": "dog", "boxes": [BOX]},
        {"image": "images/a.png", "text": "dog", "boxes": []},
        b"no JSON",
    )
    selection = Selection(on_error="skip", absent_queries=1)
    for found in (ManifestDataset(path, selection), stream_manifest(path, selection)):
        assert [sample.name for sample in found] == ["images/b.png"]
        assert found.skips.broken == {"region broken": 1, "line unreadable": 1}


def test_parts_count_what_is_broken_once(tmp_path: Path) -> None:
    line = {"text": "cup", "boxes": [BOX]}
    path = write(tmp_path, b"no JSON", *({"image": f"images/{name}.png", **line} for name in ("a", "gone", "b")))
    parts = [stream_manifest(path, Selection(on_error="skip")).part(number, 3) for number in range(3)]
    assert sorted(sample.name for part in parts for sample in part) == ["images/a.png", "images/b.png"]
    broken = sum((part.skips.broken for part in parts), Counter())
    assert broken == {"line unreadable": 1, "picture missing": 1}


def test_pictures_to_score_only(tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "images/a.png", "text": "cup"}, {"image": "images/b.png"})
    first, second = read_manifest(path)
    assert first.queries == {"cup": None} and second.queries == {}
    assert first.image == tmp_path / "images" / "a.png"
    with pytest.raises(ValueError, match=r"^images/a\.png: 'cup' has no region and can only be scored"):
        ManifestDataset(path)
    skipping = ManifestDataset(path, Selection(on_error="skip"))
    assert len(skipping) == 0 and skipping.skips.broken == {"no region": 1}


BROKEN: list[tuple[Any, str, str]] = [
    (b'{"image": "\xff"}', r"the line is not UTF-8: ", "line unreadable"),
    (b'{"image": "a"', r"the line is not JSON: Expecting", "line unreadable"),
    (b"9" * 5000, r"the line cannot be read: Exceeds the limit", "line unreadable"),
    (b"[" * 100_000, r"the line cannot be read: ", "line unreadable"),
    ([1], r"the line must be a JSON object, got \[1\]", "line unreadable"),
    (b'{"image": "a", "text": "b", "text": "c"}', r"each key must stand there once, got image, text, text", "bad key"),
    ({"text": "cup"}, r'"image" must be a text that is not empty, got None', "bad value"),
    ({"image": "a", "name": ""}, r'"name" must be a text that is not empty, got \'\'', "bad value"),
    ({"image": "a", "txt": "cup"}, r"unknown key 'txt'; did you mean \"text\"\?", "bad key"),
    ({"image": "a", "zebra": 1}, r"unknown key 'zebra'; known keys are image, name", "bad key"),
    ({"image": "a", "queries": [{"text": "cup", "box": []}]}, r"unknown key 'box'; did you mean \"boxes\"", "bad key"),
    ({"image": "a", "queries": [], "text": "b"}, r'"text" must stand inside "queries", not beside it', "bad key"),
    ({"image": "a", "queries": "cup"}, r'"queries" must be a list of \{"text": \.\.\.\}, got \'cup\'', "bad value"),
    ({"image": "a", "text": "  "}, r'"text" must be a text that is not empty, got \'  \'', "no text"),
    ({"image": "a", "boxes": [BOX]}, r'"text" must be a text that is not empty, got None', "no text"),
    ({"image": "a", "queries": [{"text": "b"}, {"text": "b "}]}, r"'b' is asked for twice", "query twice"),
    (
        {"image": "a", "text": "b", "boxes": []},
        r'"boxes" must not be empty, got \[\]; .*"absent": true',
        "region broken",
    ),
    ({"image": "a", "text": "b", "rle": "0P"}, r'"rle" must not be empty, got \'0P\'', "region broken"),
    ({"image": "a", "text": "b", "mask": 3}, r'"mask" must be the path of a picture, got 3', "bad value"),
    ({"image": "a", "text": "b", "absent": "yes"}, r'"absent" must be true or false, got \'yes\'', "bad value"),
    ({"image": "a", "text": "b", "absent": True, "boxes": [BOX]}, r'"absent": true and "boxes" exclude', "bad value"),
]


@pytest.mark.parametrize(("line", "message", "reason"), BROKEN)
def test_broken_lines(tmp_path: Path, line: Any, message: str, reason: str) -> None:
    good = {"image": "images/a.png", "text": "cup", "boxes": [BOX]}
    path = write(tmp_path, good, b"", line)
    for reader in (ManifestDataset, read_manifest, lambda path: list(stream_manifest(path))):
        with pytest.raises(ValueError, match=rf"^manifest\.jsonl, line 3: {message}"):
            reader(path)
    skipping = Selection(on_error="skip")
    for rest in (ManifestDataset(path, skipping), stream_manifest(path, skipping)):
        assert [sample.name for sample in rest] == ["images/a.png"]
        assert rest.skips.broken == {reason: 1}


def test_lines_that_contradict_each_other(tmp_path: Path) -> None:
    line = {"image": "images/a.png", "text": "cup", "boxes": [BOX]}
    path = write(tmp_path, line, {"image": "images/b.png", "text": "cup", "boxes": [BOX]}, line)
    with pytest.raises(ValueError, match=r"^manifest\.jsonl, line 3: 'cup' is asked for twice; give all its regions"):
        ManifestDataset(path)
    skips = Skips("skip")
    assert [record.name for record in read_manifest(path, skips=skips)] == ["images/b.png"]
    assert skips.broken == {"query twice": 1}
    path = write(tmp_path, {**line, "name": "x"}, {"image": "images/a.png", "name": "y"})
    with pytest.raises(ValueError, match=r"line 2: \"name\" must be the same on all lines of 'images/a\.png', got 'y'"):
        ManifestDataset(path)


def test_broken_items_behind_sound_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"image": "gone.png", "text": "cup", "boxes": [BOX]},
        {"image": "images/a.png", "text": "cup", "mask": "gone.png"},
        {"image": "images/b.png", "text": "cup", "polygons": [[1, 2, 3]]},
    )
    selection = Selection(on_error="skip")
    expected = {"picture missing": 1, "mask missing": 1, "region broken": 1}
    assert ManifestDataset(path, selection).skips.broken == expected
    several = stream_manifest(path, selection)
    assert list(several) == [] and several.skips.broken == expected
    with pytest.raises(ValueError, match=r"^gone\.png: .*No such file"):
        ManifestDataset(path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no manifest '.*nowhere\.jsonl'"):
        read_manifest(tmp_path / "nowhere.jsonl")


def test_any_data_set_as_a_manifest(tmp_path: Path) -> None:
    expected = samples()
    path = write_manifest(iter(expected), tmp_path / "new")
    assert_same(ManifestDataset(path), expected)
    assert_same(stream_manifest(path), expected)
    with pytest.raises(FileExistsError, match=r"folder must have no manifest in it, got '.*new'"):
        write_manifest(expected, tmp_path / "new")
    with pytest.raises(ValueError, match=r"samples must hold at least one sample, got none"):
        write_manifest([], tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_memory_of_long_paths(tmp_path: Path) -> None:
    """Paths are not kept while a manifest is looked through."""
    path = write(tmp_path, *({"image": f"{number:0200d}.png"} for number in range(5000)))
    tracemalloc.start()
    try:
        assert len(ManifestRecords(path, Skips())) == 5000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5000 * 150


def test_memory_of_reading_a_manifest(tmp_path: Path) -> None:
    """A long manifest takes a small part of its size."""
    line = {"queries": [{"text": f"a thing of number {number}", "boxes": [BOX] * 9} for number in range(5)]}
    path = write(tmp_path, *({"image": f"{number}.png", **line} for number in range(1000)))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_manifest(path)) == 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 4
