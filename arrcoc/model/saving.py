"""A relevance model in a folder: settings as JSON, trained tensors as safetensors, the backbone by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arrcoc._files import atomic_path, write_json
from arrcoc.backbones.base import Backbone
from arrcoc.config import HeadConfig
from arrcoc.model.head import RelevanceHead

_FORMAT = "arrcoc-relevance-1"
_SETTINGS = "config.json"
_HEAD = "head.safetensors"
_BLOCKS = "blocks.safetensors"
# What folders were written with before these were recorded.
_UNRECORDED = {"mode": "raw", "orientation": None, "train_blocks": 0}


def write_model(folder: Path, backbone: Backbone, head: RelevanceHead | None, components: dict[str, Any]) -> None:
    """Write the head, trained blocks of the backbone and, last, the settings: a folder that has them is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    if head is not None:
        _write_tensors(folder / _HEAD, head.state_dict())
    if backbone.num_trained:
        _write_tensors(folder / _BLOCKS, backbone.trained_state_dict())
    named = {
        "spec": backbone.spec,
        "fingerprint": backbone.fingerprint(),
        "mode": backbone.mode,
        "orientation": backbone.orientation,
        "train_blocks": backbone.num_trained,
    }
    shape = None if head is None else vars(head.config)
    write_json(folder / _SETTINGS, {"format": _FORMAT, "backbone": named, "head": shape, **components})


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder; ``orientation`` is None if it was not recorded.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are damaged or of another format.
    """
    path = folder / _SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no relevance model: {_SETTINGS} is missing.")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if settings.get("format") != _FORMAT:
        raise ValueError(f"{path} must have format {_FORMAT!r}, got {settings.get('format')!r}.")
    settings["backbone"] = _UNRECORDED | settings["backbone"]
    return settings


def read_head(folder: Path, shape: dict[str, Any] | None) -> RelevanceHead | None:
    """The head of a folder, on the CPU; None for a zero-shot model.

    Raises:
        ValueError: if its file is missing or damaged.
    """
    if shape is None:
        return None
    head = RelevanceHead(HeadConfig(**shape))
    with _reading(folder / _HEAD) as state:
        head.load_state_dict(state)
    return head


def restored_backbone(folder: Path, wanted: dict[str, Any], backbone: Backbone) -> Backbone:
    """The backbone itself, or a copy of it with the blocks that were trained.

    Raises:
        ValueError: if the model was trained on other weights or on tokens of another mode or orientation, or the file
            of the blocks is missing or damaged.
    """
    if backbone.fingerprint() != wanted["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on the backbone {wanted['spec']!r} with fingerprint {wanted['fingerprint']}, "
            f"got {backbone.spec!r} with {backbone.fingerprint()}: a head only fits the weights it was trained on."
        )
    orientation = wanted["orientation"] or backbone.orientation
    if (backbone.mode, backbone.orientation) != (wanted["mode"], orientation):
        raise ValueError(
            f"{folder} was trained on tokens of mode {wanted['mode']!r} and orientation {orientation:+d}, "
            f"got a backbone with mode {backbone.mode!r} and orientation {backbone.orientation:+d}."
        )
    if backbone.num_trained not in (0, wanted["train_blocks"]):
        raise ValueError(
            f"{folder} was trained with {wanted['train_blocks']} blocks of the backbone, "
            f"got a backbone with {backbone.num_trained} trained blocks of its own."
        )
    if not wanted["train_blocks"]:
        return backbone
    backbone = backbone.trainable_copy(wanted["train_blocks"])
    with _reading(folder / _BLOCKS) as state:
        backbone.load_trained(state)
    return backbone


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


@contextmanager
def _reading(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file; what is wrong with them is said of the file."""
    try:
        yield load_file(path)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
