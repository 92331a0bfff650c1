"""Items read by workers: in order, whole or in batches, and errors as they were raised."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from arrcoc.data.skips import ItemError
from arrcoc.training.workers import read_items


@dataclass(frozen=True)
class Squares:
    """Squares of numbers, but for one that is broken."""

    num: int
    broken: int | None = None

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, number: int) -> int:
        if number == self.broken:
            raise ItemError(f"number {number} is broken.", reason="number broken", name="nine")
        return number**2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_and_batches_in_order(num_workers: int) -> None:
    state = torch.get_rng_state()
    assert list(read_items(Squares(5), num_workers)) == [0, 1, 4, 9, 16]
    batches = read_items(Squares(5), num_workers, batches=[[4, 0], [2]], collate=tuple)
    assert list(batches) == [(16, 0), (4,)]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batches", [None, [[0, 1], [2, 3]]])
def test_errors_keep_type_words_and_reason(num_workers: int, batches: list[list[int]] | None) -> None:
    items = read_items(Squares(4, broken=3), num_workers, batches=batches, collate=tuple)
    seen = [next(items) for _ in range(3 if batches is None else 1)]
    assert seen == ([0, 1, 4] if batches is None else [(0, 1)])
    with pytest.raises(ItemError, match=r"^number 3 is broken\.$") as raised:
        next(items)
    assert (raised.value.reason, raised.value.name) == ("number broken", "nine")
