"""Drawn scenes: exact masks, true queries, held-out pairs, and the same scene every time."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline

from arrcoc.data.backgrounds import oklab, visible_colours
from arrcoc.data.layout import place
from arrcoc.data.scenes import Scenes
from arrcoc.data.shapes import outline, paint, rasterize
from arrcoc.data.vocabulary import COLOURS, PAIRS, PATTERNS, SHAPES, SIZES, SPLITS, Description, split_of

SMALL = 96


def read_query(text: str) -> Description:
    """A query's words back as attributes."""
    words = [word for word in text.split() if word not in ("the", "a", "an", "and", "anything")]
    found = {}
    for name, vocabulary in (("size", SIZES), ("pattern", PATTERNS), ("colour", COLOURS), ("shape", SHAPES)):
        match = [word for word in words if word in vocabulary]
        assert len(match) <= 1
        found[name] = match[0] if match else None
    assert len(words) == sum(value is not None for value in found.values())
    return Description(**found)


@pytest.mark.parametrize(
    ("description", "article", "text"),
    [
        (Description(shape="star", colour="red", pattern="striped"), "the", "the striped red star"),
        (Description(shape="arrow"), "a", "an arrow"),
        (Description(shape="ring", size="large"), "", "large ring"),
        (Description(colour="blue"), "the", "anything blue"),
        (Description(colour="blue", pattern="dotted"), "a", "anything dotted and blue"),
    ],
)
def test_phrases(description: Description, article: str, text: str) -> None:
    assert description.phrase(article) == text


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turn", [7.0, 40.0])
def test_mask_is_every_pixel_whose_centre_is_inside(shape: str, turn: float) -> None:
    side = 57.3
    coverage, mask = rasterize(shape, side, turn)
    size = len(mask)
    assert mask.shape == coverage.shape == (size, size) == (58, 58)

    angle = np.radians(turn)
    turned = [
        np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)
        for x, y in (ring.T for ring in outline(shape))
    ]
    low, high = turned[0].min(axis=0), turned[0].max(axis=0)
    rings = [(ring - (low + high) / 2) * side / (high - low).max() + size / 2 for ring in turned]
    ticks = (np.arange(size * 9) + 0.5) / 9  # 9 x 9 points a pixel, the fifth of them its centre
    points = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    inside = np.logical_xor.reduce([Outline(ring).contains_points(points) for ring in rings])
    inside = inside.reshape(size, 9, size, 9)
    assert (mask != inside[:, 4, :, 4]).sum() <= 1  # a centre on the outline itself
    difference = np.abs(coverage - inside.mean(axis=(1, 3)))
    assert difference.max() < 0.34 and difference.mean() < 0.01


def test_every_query_means_what_it_says() -> None:
    for split in SPLITS:
        scenes = Scenes(25, split=split, size=SMALL, seed=3)
        for number in range(len(scenes)):
            scene, sample = scenes._compose(number), scenes[number]
            assert sample.queries == scene.phrases and len(set(scene.queries)) == 6
            for text, mask in zip(sample.queries, sample.masks, strict=True):
                query = read_query(text)
                owners = [number for number, thing in enumerate(scene.things) if query.matches(thing)]
                np.testing.assert_array_equal(mask.numpy(), np.isin(scene.owners, owners))


def test_masks_are_where_the_picture_has_the_colour() -> None:
    """Inside its mask a plain thing looks more like its own colour than like any other."""
    bases = oklab(np.array([base for base, _ in COLOURS.values()]) / 255)
    checked = 0
    scenes = Scenes(30, size=192, seed=5)
    for number in range(len(scenes)):
        scene = scenes._compose(number)
        for owner, thing in enumerate(scene.things):
            if thing.pattern == "plain":
                inner = scene.owners == owner
                for axis, step in itertools.product((0, 1), (-1, 1)):
                    inner = inner & np.roll(inner, step, axis)  # without the blended border
                distance = np.linalg.norm(oklab(scene.picture[:, inner].T)[:, None] - bases, axis=-1)
                nearest = np.array(list(COLOURS))[distance.argmin(axis=1)]
                assert (nearest == thing.colour).mean() > 0.99
                checked += 1
    assert checked > 20


