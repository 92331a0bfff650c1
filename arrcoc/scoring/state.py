"""How far a run of scoring has come: `run.json`, written anew after every part, and `skipped.jsonl`.

A part counts once run.json names it. What a killed run leaves beyond that is written over by the run that resumes it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arrcoc._files import write_json, write_text

_FORMAT = "arrcoc-scores-1"
_STATE, _SKIPPED = "run.json", "skipped.jsonl"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A line of skipped.jsonl: a picture that was not scored, and why."""

    number: int
    image: str
    reason: str
    error: str


class PartDigest:
    """What a part was made of: its pictures and queries in order, as one hash."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, queries: Sequence[str]) -> None:
        """Count a picture in."""
        self._hash.update(json.dumps([name, *queries]).encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash of named weights, whatever their device."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()[:16]


class RunState:
    """The folder of an output, and what of it is done.

    Args:
        folder: the output; new or empty unless the run is resumed.
        settings: what makes the records what they are; values that JSON has.
        resume: go on with what is there; a new or empty folder is started.

    Attributes:
        num_pictures: pictures in the parts that are done, skipped ones included.
        num_records: records in these parts.
        skipped: reason -> number of pictures.
        parts: digest of each part that is done.

    Raises:
        FileExistsError: if the folder is not empty and ``resume`` is False.
        ValueError: if the folder holds no run, or one with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.settings = settings
        self.num_pictures, self.num_records = 0, 0
        self.skipped: Counter[str] = Counter()
        self.parts: list[str] = []
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"output must be a folder, got the file {str(folder)!r}.")
        # a dot starts what a killed run was just writing
        occupied = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
        if occupied and not resume:
            raise FileExistsError(
                f"output {str(folder)!r} is not empty: resume the run that is in it, or choose another folder."
            )
        if occupied:
            self._read()
        else:
            self._write()

    def add_part(self, num_pictures: int, num_records: int, skipped: Iterable[Skipped], digest: PartDigest) -> None:
        """Note that the next part is written."""
        skipped = sorted(skipped, key=lambda entry: entry.number)
        if skipped:
            path = self.folder / _SKIPPED
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            lines = [json.dumps(asdict(entry)) + "\n" for entry in skipped]
            write_text(path, before + "".join(lines))
        self.num_pictures += num_pictures
        self.num_records += num_records
        self.skipped.update(entry.reason for entry in skipped)
        self.parts.append(str(digest))
        self._write()

    def _write(self) -> None:
        state = {"format": _FORMAT, "settings": self.settings}
        names = ("num_pictures", "num_records", "skipped", "parts")
        write_json(self.folder / _STATE, state | {name: getattr(self, name) for name in names})

    def _read(self) -> None:
        path = self.folder / _STATE
        if not path.is_file():
            raise ValueError(f"output {str(self.folder)!r} holds no run to resume: {_STATE} is missing.")
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if state.get("format") != _FORMAT:
            raise ValueError(f"{path} must have format {_FORMAT!r}, got {state.get('format')!r}.")
        for name, value in self.settings.items():
            before = state["settings"].get(name)
            if before != value:
                raise ValueError(
                    f"{name} must be {before!r}, as in the run that is resumed ({str(self.folder)!r}), got {value!r}."
                )
        self.num_pictures, self.num_records = state["num_pictures"], state["num_records"]
        self.skipped, self.parts = Counter(state["skipped"]), state["parts"]
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        for path in self.folder.glob(".*"):
            if path.name.startswith((".part-", f".{Path(_STATE).stem}.", f".{Path(_SKIPPED).stem}.")):
                path.unlink()
        path = self.folder / _SKIPPED
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if json.loads(line)["number"] < self.num_pictures))
