"""Files, folders and manifests as one stream of pictures, in an order that stays."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from arrcoc.data.records import Record
from arrcoc.scoring import read_inputs
from arrcoc.scoring.inputs import BrokenInput, kind_of
from scoring_cases import draw, write_pictures


def test_a_folder_is_read_with_its_folders_in_the_order_of_paths(tmp_path: Path) -> None:
    names = ["b.JPG", "a/z.png", "a/b/c.webp", "a.png", "c.tif", "a/y.jpeg"]
    others = [".hidden.png", ".thumbs/a.png", "a/notes.txt", "run.json", "a/._z.png"]
    for name in [*names, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    expected = sorted(tmp_path / name for name in [*names, "link.png"])
    records = list(read_inputs(tmp_path))
    assert [record.name for record in records] == [str(path) for path in expected]
    assert all(isinstance(record, Record) and dict(record.queries) == {} for record in records)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"folder '.*' holds no picture \(\.bmp, \.gif, "):
        list(read_inputs([tmp_path]))


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    named = {"a.jsonl": "manifest", "a.NDJSON": "manifest", "a.tar": "shard", "a.png": "picture", "a": "picture"}
    assert {name: kind_of(tmp_path / name) for name in named} == named
    assert kind_of(tmp_path / "folder.tar") == "folder"


def test_inputs_follow_each_other_and_keep_their_queries(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures", 3)
    lines = [{"image": "pictures/001.png", "text": "red"}, {"image": "pictures/000.png", "queries": [{"text": "blue"}]}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = Record(name="own", image=draw(0, (8, 8)), queries={"green": None})
    stream = [
        record for record in read_inputs([str(paths[2]), manifest, own, paths[0].parent]) if isinstance(record, Record)
    ]
    names = [str(paths[2]), "pictures/001.png", "pictures/000.png", "own", *map(str, paths)]
    assert [record.name for record in stream] == names
    assert [tuple(record.queries) for record in stream] == [(), ("red",), ("blue",), ("green",), (), (), ()]
    assert [record.image for record in stream[1:3]] == [paths[1], paths[0]]


def test_broken_lines_stop_or_are_handed_out(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"image": "a.png", "text": "red"}\n{"image"\n{"image": "b.png", "txt": "red"}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: the line is not JSON"):
        list(read_inputs(manifest))
    stream = list(read_inputs(manifest, on_error="skip"))
    broken = [entry for entry in stream if isinstance(entry, BrokenInput)]
    assert [entry.name for entry in broken] == ["m.jsonl, line 2", "m.jsonl, line 3"]
    assert [entry.error.reason for entry in broken] == ["line unreadable", "bad key"]
    assert [entry.name for entry in stream if isinstance(entry, Record)] == ["a.png"]


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_shards(tmp_path: Path) -> None:
    file = io.BytesIO()
    draw(0, (8, 8)).save(file, "png")
    members = {"a.png": file.getvalue(), "a.json": b'{"text": "red"}', "a.txt": b"blue"}
    write_shard(tmp_path / "00.tar", members | {"b.json": b"{}"})
    write_shard(tmp_path / "01.tar", {"c.png": file.getvalue(), "c.json": b'{"width": 8}', "c.txt": b"green"})
    both = str(tmp_path / "{00..01}.tar")
    assert kind_of(both) == "shard"
    with pytest.raises(ValueError, match=r"00\.tar/b: there must be one picture, got json"):
        list(read_inputs(both))
    for texts, expected, lost in (
        ("json", [("red",)], ["00.tar/b", "01.tar/c"]),
        ("txt", [("blue",), ("green",)], ["00.tar/b"]),
        ("none", [(), ()], ["00.tar/b"]),
    ):
        stream = list(read_inputs(both, on_error="skip", shard_texts=texts))
        records = [entry for entry in stream if isinstance(entry, Record)]
        assert [tuple(record.queries) for record in records] == expected
        assert all(record.image == file.getvalue() for record in records)
        assert [entry.name for entry in stream if isinstance(entry, BrokenInput)] == lost


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"m\.jsonl"):
        list(read_inputs(tmp_path / "m.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"s\.tar"):
        list(read_inputs(tmp_path / "s.tar"))
