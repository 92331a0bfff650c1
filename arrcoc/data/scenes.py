"""Drawn scenes with exact masks and compositional queries: "the striped red star", "anything blue".

Axes: Q queries, H and W picture height and width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arrcoc.data.backgrounds import sample_background, visible_colours
from arrcoc.data.layout import cast_shadow, draw, place
from arrcoc.data.masks import Picture
from arrcoc.data.sample import RelevanceDataset, RelevanceSample
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

Pairs = tuple[tuple[str, str], ...]


class _Scene(NamedTuple):
    """A picture [3, H, W], its things from the bottom up, whose each pixel is (-1: nobody's), and what is asked."""

    picture: Picture
    things: list[Description]
    owners: NDArray[np.int8]
    queries: list[Description]
    phrases: tuple[str, ...]


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

    def describe(self, index: int) -> tuple[Description, ...]:
        """The things in scene number ``index``, from the bottom up."""
        return tuple(self._compose(index).things)

    def make_sample(self, index: int) -> RelevanceSample:
        """Draw scene number ``index``."""
        scene = self._compose(index)
        visible = [scene.owners == number for number in range(len(scene.things))]
        masks = np.zeros((self.num_queries, *self.size), dtype=np.bool_)
        for mask, query in zip(masks, scene.queries, strict=True):
            for thing, pixels in zip(scene.things, visible, strict=True):
                if query.matches(thing):
                    mask |= pixels
        return RelevanceSample(
            image=torch.from_numpy(scene.picture).clamp_(0, 1),
            queries=scene.phrases,
            masks=torch.from_numpy(masks),
            name=f"scene-{self.split}-{self.seed}-{index:06d}",
        )

    def _compose(self, index: int) -> _Scene:
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
            placed = place(rng, things, owners, side)
        cast_shadow(rng, picture, owners)
        draw(rng, picture, placed, side)

        queries = _sample_queries(rng, things, pairs, held_out, self.num_queries, self.absent_share)
        phrases = tuple(query.phrase(_pick(rng, _ARTICLES)) for query in queries)
        return _Scene(picture, things, owners, queries, phrases)
