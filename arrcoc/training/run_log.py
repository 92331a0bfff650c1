"""What a run leaves to read: one JSON line an epoch, and TensorBoard's curves.

A line is appended whole and flushed, so that a run cut at any moment loses at most the line that it was writing; a
resume rewrites the file up to the checkpoint that it goes on from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arrcoc._files import write_text

Record = dict[str, float]


class JsonLines:
    """A log of one JSON object a line.

    Args:
        path: the file.
        history: what it holds at first; anything else in it is dropped.
    """

    def __init__(self, path: str | os.PathLike[str], history: Sequence[Record] = ()) -> None:
        self.path = Path(path)
        write_text(self.path, "".join(map(_line, history)))

    def append(self, record: Record) -> None:
        """Add a line.

        Raises:
            ValueError: for NaN or infinity, which are not JSON.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


class TensorBoard:
    """Writes every number of a log entry as a curve over the epochs; a callback of training.

    Args:
        folder: of TensorBoard's event files.
        last_epoch: the epoch that a resumed run goes on from; curves beyond it are those of this run.

    Raises:
        ImportError: if tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, last_epoch: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard logs need tensorboard: pip install 'arrcoc[tensorboard]'.") from error
        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=last_epoch + 1 if last_epoch else None)

    def __call__(self, model: Any, record: Record) -> None:
        """Write the entry of an epoch."""
        for name, value in record.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(record["epoch"]))
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()
