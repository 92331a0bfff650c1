"""Drawn scenes with exact masks and compositional queries: "the striped red star", "anything blue".

Axes: Q queries, H and W picture height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from arrcoc.data.backgrounds import sample_background, visible_colours
from arrcoc.data.masks import Mask, Picture
from arrcoc.data.sample import RelevanceDataset, RelevanceSample
from arrcoc.data.shapes import MAX_TURN, paint, rasterize
from arrcoc.data.vocabulary import PAIRS, PATTERNS, SIZES, SPLITS, Description

MAX_QUERIES = 8

# What a query names -> how often. In a held-out split it names colour and shape, for their pair is what is held out.
_KINDS: dict[tuple[str, ...], float] = {
    ("shape",): 0.18,
    ("colour",): 0.14,
    ("pattern",): 0.05,
    ("size",): 0.03,
    ("colour", "shape"): 0.24,
    ("pattern", "shape"): 0.07,
    ("pattern", "colour"): 0.06,
    ("pattern", "colour", "shape"): 0.11,
    ("size", "shape"): 0.04,
    ("size", "colour", "shape"): 0.05,
    ("size", "pattern", "colour", "shape"): 0.03,
}
_ARTICLES = ("the", "a", "")

_LEAST_VISIBLE = 0.65  # share of a thing that others may not cover
_TRIES = 25

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class _Placed:
    """A thing, its coverage and mask in a square whose upper left corner is at (top, left)."""

    thing: Description
    coverage: Picture
    mask: Mask
    turn: float
    top: int
    left: int

    @property
    def box(self) -> tuple[slice, slice]:
        size = len(self.mask)
        return slice(self.top, self.top + size), slice(self.left, self.left + size)


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[rng.integers(len(options))]


def _sample_thing(rng: np.random.Generator, pairs: Pairs, others: list[Description], share: float) -> Description:
    """A thing of one of the pairs of shape and colour; with probability ``share`` it is like another in one of them."""
    if others and rng.random() < share:
        other = _pick(rng, others)
        pairs = tuple(pair for pair in pairs if pair[0] == other.shape or pair[1] == other.colour) or pairs
    shape, colour = _pick(rng, pairs)
    pattern = "plain" if rng.random() < 0.4 else _pick(rng, PATTERNS[1:])
    return Description(shape=shape, colour=colour, pattern=pattern, size=_pick(rng, tuple(SIZES)))


def _sample_things(rng: np.random.Generator, target: Pairs, train: Pairs, held_out: bool) -> list[Description]:
    """2 to 5 things. In a held-out split two are of held-out pairs, the others are distractors of training's pairs."""
    things = [_sample_thing(rng, target, [], 0)]
    for number in range(1, rng.integers(2, 6)):
        if held_out and number == 1:
            pairs = tuple(pair for pair in target if pair != (things[0].shape, things[0].colour))
        else:
            pairs = train
        things.append(_sample_thing(rng, pairs, things, 0.6))
    return [things[number] for number in rng.permutation(len(things))]


def _place(
    rng: np.random.Generator, things: list[Description], owners: NDArray[np.int8], side: int
) -> list[_Placed] | None:
    """Lay the things on the picture, later ones on top; ``owners`` [H, W] becomes who is seen where, -1 for nobody.

    Things of one colour stay apart, and of each at least ``_LEAST_VISIBLE`` stays visible. None if one finds no place.
    """
    placed: list[_Placed] = []
    areas: list[int] = []
    for number, thing in enumerate(things):
        assert thing.shape and thing.size
        max_turn = MAX_TURN.get(thing.shape, 180)
        turn = rng.uniform(-max_turn, max_turn)
        coverage, mask = rasterize(thing.shape, rng.uniform(*SIZES[thing.size]) * side, turn)
        size = len(mask)
        for _ in range(_TRIES):
            top, left = (int(rng.integers(length - size + 1)) for length in owners.shape)
            candidate = _Placed(thing, coverage, mask, turn, top, left)
            if all(_compatible(candidate, other) for other in placed):
                view = owners[candidate.box]
                hidden = np.bincount(view[mask] + 1, minlength=number + 1)[1:]
                visible = np.bincount(owners.ravel() + 1, minlength=number + 1)[1:] if hidden.any() else areas
                if all(v - h >= _LEAST_VISIBLE * a for v, h, a in zip(visible, hidden, areas, strict=True)):
                    break
        else:
            return None
        view[mask] = number
        placed.append(candidate)
        areas.append(int(mask.sum()))
    return placed


def _compatible(one: _Placed, other: _Placed) -> bool:
    """Whether two things differ in colour or their squares do not touch."""
    if one.thing.colour != other.thing.colour:
        return True
    reach = (len(one.mask), len(other.mask))
    vertical = one.top > other.top + reach[1] or other.top > one.top + reach[0]
    horizontal = one.left > other.left + reach[1] or other.left > one.left + reach[0]
    return vertical or horizontal


