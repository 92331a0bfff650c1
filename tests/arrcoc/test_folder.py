"""Folders of pictures and masks: the layout, and everything in it that can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arrcoc.data.folder import FolderDataset
from arrcoc.data.selection import Selection
from data_cases import HEIGHT, noise, rectangle, save

CUP, PLATE = rectangle(0, 0, 20, 30), rectangle(20, 10, 35, 40)


def make_folder(root: Path) -> Path:
    """A cup and a plate in the first picture, a plate in the second, nothing in the third."""
    save(root / "images" / "one.png", noise(0))
    save(root / "images" / "deep" / "two.b.jpg", noise(1))
    save(root / "images" / "three.JPEG", noise(2))
    save(root / "masks" / "red_cup" / "one.png", CUP)
    save(root / "masks" / "plate" / "one.png", PLATE)
    save(root / "masks" / "plate" / "deep" / "two.b.png", CUP)
    (root / "images" / ".hidden").write_text("")
    (root / "masks" / ".hidden").write_text("")
    return root


def test_folders_of_masks_are_queries(tmp_path: Path) -> None:
    folder = FolderDataset(make_folder(tmp_path))
    assert [(sample.name, sample.queries) for sample in folder] == [
        ("deep/two.b.jpg", ("plate",)),
        ("one.png", ("plate", "red cup")),
    ]
    assert folder.names == ("deep/two.b.jpg", "one.png")
    torch.testing.assert_close(folder[0].masks[0], CUP)
    torch.testing.assert_close(folder[1].masks, torch.stack([PLATE, CUP]))
    assert folder.skips.left_out == {"picture without a query": 1}
    assert folder.skips.summary() == "1 left out: picture without a query (e.g. three.JPEG: 0 texts)"
    assert FolderDataset(tmp_path, Selection(absent_queries=1))[0].queries == ("plate", "red cup")
    assert FolderDataset(tmp_path, Selection(absent_queries=1), vocabulary=["sofa"])[1].queries[-1] == "sofa"


@pytest.mark.parametrize(
    ("file", "name", "message", "reason"),
    [
        (
            "masks/plate/four.png",
            "masks/plate/four.png",
            r"the mask has no picture of its name",
            "mask without a picture",
        ),
        ("masks/plate/one.jpg", "masks/plate/one.jpg", r"a mask must be masks/QUERY/NAME\.png", "mask misplaced"),
        ("masks/one.png", "masks/one.png", r"a mask must be masks/QUERY/NAME\.png", "mask misplaced"),
        ("masks/_/one.png", "masks/_/one.png", r"the name of the folder is an empty query", "no text"),
        ("masks/red cup/one.png", "masks/red_cup/one.png", r"'red cup' is asked for twice", "query twice"),
        ("images/one.jpg", "one.png", r"one\.jpg has the same name: whose masks are they", "picture twice"),
    ],
)
def test_broken_layouts(tmp_path: Path, file: str, name: str, message: str, reason: str) -> None:
    save(make_folder(tmp_path) / file, CUP)
    with pytest.raises(ValueError, match=rf"^{name}: {message}"):
        FolderDataset(tmp_path)
    folder = FolderDataset(tmp_path, Selection(on_error="skip"))
    assert len(folder) == 2 and folder.skips.broken == {reason: 1}


def test_broken_masks_and_other_files(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "readme.txt").write_text("about")
    save(tmp_path / "masks" / "plate" / "one.png", noise(height=HEIGHT + 1))
    with pytest.raises(
        ValueError, match=r"^one\.png: mask: '.*plate/one\.png' must have .* \(40, 60\), got \(41, 60\)"
    ):
        FolderDataset(tmp_path)
    folder = FolderDataset(tmp_path, Selection(on_error="skip"))
    assert folder.names == ("deep/two.b.jpg",)
    assert folder.skips.broken == {"mask of another size": 1}
    assert folder.skips.left_out == {"no picture file": 1, "picture without a query": 1}
    (tmp_path / "masks" / "plate" / "one.png").write_bytes(b"")
    assert FolderDataset(tmp_path, Selection(on_error="skip")).skips.broken == {"mask unreadable": 1}


def test_missing_folders(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        with pytest.raises(FileNotFoundError, match=rf"images/ and masks/ in it, {name}/ is missing in '.*'"):
            FolderDataset(tmp_path)
        (tmp_path / name).mkdir()
    assert len(FolderDataset(tmp_path)) == 0
