"""One door for every kind of data set: load_data by a short text, its options, and what it says to a wrong one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arrcoc.assets import asset_path
from arrcoc.data.coco import CocoFolder
from arrcoc.data.photos import sample_photos
from arrcoc.data.spec import DataConfig, load_data
from arrcoc.data.streams import RecordStream
from arrcoc.data.writers import write_manifest, write_shards
from data_cases import assert_same, noise, rectangle, samples, save

PHOTOS = DataConfig(min_coverage=0.005, max_coverage=0.8)


def test_the_photos_by_every_way(tmp_path: Path) -> None:
    """The sample photos, converted to every kind, are the sample photos."""
    photos = list(sample_photos(absent_queries=2))
    manifest = write_manifest(photos, tmp_path / "manifest")
    write_shards(photos, tmp_path / "shards", per_shard=3)
    for sample in photos:
        for query, mask in zip(sample.queries, sample.masks, strict=True):
            if mask.any():
                save(tmp_path / "folder" / "masks" / query.replace(" ", "_") / f"{Path(sample.name).stem}.png", mask)
        (tmp_path / "folder" / "images").mkdir(exist_ok=True)
        original = asset_path("photos") / "images" / sample.name
        (tmp_path / "folder" / "images" / sample.name).write_bytes(original.read_bytes())

    assert_same(load_data(f"coco:{asset_path('photos')}", replace(PHOTOS, absent_queries=2)), photos)
    assert_same(load_data(f"folder:{tmp_path}/folder", PHOTOS), list(sample_photos()))
    assert_same(load_data(f"manifest:{manifest}", PHOTOS), photos)
    in_a_row = load_data(f"manifest:{manifest}", replace(PHOTOS, stream=True))
    shards = load_data(f"shards:{tmp_path}/shards/{{000000..000001}}.tar", PHOTOS)
    for several in (in_a_row, shards):
        assert isinstance(several, RecordStream)
        assert_same(several, photos)


def test_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = str(save(tmp_path / "one.png", noise()))
    data = datasets.Dataset.from_dict({"photo": [file] * 2, "text": ["cup"] * 2, "boxes": [[[0, 0, 30, 20]]] * 2})
    datasets.disable_progress_bars()
    data.save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(columns="image = photo,text=text")
    spec = f"hf:{tmp_path}/saved"
    by_number = load_data(spec, config)
    assert by_number.names == ("00000000", "00000001")
    in_a_row = load_data(spec, replace(config, stream=True, shuffle=5))
    assert isinstance(in_a_row, RecordStream) and len(list(in_a_row)) == 2
    with pytest.raises(ValueError, match=r"columns\['image'\] must be one of photo, text, boxes, got 'picture'"):
        load_data(spec, DataConfig(columns="image=picture"))


def test_splits_and_options_reach_every_kind(tmp_path: Path) -> None:
    manifest = write_manifest(samples(20), tmp_path / "manifest")
    write_shards(samples(20), tmp_path / "shards")
    config = DataConfig(val_share=0.3, test_share=0.3, split_seed=1, absent_queries=1, limit=4)
    names = {split: load_data(f"manifest:{manifest}", config, split=split).names for split in ("train", "val", "test")}
    assert len(set().union(*names.values())) == sum(map(len, names.values())) >= 10
    for split in names:
        shards = load_data(f"shards:{tmp_path}/shards/*.tar", config, split=split)
        assert tuple(sample.name for sample in shards) == names[split]
    seen = [
        sample.name for sample in load_data(f"manifest:{manifest}", replace(config, stream=True, shuffle=9, limit=None))
    ]
    assert sorted(seen) == sorted(sample.name for sample in samples(20)) != seen
    with pytest.raises(FileNotFoundError, match=r"no captions file"):
        load_data(f"coco:{asset_path('photos')}", DataConfig(queries="captions"))
    boxes = load_data(f"coco:{asset_path('photos')}", DataConfig(regions="boxes", max_coverage=1))
    assert isinstance(boxes, CocoFolder) and boxes[0].masks.sum() > sample_photos()[0].masks.sum()


def test_scenes() -> None:
    config = DataConfig(num=10, seed=3, val_share=0.3, test_share=0.1)
    sizes = {split: len(load_data("scenes", config, split=split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 10, "val": 3, "test": 1}
    assert load_data("scenes", config)[0].name == "scene-train-3-000000"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("sceens", "'scenes'"),
        ("coco", "'coco:PATH'"),
        ("hff:x", "'hf:x'"),
        ("manifests:x", "'manifest:x'"),
        ("scenes:5", "'scenes'"),
        ("FOLDER/masked", "'folder:FOLDER/masked'"),
        ("FOLDER/annotated", "'coco:FOLDER/annotated'"),
        ("FOLDER/saved", "'hf:FOLDER/saved'"),
        ("FOLDER/lines.jsonl", "'manifest:FOLDER/lines.jsonl'"),
        ("FOLDER/0.tar", "'shards:FOLDER/0.tar'"),
    ],
)
def test_what_may_have_been_meant(tmp_path: Path, spec: str, hint: str) -> None:
    for name in ("masked/images", "masked/masks", "annotated/images", "saved"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "saved" / "data.png", rectangle(0, 0, 1, 1)).rename(tmp_path / "saved" / "data.arrow")
    spec, hint = (text.replace("FOLDER", str(tmp_path)) for text in (spec, hint))
    with pytest.raises(
        ValueError, match=r"data must be one of scenes, coco:PATH, folder:PATH, manifest:PATH, "
    ) as caught:
        load_data(spec)
    assert str(caught.value).endswith(f"got {spec!r}. Did you mean {hint}?")


def test_nothing_like_it() -> None:
    with pytest.raises(ValueError, match=r"shards:PATTERN, got 'zebra'\.$"):
        load_data("zebra")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": "words"}, r"queries must be one of categories, captions, sentences, got 'words'"),
        ({"regions": "points"}, r"regions must be one of masks, boxes, got 'points'"),
        ({"num": 0}, r"num must be >= 1, got 0"),
        ({"shuffle": -1}, r"shuffle must be >= 0, got -1"),
        ({"seed": -1}, r"seed must be >= 0, got -1"),
        ({"columns": "image"}, r'columns must be like "image=photo,text=caption", got \'image\''),
        ({"limit": 0}, r"limit must be >= 1 or None, got 0"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**arguments)
