"""The core of all readers: which queries are chosen, what is skipped and counted, samples by number and in a row."""

from __future__ import annotations

import itertools
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arrcoc.data.pictures import decode_picture, picture_size
from arrcoc.data.records import MOST_NAMES, Record, RecordDataset, choose_absent, choose_queries
from arrcoc.data.regions import Region
from arrcoc.data.selection import Selection
from arrcoc.data.skips import ItemError, Skips
from arrcoc.data.splits import split_by_image
from arrcoc.data.streams import RecordStream
from data_cases import HEIGHT, WIDTH, noise, png, rectangle, save

BYTES = png(noise())


def box(*sides: float) -> Region:
    return Region(kind="boxes", value=[list(sides)])


def record(name: str = "one.png", **changes: Any) -> Record:
    queries = {"cup": (box(0, 0, 30, 20),), "plate": (box(30, 0, 30, 10), box(30, 5, 30, 5))}
    return Record(**{"name": name, "image": BYTES, "queries": queries, **changes})


def stream(records: Sequence[Record | ItemError], selection: Selection | None = None, **options: Any) -> RecordStream:
    def read(skips: Skips, part: tuple[int, int], generator: torch.Generator | None) -> Iterator[Record]:
        for item in records[part[0] :: part[1]]:
            if isinstance(item, ItemError):
                skips.add_broken("item", item)
            else:
                yield item

    return RecordStream(read, selection, **options)


# Queries


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_that_of_the_decoded_masks(seed: int) -> None:
    """Limits at exact shares of pixels, regions that overlap and regions that do not."""
    rng = np.random.default_rng(seed)
    queries = {}
    for number in range(60):
        rings = [rng.uniform(-5, 65, 6).tolist() for _ in range(rng.integers(1, 4))]
        boxes = [box(*rng.uniform(0, 40, 2), *rng.uniform(1, 20, 2)) for _ in range(rng.integers(0, 3))]
        queries[str(number)] = (Region(kind="polygons", value=rings), *boxes)
    shares = {
        text: np.logical_or.reduce([region.decode(HEIGHT, WIDTH) for region in regions]).mean()
        for text, regions in queries.items()
    }
    low, high = (float(limit) for limit in np.sort(list(shares.values()))[[15, 45]])
    skips = Skips()
    chosen = choose_queries(
        record(queries=queries), (HEIGHT, WIDTH), Selection(min_coverage=low, max_coverage=high), skips
    )
    assert chosen == tuple(text for text, share in shares.items() if share > 0 and low <= share <= high)
    assert skips.left_out.total() == 60 - len(chosen)
    assert sum(share > high for share in shares.values()) == skips.left_out[f"mask above {high:g} of the picture"]


def test_absent_and_unknown_regions() -> None:
    queries = {"cup": (box(0, 0, 30, 20),), "dog": (), "somewhere": None, "outside": (box(70, 70, 5, 5),)}
    skips = Skips("skip")
    chosen = choose_queries(record(queries=queries), (HEIGHT, WIDTH), Selection(min_coverage=0), skips)
    assert chosen == ("cup", "dog")
    assert skips.broken == {"no region": 1} and skips.left_out == {"mask without a pixel": 1}
    with pytest.raises(ValueError, match=r"^one\.png: 'somewhere' has no region and can only be scored\.$"):
        RecordDataset([record(queries=queries)])


def test_a_synonym_of_what_is_there_is_never_absent(tmp_path: Path) -> None:
    synonyms = tmp_path / "synonyms.json"
    synonyms.write_text('{"couch": ["sofa", "settee"]}')
    one, vocabulary = record(queries={"couch": (box(0, 0, 30, 20),)}), ("sofa", "settees", "cup")
    for path, expected in ((None, ["couch", "cup", "settees", "sofa"]), (str(synonyms), ["couch", "cup"])):
        selection = Selection(absent_queries=3, synonyms=path)
        (by_number,) = RecordDataset([one], selection, vocabulary=vocabulary)
        (in_a_row,) = stream([one], selection, vocabulary=vocabulary)
        assert sorted(by_number.queries) == sorted(in_a_row.queries) == expected
    with pytest.raises(FileNotFoundError, match=r"no-such\.json"):
        RecordDataset([one], Selection(synonyms="no-such.json"))


