"""Augmentation: masks move with the pixels, queries stay true, and all randomness is the generator's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arrcoc.data.augment import RelevanceAugmentation
from arrcoc.data.sample import RelevanceSample
from arrcoc.data.scenes import Scenes

NOTHING: dict[str, Any] = {
    "rotation": 0, "shear": 0, "zoom": (1, 1), "crop": (1, 1), "stretch": 1, "flip": 0, "brightness": 0, "contrast": 0,
    "saturation": 0, "hue": 0, "grayscale": 0, "degrade": 0,
}  # fmt: skip
PHOTOMETRY: dict[str, Any] = {
    "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2, "grayscale": 0.3, "degrade": 1,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def painted(query: str = "cup", height: int = 60, width: int = 80) -> RelevanceSample:
    """A picture that is its own mask: white where it is true, black elsewhere."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((y - 0.4 * height) ** 2 + (x - 0.45 * width) ** 2 < (0.25 * height) ** 2) | ((x > 60) & (y > 40))
    return RelevanceSample(image=mask.float().expand(3, -1, -1).clone(), queries=(query,), masks=mask[None], name="p")


def near_border(mask_HW: Tensor) -> Tensor:
    """Pixels within two of a change of the mask, and at the rim of the picture, where what lies outside comes in."""
    wide = F.pad(mask_HW.float()[None, None], (2, 2, 2, 2), value=0.5)
    return (F.max_pool2d(wide, 5, 1) != -F.max_pool2d(-wide, 5, 1))[0, 0]


@pytest.mark.parametrize(
    "options",
    [{"flip": 1}, {"crop": (0.3, 0.6), "stretch": 1.5, "min_kept": 0.01}, {"crop": (0.3, 0.9), "flip": 0.5}],
)
def test_crops_and_flips_move_masks_exactly(options: dict[str, Any]) -> None:
    augment = RelevanceAugmentation(**NOTHING | options)
    moved = [augment(painted(), generator(seed)) for seed in range(10)]
    for sample in moved:
        assert torch.equal(sample.image, sample.masks.float().expand(3, -1, -1))
    assert any(sample.image.shape != painted().image.shape for sample in moved) == ("crop" in options)


@pytest.mark.parametrize(
    "options", [{"rotation": 30}, {"shear": 20}, {"zoom": (1.2, 1.6)}, {"rotation": 30, "flip": 1, "crop": (0.5, 1)}]
)
def test_rotation_shear_and_zoom_move_masks_but_for_two_border_pixels(options: dict[str, Any]) -> None:
    augment = RelevanceAugmentation(**NOTHING | options)
    for seed in range(10):
        sample = augment(painted(), generator(seed))
        inside = ~near_border(sample.masks[0])
        outside_colour = painted().image.mean()  # of the corners that come in, where masks are False
        white = sample.image[0] > 0.999
        filled = (sample.image[0] - outside_colour).abs() < 1e-3
        assert inside.sum() > 0.5 * inside.numel() * (1 - 0.3)
        assert torch.equal(white[inside & ~filled], sample.masks[0][inside & ~filled])
        assert not sample.masks[0][inside & filled].any()


def test_a_flip_is_the_mirror_image_of_its_sample() -> None:
    sample = Scenes(1, size=96)[0]
    flipped = RelevanceAugmentation(**NOTHING | {"flip": 1})(sample, generator())
    assert torch.equal(flipped.image, sample.image.flip(-1))
    assert torch.equal(flipped.masks, sample.masks.flip(-1))


@pytest.mark.parametrize("query", ["the cup on the left", "Left cup", "rightmost cup", "right-hand", "left_cup"])
def test_a_query_that_names_a_side_is_never_mirrored(query: str) -> None:
    augment = RelevanceAugmentation(**NOTHING | {"flip": 1})
    assert torch.equal(augment(painted(query), generator()).image, painted(query).image)
    assert not torch.equal(augment(painted("a copyright"), generator()).image, painted().image)


def test_a_query_that_names_a_colour_keeps_hue_and_colour() -> None:
    picture = torch.rand(3, 16, 16, generator=generator())
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    augment = RelevanceAugmentation(**NOTHING | {"hue": 0.4, "grayscale": 1})
    kept = (
        "a RED cup",
        "gray cup",
        "anything multicoloured",
        "red_cup",
        "reddish",
        "bluish",
        "a greenish cup",
        "khaki",
    )
    for query, changes in (*((query, False) for query in kept), ("redwood", True), ("blurred cup", True)):
        sample = RelevanceSample(image=picture, queries=(query,), masks=mask, name="")
        image = augment(sample, generator()).image
        assert torch.equal(image, picture) != changes
        assert torch.equal(image[0], image[1]) == changes  # grey


def corner_sample() -> RelevanceSample:
    """A thing in one corner, a thing everywhere, and an absent one."""
    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[0, :8, :8] = True
    masks[1] = True
    return RelevanceSample(image=torch.rand(3, 40, 40), queries=("corner", "all", "absent"), masks=masks, name="c")