def test_things_are_large_enough_and_seen() -> None:
    scenes = Scenes(60, seed=1, size=(200, 260))
    counts = set()
    for number in range(len(scenes)):
        scene = scenes._compose(number)
        counts.add(len(scene.things))
        for owner, thing in enumerate(scene.things):
            rows, columns = np.nonzero(scene.owners == owner)
            longest = max(np.ptp(rows), np.ptp(columns)) + 1
            assert longest <= SIZES[thing.size][1] * 200 + 1
            assert len(rows) >= 0.75 * 0.15 * (SIZES[thing.size][0] * 200) ** 2
    assert counts == {2, 3, 4, 5}


def test_nobody_is_hidden_and_like_colours_stay_apart() -> None:
    rng = np.random.default_rng(0)
    things = [
        Description(shape=shape, colour=colour, pattern="plain", size="large")
        for shape, colour in [("circle", "red"), ("circle", "red"), ("square", "blue")]
    ]
    for _ in range(30):
        owners = np.full((128, 128), -1, dtype=np.int8)
        placed = place(rng, things, owners, 128)
        if placed is not None:
            for number, item in enumerate(placed):
                assert (owners == number).sum() >= 0.75 * item.mask.sum()
            red, red_too = (np.zeros((130, 130), dtype=bool) for _ in range(2))
            red[1:-1, 1:-1], red_too[1:-1, 1:-1] = owners == 0, owners == 1
            grown = red | np.roll(red, 1, 0) | np.roll(red, -1, 0) | np.roll(red, 1, 1) | np.roll(red, -1, 1)
            assert not (grown & red_too).any()


def test_splits_share_no_pair() -> None:
    assert sum(len(pairs) for pairs in PAIRS.values()) == len(SHAPES) * len(COLOURS)
    for shape in SHAPES:
        splits = [split_of(shape, colour) for colour in COLOURS]
        assert (splits.count("val"), splits.count("test")) == (1, 2)
    assert {colour for _, colour in PAIRS["train"]} == {colour for _, colour in PAIRS["test"]} == set(COLOURS)


def test_training_never_shows_or_asks_for_a_held_out_pair() -> None:
    scenes = Scenes(150, size=SMALL)
    for number in range(len(scenes)):
        scene = scenes._compose(number)
        for description in [*scene.things, *map(read_query, scene.phrases)]:
            if description.shape and description.colour:
                assert split_of(description.shape, description.colour) == "train"


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_splits_ask_for_their_own_pairs(split: str) -> None:
    scenes = Scenes(60, split=split, size=SMALL)
    for number in range(len(scenes)):
        scene = scenes._compose(number)
        for query in scene.queries:
            assert query.shape and query.colour and split_of(query.shape, query.colour) == split
        splits = [split_of(thing.shape, thing.colour) for thing in scene.things]
        assert splits.count(split) == 2 and set(splits) <= {split, "train"}


def test_absent_queries_are_there_and_hard() -> None:
    scenes = Scenes(200, size=SMALL, absent_share=0.3)
    num_absent = num_near = 0
    for number in range(len(scenes)):
        scene = scenes._compose(number)
        for query in scene.queries:
            if not any(query.matches(thing) for thing in scene.things):
                num_absent += 1
                num_near += any(
                    getattr(query, name) is not None and getattr(query, name) == getattr(thing, name)
                    for thing in scene.things
                    for name in ("shape", "colour")
                )
    assert abs(num_absent / 1200 - 0.3) < 0.04
    assert num_near > 0.4 * num_absent


@pytest.mark.parametrize("absent_share", [0.0, 1.0])
@pytest.mark.parametrize("split", SPLITS)
def test_exactly_this_many_queries(absent_share: float, split: str) -> None:
    for sample in Scenes(8, split=split, size=SMALL, num_queries=8, absent_share=absent_share):
        assert len(sample.queries) == 8
        assert sample.masks.flatten(1).any(1).all() == (absent_share == 0.0)


def digest(scenes: Scenes, number: int) -> str:
    sample = scenes[number]
    content = sample.image.numpy().tobytes() + sample.masks.numpy().tobytes() + repr(sample.queries).encode()
    return hashlib.sha256(content).hexdigest()


def test_a_scene_depends_on_seed_split_and_number_alone() -> None:
    scenes = Scenes(9, size=SMALL)
    backwards = [digest(scenes, number) for number in reversed(range(9))]
    assert backwards == [digest(Scenes(100, size=SMALL), number) for number in reversed(range(9))]
    others = [Scenes(9, size=SMALL, seed=1), Scenes(9, size=SMALL, split="test")]
    assert len({*backwards, *(digest(other, number) for other in others for number in range(9))}) == 27