def test_absent_names_are_never_there() -> None:
    one = record(present=("Spoon",))
    names = ["CUP", "spoon", *(f"name {number}" for number in range(20))]
    chosen = choose_absent(one, names, 5)
    assert len(set(chosen)) == 5 and set(chosen) <= set(names[2:])
    assert choose_absent(one, names[::-1], 5) == chosen
    assert choose_absent(one, names, 0) == () and len(choose_absent(one, names, 99)) == 20
    others = {choose_absent(record(name=str(number)), names, 5) for number in range(10)}
    assert len(others) == 10
    many = [f"name {number}" for number in range(100_000)]
    far = {choose_absent(record(name=str(number)), many, 1)[0] for number in range(20)}
    assert len(far) == 20 and max(int(name.split()[1]) for name in far) > 50_000


# Selection


def test_splits_are_those_of_split_by_image() -> None:
    records = [record(f"{number}.png") for number in range(40)]
    shares = {"train": 1 - 0.2 - 0.3, "val": 0.2, "test": 0.3}
    expected = split_by_image([one.name for one in records], shares, seed=3)
    for split, names in expected.items():
        selection = Selection(split=split, val_share=0.2, test_share=0.3, split_seed=3)
        assert RecordDataset(records, selection).names == tuple(names)
        assert [sample.name for sample in stream(records, selection)] == names
    assert RecordDataset(records, Selection(limit=3)).names == ("0.png", "1.png", "2.png")
    assert len(list(stream(records, Selection(limit=3)))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r'split must be "train", "val", "test" or None, got \'dev\''),
        ({"val_share": 1.0}, r"val_share must be in \(0, 1\), got 1\.0"),
        ({"test_share": 0.8}, r"test_share must be in \[0, 1 - val_share\), got 0\.8"),
        ({"split": "test"}, r'split "test" needs test_share > 0, got 0\.0'),
        ({"limit": 0}, r"limit must be >= 1 or None, got 0"),
        ({"min_coverage": 0.7}, r"0 <= min_coverage <= max_coverage <= 1 must hold, got 0\.7 and 0\.6"),
        ({"absent_queries": -1}, r"absent_queries must be >= 0, got -1"),
        ({"on_error": "ignore"}, r'on_error must be "raise" or "skip", got \'ignore\''),
        ({"check": "all"}, r'check must be "headers" or "pixels", got \'all\''),
    ],
)
def test_wrong_selections(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**arguments)


# Skips


def broken_records(tmp_path: Path) -> list[Record]:
    return [
        record("good.png"),
        record("cut.png", image=BYTES[:2000]),
        record("text.png", image=b"no picture"),
        record("gone.png", image=tmp_path / "gone.png"),
        record("size.png", size=(HEIGHT, WIDTH + 1)),
        record("mask.png", queries={"cup": (Region(kind="mask", value=png(noise(height=9))),)}),
        record("polygon.png", queries={"cup": (Region(kind="polygons", value=[[1, 2]]),)}),
        record("small.png", queries={"cup": (box(0, 0, 1, 1),)}),
        record("bare.png", queries={}),
        record("last.png"),
    ]


BROKEN = {
    "picture unreadable": 2,
    "picture missing": 1,
    "picture of another size": 1,
    "mask of another size": 1,
    "region broken": 1,
}
LEFT_OUT = {"mask below 0.01 of the picture": 1, "picture without a query": 2}


def test_a_stream_counts_everything_anew_in_each_pass(tmp_path: Path) -> None:
    several = stream(
        [*broken_records(tmp_path), ItemError("bad", reason="line unreadable")], Selection(on_error="skip")
    )
    for _ in range(2):
        assert [sample.name for sample in several] == ["good.png", "last.png"]
        assert several.skips.broken == BROKEN | {"line unreadable": 1}
        assert several.skips.left_out == LEFT_OUT


def test_a_data_set_counts_when_it_is_opened(tmp_path: Path) -> None:
    records = broken_records(tmp_path)
    checked = RecordDataset(records, Selection(on_error="skip", check="pixels"))
    assert checked.names == ("good.png", "last.png")
    assert checked.skips.broken == BROKEN and checked.skips.left_out == LEFT_OUT
    by_headers = RecordDataset(records, Selection(on_error="skip"))
    assert by_headers.names == ("good.png", "cut.png", "last.png")
    assert by_headers.skips.broken == BROKEN | {"picture unreadable": 1}
    with pytest.raises(ItemError, match=r"^cut\.png: cannot read the pixels of 2000 bytes"):
        by_headers[1]