@pytest.mark.parametrize("lost", ["absent", "drop"])
def test_what_a_crop_loses_is_absent_or_dropped_and_a_remnant_is_never_asked(lost: str) -> None:
    augment = RelevanceAugmentation(**NOTHING | {"crop": (0.36, 0.36), "min_kept": 0.3, "lost": lost})
    fates = set()
    for seed in range(60):
        sample = augment(corner_sample(), generator(seed))
        assert sample.image.shape == (3, 24, 24)
        masks = dict(zip(sample.queries, sample.masks, strict=True))
        assert ("absent" in masks) and not masks["absent"].any()  # it was absent before
        if "corner" in masks and masks["corner"].any():
            assert masks["corner"].sum() >= 0.3 * 64
            fates.add("kept")
        else:
            fates.add("absent" if "corner" in masks else "dropped")
    assert fates == ({"kept", "absent", "dropped"} if lost == "absent" else {"kept", "dropped"})


def test_what_is_kept_is_measured_in_the_size_before_the_zoom() -> None:
    for min_kept, queries in ((0.24, {"all", "corner", "absent"}), (0.26, {"corner", "absent"})):
        augment = RelevanceAugmentation(**NOTHING | {"zoom": (2, 2), "min_kept": min_kept})
        assert set(augment(corner_sample(), generator()).queries) == queries  # a quarter of the picture is left


def test_lost_drop_leaves_absent_queries_that_were_absent() -> None:
    augment = RelevanceAugmentation(**NOTHING | {"lost": "drop"})
    assert augment(corner_sample(), generator()).queries == ("corner", "all", "absent")


def test_a_sample_that_no_crop_serves_keeps_its_geometry() -> None:
    masks = torch.ones(1, 40, 40, dtype=torch.bool)
    sample = RelevanceSample(image=torch.rand(3, 40, 40), queries=("all",), masks=masks, name="")
    augment = RelevanceAugmentation(**NOTHING | {"crop": (0.2, 0.2), "min_kept": 0.9})
    assert torch.equal(augment(sample, generator()).image, sample.image)


def test_settings_of_no_change_change_nothing() -> None:
    sample = Scenes(1, size=96)[0]
    same = RelevanceAugmentation(**NOTHING)(sample, generator())
    assert torch.equal(same.image, sample.image)
    assert torch.equal(same.masks, sample.masks)
    assert (same.queries, same.name) == (sample.queries, sample.name)


def test_the_result_is_a_plain_picture_in_range_and_the_sample_stays() -> None:
    augment = RelevanceAugmentation(**NOTHING | PHOTOMETRY | {"rotation": 20, "zoom": (0.5, 2)})
    sample = Scenes(1, size=96)[0]
    before = sample.image.clone(), sample.masks.clone()
    for seed in range(20):
        image = augment(sample, generator(seed)).image
        assert type(image) is Tensor and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1
        assert image.std() > 0.01
    assert torch.equal(sample.image, before[0]) and torch.equal(sample.masks, before[1])


@pytest.mark.parametrize("name", PHOTOMETRY)
def test_photometry_changes_the_picture_alone(name: str) -> None:
    sample = painted()
    sample = RelevanceSample(image=torch.rand(3, 60, 80), queries=("cup",), masks=sample.masks, name="")
    changed = RelevanceAugmentation(**NOTHING | {name: 1 if name in ("grayscale", "degrade") else 0.4})(
        sample, generator()
    )
    assert not torch.equal(changed.image, sample.image)
    assert torch.equal(changed.masks, sample.masks)


def test_brightness_is_the_factor_that_was_drawn() -> None:
    sample = RelevanceSample(
        image=torch.full((3, 4, 4), 0.5), queries=("cup",), masks=torch.ones(1, 4, 4, dtype=torch.bool), name=""
    )
    augment = RelevanceAugmentation(**NOTHING | {"brightness": 0.2})
    values = torch.stack([augment(sample, generator(seed)).image[0, 0, 0] for seed in range(200)])
    assert 0.4 <= values.min() < 0.41 and 0.59 < values.max() <= 0.6
    assert abs(values.mean() - 0.5) < 0.02


def test_the_generator_alone_decides() -> None:
    augment = RelevanceAugmentation(degrade=0.8)
    sample = Scenes(1, size=96)[0]
    state = torch.get_rng_state()
    first, again, other = (augment(sample, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.image, again.image) and torch.equal(first.masks, again.masks)
    assert first.queries == again.queries
    assert first.image.shape != other.image.shape or not torch.equal(first.image, other.image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": -1}, "rotation must be >= 0, got -1"),
        ({"shear": 90}, "shear must be <= 60, got 90"),
        ({"flip": 1.5}, "flip must be <= 1, got 1.5"),
        ({"hue": 0.6}, "hue must be <= 0.5, got 0.6"),
        ({"zoom": (0, 1)}, r"zoom must be \(smallest, largest\), both > 0, got \(0, 1\)"),
        ({"crop": (0.8, 1.2)}, r"crop must be \(smallest, largest\), both in \(0, 1\], got \(0.8, 1.2\)"),
        ({"crop": (0.8, 0.5)}, r"crop must be \(smallest, largest\)"),
        ({"crop": 0.5}, r"crop must be \(smallest, largest\), both in \(0, 1\], got 0.5"),
        ({"zoom": [1]}, r"zoom must be \(smallest, largest\), both > 0, got \[1\]"),
        ({"stretch": 0.5}, "stretch must be >= 1, got 0.5"),
        ({"min_kept": 0}, "min_kept must be > 0, got 0"),
        ({"lost": "keep"}, "lost must be one of 'absent', 'drop', got 'keep'"),
        ({"jpeg": 0}, r"jpeg must be in \[1, 100\], got 0"),
        ({"noise": float("nan")}, "noise must be finite, got nan"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelevanceAugmentation(**options)
