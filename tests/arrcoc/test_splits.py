"""Splits by image, and the file that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arrcoc.data.splits import Splits, read_splits, split_by_image, write_splits

SHARES = {"train": 0.7, "val": 0.2, "test": 0.1}
NAMES = [f"{number:04d}.jpg" for number in range(2000)]


def test_shares_are_met_and_every_picture_has_one_place() -> None:
    splits = Splits.of(NAMES + NAMES[:10], SHARES, seed=3)
    assert {name for part in splits.names.values() for name in part} == set(NAMES)
    assert sum(map(len, splits.names.values())) == len(NAMES)
    for split, share in SHARES.items():
        assert abs(len(splits.names[split]) / len(NAMES) - share) < 0.04  # 4 standard deviations
    assert splits.names != Splits.of(NAMES, SHARES, seed=4).names


def test_a_grown_data_set_keeps_its_splits_in_a_new_run() -> None:
    before, after = (split_by_image(names, SHARES) for names in (NAMES[::2], NAMES))
    for split in SHARES:
        assert set(before[split]) <= set(after[split])


def test_read_back_from_a_run_they_are_the_same_even_if_the_data_set_has_grown(tmp_path: Path) -> None:
    path = tmp_path / "run" / "splits.json"
    write_splits(path, Splits.of(NAMES[:50], SHARES, seed=3))
    splits = read_splits(path)
    assert splits == Splits.of(NAMES[:50], SHARES, seed=3)
    numbers = splits.indices(NAMES[::-1])
    assert {split: sorted(NAMES[::-1][n] for n in part) for split, part in numbers.items()} == {
        split: sorted(part) for split, part in splits.names.items()
    }
    assert all(part == sorted(part) for part in numbers.values())
    assert [path.name for path in path.parent.iterdir()] == ["splits.json"]


def test_samples_of_one_picture_stay_together() -> None:
    splits = Splits.of(["a", "b", "a", "c"], {"train": 0.5, "val": 0.5}, seed=1)
    numbers = splits.indices(["a", "a", "b", "c"])
    assert any({0, 1} <= set(part) for part in numbers.values())


def test_mismatches_are_reported(tmp_path: Path) -> None:
    splits = Splits.of(NAMES[:50], SHARES, seed=3)
    with pytest.raises(
        ValueError, match=r"must hold the 50 pictures that were split, 5 are gone: 0000.jpg, .*, \.\.\."
    ):
        splits.indices(NAMES[5:])
    splits.check_same(3, dict(SHARES))
    with pytest.raises(ValueError, match="the splits were made with seed 3, got 4: use the same, or a new run"):
        splits.check_same(4, SHARES)
    with pytest.raises(ValueError, match=r"the splits were made with shares .*, got \{'train': 1.0\}"):
        splits.check_same(3, {"train": 1.0})
    with pytest.raises(ValueError, match="shares must be > 0 and sum to 1"):
        Splits.of(NAMES, {"train": 0.5, "val": 0.4})


def test_damaged_and_edited_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    with pytest.raises(FileNotFoundError, match=r"splits\.json"):
        read_splits(path)
    write_splits(path, Splits.of(NAMES[:50], SHARES))
    stored = json.loads(path.read_text())
    moved = stored["names"]["train"].pop()
    stored["names"]["val"].append(moved)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"splits.json was changed after it was written"):
        read_splits(path)
    del stored["seed"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"splits.json is damaged: KeyError\('seed'\)"):
        read_splits(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be a file of splits of format 'arrcoc-splits-1'"):
        read_splits(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"splits.json is not JSON"):
        read_splits(path)