def test_a_picture_that_was_replaced_since_is_not_used(tmp_path: Path) -> None:
    path = save(tmp_path / "one.png", noise())
    data = RecordDataset([record(image=path, size=(HEIGHT, WIDTH))])
    save(path, noise(height=HEIGHT + 1))
    with pytest.raises(ItemError, match=r"^one\.png: the picture has \(height, width\) \(41, 60\), annotated is \(40"):
        data[0]


@pytest.mark.parametrize("number", range(1, 7))
def test_broken_items_stop_a_reader_that_was_not_told_to_skip(tmp_path: Path, number: int) -> None:
    one = broken_records(tmp_path)[number]
    with pytest.raises(ValueError, match=rf"^{one.name}: "):
        RecordDataset([one], Selection(check="pixels"))
    with pytest.raises(ValueError, match=rf"^{one.name}: "):
        list(stream([one]))


def test_summary() -> None:
    skips = Skips("skip", num_examples=2)
    assert skips.summary() == "nothing skipped"
    for number in range(5):
        skips.add_broken(f"{number}.png", ItemError(f"error {number}", reason="picture missing"))
    skips.add_broken("any", ItemError("not JSON", reason="line unreadable", name="line 7"))
    skips.add_left_out("9.png", "mask without a pixel", "'cup'")
    assert skips.examples["picture missing"] == [("0.png", "error 0"), ("1.png", "error 1")]
    assert skips.summary().splitlines() == [
        "5 skipped: picture missing (e.g. 0.png: error 0)",
        "1 skipped: line unreadable (e.g. line 7: not JSON)",
        "1 left out: mask without a pixel (e.g. 9.png: 'cup')",
    ]
    assert len(Skips("skip", num_examples=0).examples) == 0
    skips.clear()
    assert skips.summary() == "nothing skipped"
    with pytest.raises(ValueError, match=r"^9\.png: no file$"):
        Skips().add_broken("9.png", ItemError("no file", reason="picture missing"))
    with pytest.raises(ValueError, match=r"num_examples must be >= 0 or None, got -1"):
        Skips(num_examples=-1)
    with pytest.raises(ValueError, match=r'on_error must be "raise" or "skip", got \'warn\''):
        Skips("warn")


# Samples


def test_a_sample_has_the_masks_of_its_queries() -> None:
    one = record(queries={"cup": (box(0, 0, 30, 20),), "plate": (box(30, 0, 30, 10), box(30, 30, 30, 10)), "dog": ()})
    expected = torch.stack([rectangle(0, 0, 20, 30), rectangle(0, 30, 10, 60) | rectangle(30, 30, 40, 60)])
    selection = Selection(absent_queries=1)
    (by_number,) = RecordDataset([one], selection, vocabulary=["cat", "dog"])
    (in_a_row,) = stream([one], selection, vocabulary=["cat", "dog"])
    for sample in (by_number, in_a_row):
        assert sample.queries == ("cup", "plate", "dog", "cat")
        torch.testing.assert_close(sample.masks[:2], expected)
        assert not sample.masks[2:].any()
        np.testing.assert_array_equal((sample.image * 255).round().byte().permute(1, 2, 0).numpy(), np.array(noise()))


def test_absent_queries_come_from_the_texts_of_the_data_set() -> None:
    records = [record(f"{name}.png", queries={name: (box(0, 0, 30, 20),)}) for name in ("cup", "dog", "cat")]
    assert [len(sample.queries) for sample in RecordDataset(records, Selection(absent_queries=5))] == [3, 3, 3]
    # a stream knows only what it has seen
    assert [len(sample.queries) for sample in stream(records, Selection(absent_queries=5))] == [1, 2, 3]
    assert set(RecordDataset(records, Selection(absent_queries=5))[0].queries[1:]) == {"dog", "cat"}


def test_a_stream_keeps_a_limited_number_of_names() -> None:
    records = [
        record(str(number), queries={f"name {number}": (box(0, 0, 30, 20),)}) for number in range(MOST_NAMES + 50)
    ]
    absent = {sample.queries[1] for sample in list(stream(records, Selection(absent_queries=1)))[MOST_NAMES:]}
    assert absent <= {f"name {number}" for number in range(MOST_NAMES)} and len(absent) > 20


