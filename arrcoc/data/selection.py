"""Which pictures and queries of a data set are used: split, limits, absent queries, what happens to broken items."""

from __future__ import annotations

from dataclasses import dataclass

from arrcoc.data.splits import split_by_image

SPLITS = ("train", "val", "test")
CHECKS = ("headers", "pixels")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pictures and queries of a data set are used.

    Args:
        split: "train", "val" or "test" for the part that ``split_by_image`` gives it, None for all.
        val_share: share of the pictures in "val", (0, 1).
        test_share: share of the pictures in "test", [0, 1 - val_share); the rest is "train".
        split_seed: another seed, other splits.
        limit: at most this many pictures, None for all; >= 1.
        min_coverage, max_coverage: a query is left out if its mask covers less or more of the picture, 0 to 1, or not
            one pixel.
        absent_queries: how many texts that name nothing in the picture are added (fewer if there are fewer), drawn from
            the names of the whole data set by a hash of the picture; >= 0.
        synonyms: JSON file of other names, {"couch": ["sofa"]}: one of what is there is never asked as absent, and
            training asks in these words too.
        on_error: "raise" stops at the first broken item, "skip" leaves it out and counts it.
        check: what is read of each picture when a data set is opened: "headers", or "pixels" too, which takes longer
            and finds truncated files then and not in the middle of training. Streams always see the pixels.
    """

    split: str | None = None
    val_share: float = 0.2
    test_share: float = 0.0
    split_seed: int = 0
    limit: int | None = None
    min_coverage: float = 0.01
    max_coverage: float = 0.60
    absent_queries: int = 0
    synonyms: str | None = None
    on_error: str = "raise"
    check: str = "headers"

    def __post_init__(self) -> None:
        if self.split not in (None, *SPLITS):
            raise ValueError(f'split must be "train", "val", "test" or None, got {self.split!r}.')
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must be in (0, 1), got {self.val_share!r}.")
        if not 0 <= self.test_share < 1 - self.val_share:
            raise ValueError(f"test_share must be in [0, 1 - val_share), got {self.test_share!r}.")
        if self.split == "test" and not self.test_share:
            raise ValueError(f'split "test" needs test_share > 0, got {self.test_share!r}.')
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {self.limit!r}.")
        if not 0 <= self.min_coverage <= self.max_coverage <= 1:
            raise ValueError(
                f"0 <= min_coverage <= max_coverage <= 1 must hold, got {self.min_coverage!r} and "
                f"{self.max_coverage!r}."
            )
        if self.absent_queries < 0:
            raise ValueError(f"absent_queries must be >= 0, got {self.absent_queries!r}.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {self.on_error!r}.')
        if self.check not in CHECKS:
            raise ValueError(f'check must be "headers" or "pixels", got {self.check!r}.')

    @property
    def shares(self) -> dict[str, float]:
        """Share of each split; "test" only if it has one."""
        shares = {"train": 1 - self.val_share - self.test_share, "val": self.val_share, "test": self.test_share}
        return {split: share for split, share in shares.items() if share}

    def includes(self, name: str) -> bool:
        """Whether the picture of this name is in the split."""
        return self.split is None or bool(split_by_image([name], self.shares, self.split_seed)[self.split])
