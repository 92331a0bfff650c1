"""Splits of a data set by the hash of each name: they do not move when the data set grows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_by_image(names: Sequence[str], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[str]]:
    """Share file names out among splits by the hash of each name.

    Where a picture goes depends on its own name, the shares and the seed, never on the other pictures: a data set that
    grows keeps its splits, and two data sets with the same files are split alike.

    Args:
        names: file names.
        shares: split -> share, > 0, summing to 1, e.g. ``{"train": 0.8, "val": 0.2}``.
        seed: another seed, another split.

    Returns:
        split -> its names, in the given order.

    Raises:
        ValueError: if the shares are not positive or do not sum to 1.
    """
    if min(shares.values(), default=0) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares must be > 0 and sum to 1, got {dict(shares)!r}.")
    splits: dict[str, list[str]] = {split: [] for split in shares}
    ends = dict(zip(shares, accumulate(shares.values()), strict=True))
    last = list(shares)[-1]
    for name in names:
        position = hash_fraction(f"{seed}/{name}")
        splits[next((split for split, end in ends.items() if position < end), last)].append(name)
    return splits