def test_rotation_in_exif_is_not_applied_and_transparency_is_white(tmp_path: Path) -> None:
    picture = noise()
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert decode_picture(tmp_path / "turned.png").size == (WIDTH, HEIGHT)
    assert picture_size(tmp_path / "turned.png") == (HEIGHT, WIDTH)
    picture.save(tmp_path / "turned.tiff", exif=exif)
    with pytest.raises(ItemError, match=r"turned\.tiff' is a TIFF that says how to turn it, and Pillow does; save it"):
        picture_size(tmp_path / "turned.tiff")
    picture.save(tmp_path / "plain.tiff")
    assert picture_size(tmp_path / "plain.tiff") == (HEIGHT, WIDTH)
    clear = noise()
    clear.putalpha(0)
    assert np.array(decode_picture(png(clear))).min() == 255
    np.testing.assert_array_equal(np.array(decode_picture(picture)), np.array(picture))


def test_whatever_a_decoder_raises_is_a_broken_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(picture: object) -> None:
        raise RuntimeError("Failed to decode frame 0")  # as AVIF's

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", stumble)
    with pytest.raises(ItemError, match=r"cannot read the pixels of \d+ bytes: Failed to decode frame 0"):
        decode_picture(BYTES)


def test_names_of_any_bytes_are_split_and_printed(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    dataset = RecordDataset([record(name=name)], Selection(split="train"))
    assert dataset.names in ((), (name,))
    skips = Skips("skip")
    skips.add_broken(name, ItemError("gone.", reason="picture missing"))
    assert skips.summary() == "1 skipped: picture missing (e.g. \\udcff.png: gone.)"


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ItemError, match=r"\d+ bytes has more than 1000 pixels and may be a decompression bomb"):
        decode_picture(BYTES)


# Order, parts, memory


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    records = [record(f"{number:03d}") for number in range(30)]

    def order(shuffle: int, seed: int = 0, epoch: int = 0) -> list[str]:
        shuffled = stream(records, shuffle=shuffle, seed=seed)
        shuffled.set_epoch(epoch)
        first = [sample.name for sample in shuffled]
        assert first == [sample.name for sample in shuffled]
        return first

    names = [one.name for one in records]
    assert order(0, epoch=3) == names
    orders = [order(8), order(8, epoch=1), order(8, seed=1), order(100)]
    assert all(sorted(one) == names and one != names for one in orders)
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    # a buffer of 8 lets nothing out more than 8 places early, and something late
    assert all(int(name) - place <= 8 for place, name in enumerate(orders[0]))
    assert any(int(name) < place - 8 for place, name in enumerate(orders[0][:22]))


def test_parts_see_everything_once() -> None:
    whole = stream([record(f"{number:03d}") for number in range(23)])
    ranks = [whole.part(rank, 2) for rank in range(2)]
    parts = [rank.part(worker, 3) for rank in ranks for worker in range(3)]
    names = [[sample.name for sample in part] for part in parts]
    assert sorted(itertools.chain(*names)) == [sample.name for sample in whole]
    assert {len(part) for part in names} <= {3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": -1}, r"shuffle must be >= 0, got -1"),
        ({"part": (2, 2)}, r"part must be \(i, n\) with 0 <= i < n, got \(2, 2\)"),
    ],
)
def test_wrong_streams(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream([], **options)


@pytest.mark.parametrize("num_pictures", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_of_a_stream_is_flat(tmp_path: Path, num_pictures: int) -> None:
    """Shuffled, every tenth broken: no more memory at the end than after 400 pictures."""
    file = save(tmp_path / "tiny.png", noise(height=8, width=8))

    def read(skips: Skips, part: tuple[int, int], generator: torch.Generator | None) -> Iterator[Record]:
        for number in range(num_pictures):
            image = file if number % 10 else tmp_path / f"missing {number}.png"
            yield Record(name=f"{number}.png", image=image, queries={f"text {number}": (box(0, 0, 4, 4),)})

    several = RecordStream(read, Selection(on_error="skip"), shuffle=50)
    try:
        count = 0
        for count, _ in enumerate(several, start=1):
            if count == 400:  # the buffer and the examples of skips are full
                tracemalloc.start()
        grown = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 0.9 * num_pictures and several.skips.broken == {"picture missing": num_pictures // 10}
    assert grown < 150_000
