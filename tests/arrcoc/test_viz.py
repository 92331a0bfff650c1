"""Pictures of relevance lie exactly over the photo, and say with their pixels what the map says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from arrcoc import viz


def _photo(height: int = 48, width: int = 70) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _bilinear(relevance: np.ndarray, y: float, x: float) -> float:
    """Between the four token centres around the pixel's centre, tokens repeated beyond the edge."""
    (top, dy), (left, dx) = ((int(np.floor(value)), value - np.floor(value)) for value in (y, x))
    rows, columns = (
        np.clip([first, first + 1], 0, limit - 1) for first, limit in zip((top, left), relevance.shape, strict=True)
    )
    return np.array([1 - dy, dy]) @ relevance[np.ix_(rows, columns)] @ np.array([1 - dx, dx])


@pytest.mark.parametrize("size", [(48, 70), (7, 11), (6, 5), (3, 40)])
def test_heatmap_is_bilinear_between_token_centres(size: tuple[int, int]) -> None:
    relevance = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).numpy()
    expected = [
        [
            _bilinear(relevance, (row + 0.5) * 6 / size[0] - 0.5, (column + 0.5) * 5 / size[1] - 0.5)
            for column in range(size[1])
        ]
        for row in range(size[0])
    ]
    found = viz.heatmap(relevance, size)
    assert found.dtype == np.float32
    assert_close(found, np.array(expected, dtype=np.float32), rtol=0, atol=1e-5)


def test_heatmap_covers_the_whole_picture_and_stays_in_range() -> None:
    assert (viz.heatmap(torch.ones(3, 4), (50, 31)) == 1).all()
    corner = viz.heatmap([[1.0, 0.0], [0.0, 0.0]], (8, 8))
    assert corner[0, 0] == 1
    assert corner[:, -2:].max() == 0
    assert viz.heatmap(torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True), (4, 4)).mean() == 1


def test_overlay_leaves_the_photo_where_nothing_is_relevant() -> None:
    photo = _photo()
    before = photo.tobytes()
    assert viz.overlay(photo, torch.zeros(4, 6)).tobytes() == before
    assert viz.overlay(photo, torch.ones(4, 6), alpha=0).tobytes() == before
    half = np.asarray(viz.overlay(photo, [[0.0, 1.0]]))
    assert (half[:, :17] == np.asarray(photo)[:, :17]).all()
    assert (half[:, -17:] != np.asarray(photo)[:, -17:]).any()
    assert photo.tobytes() == before


def test_overlay_shows_the_colour_of_the_map() -> None:
    from matplotlib import colormaps

    painted = np.asarray(viz.overlay(_photo(), torch.full((4, 6), 0.5), alpha=1.0, colormap="viridis"))
    expected = 0.5 * np.asarray(_photo()) + 0.5 * 255 * np.array(colormaps["viridis"](0.5)[:3])
    assert_close(painted.astype(float), expected, rtol=0, atol=0.51)
    by_peak = viz.overlay(_photo(), torch.full((4, 6), 0.1), peak=0.1)
    assert by_peak.tobytes() == viz.overlay(_photo(), torch.ones(4, 6)).tobytes()


def test_token_grid_keeps_what_is_kept_and_fades_the_rest() -> None:
    photo = _photo(48, 70)
    keep = torch.zeros(4, 7, dtype=torch.bool)
    keep[1, 2] = True
    shown = np.asarray(viz.token_grid(photo, keep), dtype=float)
    original = np.asarray(photo, dtype=float)
    assert (shown[13:24, 21:30] == original[13:24, 21:30]).all()  # rows 12..23, columns 20..29; lines at 12 and 20
    assert shown[30:36, 41:50].std() < 0.5 * original[30:36, 41:50].std()
    assert (shown[12, 21:30] > original[12, 21:30])[original[12, 21:30] < 250].all()  # the line above it


