"""What a reader did not use, and why: broken items stop it or are counted, as the user chose, and nothing is silent."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from typing import Any

NUM_EXAMPLES = 10


class ItemError(ValueError):
    """An item of a data set is broken.

    Args:
        message: what is wrong, in full.
        reason: in a few words that items broken alike share, e.g. "picture missing": what they are counted under.
        name: of the item, where whoever catches the error cannot know it, e.g. "line 7".
    """

    def __init__(self, message: str, *, reason: str, name: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        """How it leaves the worker process of a loader."""
        return partial(ItemError, reason=self.reason, name=self.name), self.args


class Skips:
    """Counts of what was not used, by reason, each with its first examples.

    Args:
        on_error: "raise" stops at the first broken item, "skip" counts it and goes on.
        num_examples: examples kept of each reason, None for all; >= 0.

    Attributes:
        broken: reason -> number of items that are broken; empty with on_error="raise".
        left_out: reason -> number of items that are sound and were not asked for, e.g. masks that are too small.
        examples: reason -> (name, what is wrong) of the first items.
    """

    def __init__(self, on_error: str = "raise", *, num_examples: int | None = NUM_EXAMPLES) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')
        if num_examples is not None and num_examples < 0:
            raise ValueError(f"num_examples must be >= 0 or None, got {num_examples!r}.")
        self.on_error = on_error
        self.num_examples = num_examples
        self.broken: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def add_broken(self, name: str, error: ItemError) -> None:
        """Count a broken item, or stop.

        Raises:
            ValueError: with on_error="raise"; the message starts with the item's name.
        """
        name = error.name or name
        if self.on_error == "raise":
            raise ValueError(f"{name}: {error}") from error
        self._add(self.broken, error.reason, name, str(error))

    def add_left_out(self, name: str, reason: str, detail: str) -> None:
        """Count an item that is sound and not used."""
        self._add(self.left_out, reason, name, detail)

    def clear(self) -> None:
        """Forget everything, before another pass."""
        for table in (self.broken, self.left_out, self.examples):
            table.clear()

    def summary(self) -> str:
        """A line for each reason: how many, why, and the first example; "nothing skipped" if there are none."""
        lines = [
            f"{number} {verb}: {reason} (e.g. {': '.join(self.examples[reason][0])})"
            if self.examples[reason]
            else f"{number} {verb}: {reason}"
            for verb, counts in (("skipped", self.broken), ("left out", self.left_out))
            for reason, number in counts.most_common()
        ]
        text = "\n".join(lines) or "nothing skipped"
        return text.encode(errors="backslashreplace").decode()  # names of files may be any bytes; this can be printed

    def _add(self, counts: Counter[str], reason: str, name: str, detail: str) -> None:
        counts[reason] += 1
        if self.num_examples is None or len(self.examples[reason]) < self.num_examples:
            self.examples[reason].append((name, detail))