def test_a_scene_is_the_same_in_another_process() -> None:
    program = (
        "import hashlib; from arrcoc.data.scenes import Scenes; sample = Scenes(5, size=96)[4];"
        "print(hashlib.sha256(sample.image.numpy().tobytes() + sample.masks.numpy().tobytes()"
        " + repr(sample.queries).encode()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(Scenes(5, size=SMALL), 4)


def test_sample_is_a_picture_of_the_asked_size() -> None:
    sample = Scenes(1, size=(100, 140), num_queries=3)[0]
    assert sample.image.shape == (3, 100, 140) and sample.image.dtype == torch.float32
    assert sample.image.min() >= 0 and sample.image.max() <= 1
    assert sample.masks.shape == (3, 100, 140) and sample.name == "scene-train-0-000000"


def test_describe_names_the_things() -> None:
    things = Scenes(1, size=SMALL).describe(0)
    assert 2 <= len(things) <= 5 and all(None not in vars(thing).values() for thing in things)


def test_inks_are_visible_shades_of_their_colours() -> None:
    for base, ink in COLOURS.values():
        base_lab, ink_lab = oklab(np.array([base, ink]) / 255)
        assert 0.1 < np.linalg.norm(base_lab - ink_lab) < 0.28
        chroma, ink_chroma = np.linalg.norm(base_lab[1:]), np.linalg.norm(ink_lab[1:])
        if chroma > 0.03:
            assert base_lab[1:] @ ink_lab[1:] > np.cos(np.radians(20)) * chroma * ink_chroma
        else:
            assert ink_chroma < 0.03


def test_colours_differ_from_each_other() -> None:
    for (one, _), (other, _) in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(oklab(np.array(one) / 255) - oklab(np.array(other) / 255)) > 0.12


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_leave_the_colour_at_least_its_half(pattern: str) -> None:
    base, ink = (np.array(rgb) / 255 for rgb in COLOURS["red"])
    painted = paint("red", pattern, 120, turn=20, period=24)
    share = np.dot(painted.reshape(3, -1).T - base, ink - base) / np.dot(ink - base, ink - base)
    low, high = {"plain": (0, 0), "striped": (0.4, 0.5), "dotted": (0.1, 0.4), "checkered": (0.45, 0.505)}[pattern]
    assert low - 1e-6 <= share.mean() <= high + 1e-6


def test_oklab_of_known_colours() -> None:
    """White and red from the definition's author, https://bottosson.github.io/posts/oklab."""
    np.testing.assert_allclose(oklab(np.array([1.0, 1.0, 1.0])), [1, 0, 0], atol=1e-4)
    np.testing.assert_allclose(oklab(np.array([1.0, 0.0, 0.0])), [0.628, 0.225, 0.126], atol=1e-3)


@pytest.mark.parametrize(
    ("rgb", "unseen", "seen"),
    [
        ((0.97, 0.97, 0.97), {"white"}, {"red", "black", "blue"}),
        ((0.55, 0.55, 0.56), {"grey"}, {"white", "black", "yellow"}),
        ((0.13, 0.19, 0.33), {"blue", "black"}, {"white", "red", "yellow"}),  # navy is blue, though darker
        ((0.30, 0.50, 0.20), {"green"}, {"red", "blue", "white"}),
    ],
)
def test_colours_like_the_background_are_not_used(
    rgb: tuple[float, float, float], unseen: set[str], seen: set[str]
) -> None:
    colours = set(visible_colours(np.broadcast_to(np.array(rgb, dtype=np.float32)[:, None, None], (3, 80, 90))))
    assert not colours & unseen and colours >= seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_scenes": -1}, r"num_scenes must be >= 0, got -1"),
        ({"split": "dev"}, r"split must be one of train, val, test, got 'dev'"),
        ({"seed": -2}, r"seed must be >= 0, got -2"),
        ({"size": (448, 10)}, r"size must be at least 64 pixels a side, got \(448, 10\)"),
        ({"num_queries": 9}, r"num_queries must be in \[1, 8\], got 9"),
        ({"absent_share": 1.5}, r"absent_share must be in \[0, 1\], got 1\.5"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scenes(**{"num_scenes": 1, **arguments})


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match=r"shape must be one of the vocabulary's, got 'blob'"):
        outline("blob")