def test_token_grid_agrees_with_the_tokens_of_any_size() -> None:
    for height, width, grid in ((31, 17, (4, 3)), (5, 9, (5, 9)), (40, 40, (14, 14))):
        keep = torch.rand(grid, generator=torch.Generator().manual_seed(1)) > 0.5
        shown = np.asarray(viz.token_grid(Image.new("RGB", (width, height), "white"), keep, dim=1.0), dtype=float)
        for row in range(height):
            for column in range(width):
                token = keep[int((row + 0.5) * grid[0] / height), int((column + 0.5) * grid[1] / width)]
                assert (shown[row, column, 0] > 200) == bool(token)


def test_contact_sheet_puts_pictures_over_captions() -> None:
    red, blue = Image.new("RGB", (100, 50), "red"), Image.new("RGB", (50, 50), "blue")
    sheet = np.asarray(viz.contact_sheet([(red, "a red one"), (blue, "blue")], tile_width=64))
    assert sheet.shape[1] == 2 * 64 + 3 * 8
    is_red, is_blue = ((sheet == colour).all(-1) for colour in ((255, 0, 0), (0, 0, 255)))
    assert (is_red.sum(), is_blue.sum()) == (64 * 32, 64 * 64)
    caption = sheet[8 + 32 :, 8 : 8 + 64]
    assert (caption.min(-1) < 100).any()  # letters
    assert (sheet[:8] == 255).all()


def test_contact_sheet_wraps_captions_inside_their_column() -> None:
    white = Image.new("RGB", (60, 60), "white")
    caption = "a caption much longer than the picture is wide, withonewordthatisfartoolongforasingleline"
    wrapped = np.asarray(viz.contact_sheet([(white, caption), (white, "")], tile_width=80))
    dark = (wrapped.min(-1) < 200).any(0).nonzero()[0]
    assert dark.min() >= 8
    assert dark.max() < 8 + 80
    short = viz.contact_sheet([(white, "short"), (white, "")], tile_width=80)
    assert wrapped.shape[0] > short.height
    tall = viz.contact_sheet([(white, "short"), (white, "")], tile_width=80, columns=1)
    assert tall.width < short.width
    assert tall.height > short.height


def test_errors_say_what_is_wrong() -> None:
    photo = _photo()
    with pytest.raises(ValueError, match=r"relevance must have shape \[grid_h, grid_w\], got \[3\]\."):
        viz.heatmap(torch.zeros(3), (4, 4))
    with pytest.raises(ValueError, match=r"relevance must be in \[0, 1\], got values from 0 to 2\."):
        viz.overlay(photo, [[0.0, 2.0]])
    with pytest.raises(ValueError, match=r"relevance must be in \[0, 1\], got values from nan to nan\."):
        viz.overlay(photo, [[0.0, float("nan")]])
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1\.5\."):
        viz.overlay(photo, [[0.0]], alpha=1.5)
    with pytest.raises(ValueError, match=r"peak must be > 0, got 0\."):
        viz.overlay(photo, [[0.0]], peak=0)
    with pytest.raises(ValueError, match=r"keep must have shape \[grid_h, grid_w\], got \[2, 2, 2\]\."):
        viz.token_grid(photo, torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"dim must be in \[0, 1\], got -1\."):
        viz.token_grid(photo, torch.ones(2, 2), dim=-1)
    with pytest.raises(ValueError, match=r"pictures must hold at least one \(picture, caption\), got none\."):
        viz.contact_sheet([])
    with pytest.raises(ValueError, match=r"columns must be >= 1, got 0\."):
        viz.contact_sheet([(photo, "")], columns=0)
    with pytest.raises(ValueError, match=r"tile_width must be >= 32, got 8\."):
        viz.contact_sheet([(photo, "")], tile_width=8)


def test_matplotlib_is_loaded_only_to_draw() -> None:
    program = "import sys, arrcoc.viz, arrcoc.evaluation; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
