"""Early stopping: the weights of the best epoch, and the end of a run whose score no longer rises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class BestEpoch:
    """The best epoch so far, by a score that should rise.

    Args:
        monitor: name of the score in the log entry of an epoch.
        patience: epochs without a rise after which the run stops, >= 1.
        min_delta: by how much a score must exceed the best one to count, >= 0.
    """

    def __init__(self, monitor: str, patience: int, min_delta: float = 0.0) -> None:
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.epoch, self.score = 0, float("-inf")
        self.last_epoch = 0
        self.values: list[Tensor] = []

    def update(self, record: dict[str, float], params: Sequence[Tensor]) -> None:
        """Look at an epoch's log entry; keep a copy of the weights if it is the best.

        Raises:
            ValueError: if the entry does not have the score.
        """
        if self.monitor not in record:
            raise ValueError(f"monitor must be a score that validation gives, {list(record)}, got {self.monitor!r}.")
        self.last_epoch = int(record["epoch"])
        if not self.values or record[self.monitor] > self.score + self.min_delta:
            self.epoch, self.score = self.last_epoch, float(record[self.monitor])
            self.values = [param.detach().clone() for param in params]

    @property
    def is_over(self) -> bool:
        """Whether the score has not risen for ``patience`` epochs."""
        return self.last_epoch - self.epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""
        return {"epoch": self.epoch, "score": self.score, "last_epoch": self.last_epoch, "values": self.values}

    def load_state_dict(self, state: dict[str, Any], like: Sequence[Tensor]) -> None:
        """Take up what `state_dict` gave, on the devices of the parameters."""
        self.epoch, self.score, self.last_epoch = state["epoch"], state["score"], state["last_epoch"]
        self.values = [value.to(param.device) for value, param in zip(state["values"], like, strict=True)]