def _cast_shadow(rng: np.random.Generator, picture: Picture, owners: NDArray[np.int8]) -> None:
    """Darken the background softly beside the things, in place."""
    height, width = owners.shape
    side = min(height, width)
    shift = rng.uniform(-0.012, 0.012) * side, rng.uniform(0.004, 0.016) * side
    shadow = Image.fromarray((owners >= 0).astype(np.uint8) * 255).reduce(4)
    shadow = shadow.filter(ImageFilter.GaussianBlur(side / 250))
    box = (-shift[0] / 4, -shift[1] / 4)
    shadow = shadow.transform(shadow.size, Image.Transform.AFFINE, (1, 0, box[0], 0, 1, box[1]))
    full = np.asarray(shadow.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
    picture *= 1 - full[..., None] * np.float32(0.4 / 255)


def _draw(rng: np.random.Generator, picture: Picture, placed: list[_Placed], side: int) -> None:
    """Paint the things onto the picture, in place."""
    for item in placed:
        assert item.thing.colour and item.thing.pattern
        size = len(item.mask)
        period = max(0.2 * size, 0.028 * side)
        colours = paint(item.thing.colour, item.thing.pattern, size, item.turn + 45, period)
        # Light from above: a little brighter at the top, a little darker at the bottom; and no two reds are the same.
        light = np.linspace(1.05, 0.92, size, dtype=np.float32)[:, None, None] * np.float32(rng.uniform(0.95, 1.04))
        view = picture[item.box]
        view += item.coverage[..., None] * (np.minimum(colours * light, 1) - view)


def _sample_queries(
    rng: np.random.Generator,
    things: list[Description],
    pairs: Pairs,
    held_out: bool,
    num_queries: int,
    absent_share: float,
) -> list[Description]:
    """Different queries, in random order: some for things that are there, some for things that could be but are not."""
    kinds = {kind: weight for kind, weight in _KINDS.items() if not held_out or {"colour", "shape"} <= set(kind)}
    names, weights = list(kinds), np.array(list(kinds.values()))
    weights /= weights.sum()
    num_absent = int(rng.binomial(num_queries, absent_share))

    asked = [thing for thing in things if not held_out or (thing.shape, thing.colour) in pairs]
    present = {thing.only(kind): kinds[kind] for thing in asked for kind in names}
    chances = np.array(list(present.values()))
    chosen = rng.choice(len(present), size=num_queries - num_absent, replace=False, p=chances / chances.sum())
    queries = [list(present)[number] for number in chosen]
    while len(queries) < num_queries:
        query = _sample_thing(rng, pairs, things, 0.8).only(names[rng.choice(len(names), p=weights)])
        if query not in queries and not any(query.matches(thing) for thing in things):
            queries.append(query)
    return [queries[number] for number in rng.permutation(num_queries)]


class Scenes(RelevanceDataset):
    """Scenes of 2 to 5 things in 10 shapes, 11 colours, 4 patterns and 2 sizes, on plain, drawn or photographic ground.

    The truth of a query is the visible pixels of all things that match it; of an absent query it is empty. Training
    never shows or asks for the pairs of shape and colour that ``vocabulary.split_of`` holds out; every query of the
    splits "val" and "test" names one of theirs, among distractors of the same shape or colour. Scene i depends on
    (seed, split, i) and the settings alone.

    Args:
        num_scenes: how many, >= 0.
        split: "train", "val" or "test".
        seed: >= 0.
        size: (height, width) in pixels, or one number for both; >= 64.
        num_queries: queries a scene, 1 to 8, all different.
        absent_share: share of the queries that name nothing in the picture, [0, 1].

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> sample = Scenes(100, seed=0)[7]
        >>> sample.image.shape, sample.masks.shape, len(sample.queries)
        (torch.Size([3, 448, 448]), torch.Size([6, 448, 448]), 6)
    """

    def __init__(
        self,
        num_scenes: int,
        *,
        split: str = "train",
        seed: int = 0,
        size: int | tuple[int, int] = (448, 448),
        num_queries: int = 6,
        absent_share: float = 0.3,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        if num_scenes < 0:
            raise ValueError(f"num_scenes must be >= 0, got {num_scenes!r}.")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed!r}.")
        if min(height, width) < 64:
            raise ValueError(f"size must be at least 64 pixels a side, got {size!r}.")
        if not 1 <= num_queries <= MAX_QUERIES:
            raise ValueError(f"num_queries must be in [1, {MAX_QUERIES}], got {num_queries!r}.")
        if not 0 <= absent_share <= 1:
            raise ValueError(f"absent_share must be in [0, 1], got {absent_share!r}.")
        self.num_scenes = num_scenes
        self.split = split
        self.seed = seed
        self.size = (height, width)
        self.num_queries = num_queries
        self.absent_share = absent_share

    def __len__(self) -> int:
        return self.num_scenes

    def make_sample(self, index: int) -> RelevanceSample:
        """Draw scene number ``index``."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        held_out = self.split != "train"
        side = min(self.size)
        picture = sample_background(rng, *self.size)
        colours = visible_colours(picture)
        train, pairs = (tuple(pair for pair in PAIRS[split] if pair[1] in colours) for split in ("train", self.split))

        placed = None
        while placed is None:
            things = _sample_things(rng, pairs, train, held_out)
            owners = np.full(self.size, -1, dtype=np.int8)
            placed = _place(rng, things, owners, side)
        _cast_shadow(rng, picture, owners)
        _draw(rng, picture, placed, side)

        queries = _sample_queries(rng, things, pairs, held_out, self.num_queries, self.absent_share)
        visible = [owners == number for number in range(len(things))]
        masks = np.zeros((len(queries), *self.size), dtype=np.bool_)
        for mask, query in zip(masks, queries, strict=True):
            for thing, pixels in zip(things, visible, strict=True):
                if query.matches(thing):
                    mask |= pixels
        return RelevanceSample(
            image=torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).clamp_(0, 1),
            queries=tuple(query.phrase(_pick(rng, _ARTICLES)) for query in queries),
            masks=torch.from_numpy(masks),
            name=f"scene-{self.split}-{self.seed}-{index:06d}",
        )
