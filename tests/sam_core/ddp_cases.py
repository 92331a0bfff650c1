"""What test_ddp.py and the ranks that it starts share: models, batches and ways to train."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_cases import BASES, METHODS, make_batch

STEPS = 4
PASSES = [(method, number) for method in METHODS for number in (1, 2) if (method, number) != ("msam", 2)]
SAMPLE_LOSSES = partial(cross_entropy, reduction="none")
LOOPS: dict[str, dict[str, Any]] = {
    "local": {},
    "sync": {"sync_ascent": True},
    "accumulated": {"accumulation_steps": 2},
    "accumulated, sync": {"accumulation_steps": 2, "sync_ascent": True},
    "m-sharpness": {"accumulation_steps": 2, "m_sharpness": True},
}
LOOP_METHODS = dict.fromkeys(LOOPS, ("sam", "asam", "gsam", "looksam", "msam")) | {"m-sharpness": ("sam", "asam")}


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    return make_batch(100 * step + rank)


class Branched(nn.Module):
    """Two branches, of which a batch may leave out the second; a third is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        self.second, self.third = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
        self.uses_second = True

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.trunk(inputs).tanh()
        return self.head(hidden) + self.second(hidden) if self.uses_second else self.head(hidden)


def uses_second(step: int, rank: int) -> bool:
    """On the first rank alone, and in one step on none."""
    return rank == 0 and step != 1


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def build(method: str, params, base: str = "sgd", **options):
    return METHODS[method](params, BASES[base][0], **{**BASES[base][1], **options})
