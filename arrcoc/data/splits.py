"""Splits of a data set by the hash of each name: they do not move when the data set grows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from arrcoc._files import write_json

_FORMAT = "arrcoc-splits-1"


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, the same on every machine; file names may be any bytes."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:6], "big") / 2**48


def split_by_image(names: Sequence[str], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[str]]:
    """Share file names out among splits by the hash of each name.

    Where a picture goes depends on its own name, the shares and the seed, never on the other pictures: a data set that
    grows keeps its splits, and two data sets with the same files are split alike.

    Args:
        names: file names.
        shares: split -> share, > 0, summing to 1, e.g. ``{"train": 0.8, "val": 0.1, "test": 0.1}``.
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


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which picture is in which split, and the rule that put it there.

    Args:
        seed, shares: of `split_by_image`.
        names: split -> names of its pictures.
    """

    seed: int
    shares: Mapping[str, float]
    names: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, names: Sequence[str], shares: Mapping[str, float], seed: int = 0) -> Splits:
        """Split pictures by `split_by_image`; a name that occurs twice counts once, so it is in one split alone."""
        split = split_by_image(list(dict.fromkeys(names)), shares, seed)
        return cls(seed=seed, shares=dict(shares), names={name: tuple(part) for name, part in split.items()})

    def indices(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Numbers of the samples of each split, in a data set whose sample n is of picture ``names[n]``.

        A picture that the splits do not know, for the data set has grown since, is in none of them: a run that goes on
        sees what it saw before. (A new run splits anew, and there the old pictures keep their places.)

        Raises:
            ValueError: if a picture of the splits is no longer there.
        """
        known = {name: split for split, part in self.names.items() for name in part}
        if lost := sorted(known.keys() - set(names)):
            raise ValueError(
                f"the data set must hold the {len(known)} pictures that were split, "
                f"{len(lost)} are gone: {_some(lost)}."
            )
        numbers: dict[str, list[int]] = {split: [] for split in self.names}
        for number, name in enumerate(names):
            if name in known:
                numbers[known[name]].append(number)
        return numbers

    def check_same(self, seed: int, shares: Mapping[str, float]) -> None:
        """Refuse another rule than the one that these splits were made with.

        Raises:
            ValueError: if seed or shares differ.
        """
        for name, mine, wanted in (("seed", self.seed, seed), ("shares", dict(self.shares), dict(shares))):
            if mine != wanted:
                raise ValueError(
                    f"the splits were made with {name} {mine!r}, got {wanted!r}: use the same, or a new run."
                )


def write_splits(path: str | os.PathLike[str], splits: Splits) -> None:
    """Write splits as JSON, atomically, with a hash of their content."""
    content = _content(splits)
    write_json(path, {"format": _FORMAT, "sha256": _digest(content), **content})


def read_splits(path: str | os.PathLike[str]) -> Splits:
    """Read what `write_splits` wrote.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not a file of splits, or was changed after it was written.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise ValueError(f"{path} must be a file of splits of format {_FORMAT!r}.")
    try:
        names = {split: tuple(part) for split, part in stored["names"].items()}
        splits = Splits(seed=stored["seed"], shares=stored["shares"], names=names)
        intact = _digest(_content(splits)) == stored["sha256"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}.") from error
    if not intact:
        raise ValueError(f"{path} was changed after it was written: its content does not have the hash that it states.")
    return splits


def _content(splits: Splits) -> dict[str, Any]:
    names = {split: list(part) for split, part in splits.names.items()}
    return {"seed": splits.seed, "shares": dict(splits.shares), "names": names}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
