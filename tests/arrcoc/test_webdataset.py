"""WebDataset shards: ours read by the library and the library's by us, parts, order, and damaged files."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from arrcoc.data.selection import Selection
from arrcoc.data.skips import Skips
from arrcoc.data.webdataset import find_shards, iterate_shards, stream_shards
from arrcoc.data.writers import write_shards
from data_cases import assert_same, noise, png, rectangle, samples

CUP = rectangle(0, 0, 20, 30)
CUP_PNG = png(Image.fromarray(CUP.numpy()))
PICTURE = png(noise())
BOXED = json.dumps({"text": "cup", "boxes": [[0, 0, 30, 20]]}).encode()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_any_data_set_as_shards(tmp_path: Path) -> None:
    expected = samples(7)
    shards = write_shards(iter(expected), tmp_path, per_shard=3)
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert sorted(tmp_path.iterdir()) == shards
    several = stream_shards(tmp_path / "{000000..000002}.tar")
    for _ in range(2):
        assert_same(several, expected)
    with pytest.raises(FileExistsError, match=r"folder must have no shards in it"):
        write_shards(expected, tmp_path)
    with pytest.raises(ValueError, match=r"samples must hold at least one sample, got none"):
        write_shards([], tmp_path / "empty")
    with pytest.raises(ValueError, match=r"per_shard must be >= 1, got 0"):
        write_shards(expected, tmp_path / "empty", per_shard=0)


def test_a_failing_data_set_leaves_no_half_shard(tmp_path: Path) -> None:
    def failing() -> Any:
        yield from samples(4)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_shards(failing(), tmp_path, per_shard=3)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its files open
def test_the_library_reads_ours_and_we_read_its(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    expected = samples(3)
    (ours,) = write_shards(expected, tmp_path / "ours")
    found = list(wds.WebDataset(str(ours), shardshuffle=False))
    assert [json.loads(one["json"])["name"] for one in found] == [sample.name for sample in expected]
    assert all({"png", "json", "mask0.png", "mask1.png"} <= one.keys() for one in found)

    theirs = tmp_path / "theirs.tar"
    with wds.TarWriter(str(theirs)) as writer:
        line = {"text": "cup", "mask": "cup.png"}
        writer.write({"__key__": "deep/one", "png": PICTURE, "json": line, "cup.png": CUP_PNG, "cls": 3})
        writer.write({"__key__": "deep/two", "jpg": noise(1), "red_cup.mask.png": CUP_PNG})
    several = list(stream_shards(theirs))
    assert [(one.name, one.queries) for one in several] == [("deep/one.png", ("cup",)), ("deep/two.jpg", ("red cup",))]
    for one in several:
        torch.testing.assert_close(one.masks[0], CUP)


def test_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a member was unpickled",))

    shard = write(tmp_path / "a.tar", {"a.png": PICTURE, "a.json": BOXED, "a.pyd": pickle.dumps(Bomb()), "a.pth": b"x"})
    assert [sample.queries for sample in stream_shards(shard)] == [("cup",)]


def test_texts_to_score_only(tmp_path: Path) -> None:
    shard = write(
        tmp_path / "a.tar", {"a.jpg": PICTURE, "a.txt": b" a cup \n", "a.json": b'{"url": 1}', "b.jpg": PICTURE}
    )
    skips = Skips("skip")
    assert [one.queries for one in iterate_shards(shard, texts="txt", skips=skips)] == [{"a cup": None}]
    assert skips.examples["no text"] == [("a.tar/b", "there is no member 'txt', only jpg.")]
    plain = list(iterate_shards(shard, texts="none"))
    assert [(one.name, one.image, one.queries) for one in plain] == [("a.jpg", PICTURE, {}), ("b.jpg", PICTURE, {})]
    with pytest.raises(ValueError, match=r'texts must be "json", "txt" or "none", got \'csv\''):
        iterate_shards(shard, texts="csv")


BROKEN: list[tuple[dict[str, bytes], str, str]] = [
    ({"b.json": BOXED}, r"there must be one picture, got json", "picture missing"),
    ({"b.png": PICTURE, "b.jpg": PICTURE}, r"there must be one picture, got png, jpg", "picture missing"),
    ({"b.png": PICTURE, "b.json": b"{"}, r"the member json is not JSON", "json unreadable"),
    ({"b.png": PICTURE, "b.json": b"[]"}, r"the member json must be a JSON object, got \[\]", "json unreadable"),
    ({"b.png": PICTURE, "b.json": b"\xff"}, r"the member 'json' is not UTF-8", "json unreadable"),
    ({"b.png": PICTURE, "b.json": b'{"image": "x"}'}, r"unknown key 'image'", "bad key"),
    ({"b.png": PICTURE, "b.json": b'{"name": 3}'}, r'"name" must be a text, got 3', "bad value"),
    (
        {"b.png": PICTURE, "b.json": b'{"text": "cup", "mask": "c.png"}'},
        r'"mask" must name a member, got \'c\.png\' among png, json',
        "mask missing",
    ),
    ({"b.png": PICTURE, "b.json": BOXED, "b.cup.mask.png": CUP_PNG}, r"'cup' is asked for twice", "query twice"),
    ({"b.png": PICTURE, "b._.mask.png": CUP_PNG}, r"the query in the name of '_\.mask\.png' is empty", "no text"),
]


@pytest.mark.parametrize(("members", "message", "reason"), BROKEN)
def test_broken_members(tmp_path: Path, members: dict[str, bytes], message: str, reason: str) -> None:
    good = {"a.png": PICTURE, "a.json": BOXED}
    shard = write(tmp_path / "x.tar", {**good, **members, "c.png": PICTURE, "c.json": BOXED})
    with pytest.raises(ValueError, match=rf"^x\.tar/b: {message}"):
        list(stream_shards(shard))
    several = stream_shards(shard, Selection(on_error="skip"))
    assert [sample.name for sample in several] == ["a.png", "c.png"]
    assert several.skips.broken == {reason: 1}


def test_broken_pictures_in_sound_members(tmp_path: Path) -> None:
    shard = write(tmp_path / "x.tar", {"a.png": PICTURE[:2000], "a.json": BOXED, "b.png": PICTURE, "b.json": BOXED})
    with pytest.raises(ValueError, match=r"^a\.png: cannot read the pixels of 2000 bytes"):
        list(stream_shards(shard))
    several = stream_shards(shard, Selection(on_error="skip"))
    assert [sample.name for sample in several] == ["b.png"]
    assert several.skips.broken == {"picture unreadable": 1}


BLOCKS = 512 * (1 + -(-len(PICTURE) // 512))  # that a picture takes in a tar file


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["in a picture", "behind a picture", "in a header", "in a text", "text"])
def test_damaged_shards(tmp_path: Path, damage: str, packed: bool) -> None:
    members = {
        f"{number}.{ending}": content for number in range(3) for ending, content in (("png", PICTURE), ("json", BOXED))
    }
    first, second = (write(tmp_path / name, members) for name in ("0.tar", "1.tar"))
    start = 2 * (BLOCKS + 1024)  # of the third picture
    cuts = {"in a picture": 2000, "behind a picture": BLOCKS, "in a header": BLOCKS + 99, "in a text": BLOCKS + 520}
    cut = first.read_bytes()[: start + cuts.get(damage, 0)]
    cut = b"no archive at all" * 99 if damage == "text" else cut
    first.write_bytes(gzip.compress(cut) if packed else cut)
    with pytest.raises(ValueError, match=r"0\.tar: the shard is damaged: "):
        list(stream_shards([first, second]))
    several = stream_shards([first, second], Selection(on_error="skip"))
    names = [sample.name for sample in several]
    assert names == [*([] if damage == "text" else ["0.png", "1.png"]), "0.png", "1.png", "2.png"]
    assert several.skips.broken == {"shard broken": 1} and not several.skips.left_out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("checksum", "bad checksum"),  # tarfile takes either for the end, and says nothing of what comes after
        ("zeros", "it goes on behind its end"),
        ("one behind the other", "it goes on behind its end"),
    ],
)
def test_what_lies_behind_a_damaged_header_is_not_lost_silently(
    tmp_path: Path, damage: str, message: str, packed: bool
) -> None:
    shard = write(tmp_path / "0.tar", {f"{number}.png": PICTURE for number in range(3)})
    content = bytearray(shard.read_bytes())
    header = content.index(b"2.png")
    if damage == "checksum":
        content[header] ^= 1
    elif damage == "zeros":
        content[header : header + 512] = bytes(512)
    else:
        content = content + content
    shard.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"0\.tar: the shard is damaged: {message}"):
        list(iterate_shards(shard))


def test_members_that_stand_twice_and_links(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name, content in (("a.png", PICTURE), ("a.json", BOXED), ("a.png", CUP_PNG), ("b.png", PICTURE)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/b.png"
        tar.addfile(link)
    skips = Skips("skip")
    assert [record.name for record in iterate_shards(shard, skips=skips)] == ["b.png"]
    assert skips.broken == {"member twice": 1, "member is a link": 1}
    assert skips.examples["member twice"] == [("x.tar/a", "each member must stand there once, got png, json, png.")]
    assert skips.examples["member is a link"] == [("x.tar/c.png", "a link to '/b.png' is not followed.")]


def test_patterns(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{kind}-{number:03d}.tar", {}) for kind in ("a", "b") for number in (8, 9, 10)]
    assert find_shards(tmp_path / "{a,b}-{008..010}.tar") == files
    assert find_shards(f"{tmp_path}/a-*.tar") == find_shards([f"{tmp_path}/a-{{008..010}}.tar"]) == files[:3]
    for pattern in ("a-{008..011}.tar", "c-*.tar", "a-011.tar"):
        with pytest.raises(FileNotFoundError, match=r"there is no shard '.*/(a-011|c-\*)\.tar'"):
            find_shards(tmp_path / pattern)
    with pytest.raises(FileNotFoundError, match=r"there is no shard \[\]"):
        find_shards([])


@pytest.mark.parametrize("num_parts", [2, 5])  # more and fewer shards than parts
def test_parts_see_everything_once(tmp_path: Path, num_parts: int) -> None:
    expected = samples(9)
    write_shards(expected, tmp_path, per_shard=3)
    whole = stream_shards(tmp_path / "*.tar")
    names = [[sample.name for sample in whole.part(number, num_parts)] for number in range(num_parts)]
    assert all(names) and sorted(itertools.chain(*names)) == [sample.name for sample in expected]


def test_parts_count_what_is_broken_once(tmp_path: Path) -> None:
    members = {"a.png": PICTURE, "a.json": BOXED, "b.json": BOXED, "c.png": PICTURE[:99], "c.json": BOXED}
    shard = write(tmp_path / "x.tar", members)
    parts = [stream_shards(shard, Selection(on_error="skip")).part(number, 3) for number in range(3)]
    assert [sample.name for part in parts for sample in part] == ["a.png"]
    assert sum((part.skips.broken for part in parts), Counter()) == {"picture missing": 1, "picture unreadable": 1}


def test_shuffling_moves_whole_shards_too(tmp_path: Path) -> None:
    expected = [sample.name for sample in samples(12)]
    write_shards(samples(12), tmp_path, per_shard=2)
    several = stream_shards(tmp_path / "*.tar", shuffle=2)
    orders = []
    for epoch in range(3):
        several.set_epoch(epoch)
        orders.append([sample.name for sample in several])
        assert orders[-1] == [sample.name for sample in several]
    assert all(sorted(order) == sorted(expected) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # with a buffer of 2 and shards in order, the last picture could not come before the ninth place
    assert any(order.index(expected[-1]) < 8 for order in orders)
