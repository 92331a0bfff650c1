"""Training checkpoints: everything a resume needs, written atomically, read without executing code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from arrcoc._files import atomic_path

_FORMAT = "arrcoc-training-2"


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors, numbers, strings, lists and dicts; the old one stays until it is complete."""
    with atomic_path(path) as temporary:
        torch.save({"format": _FORMAT, **state}, temporary)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what a killed process left beside the place of a checkpoint that it was writing."""
    for leftover in Path(path).parent.glob(f".{Path(path).stem}.*{Path(path).suffix}"):
        leftover.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, holds anything but data, or is not a training checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint to resume from at {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training checkpoint of format {_FORMAT!r}.")
    return state
