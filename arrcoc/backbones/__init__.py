"""Backbones: image-text models behind one protocol, loaded by name.

- `Backbone`: the protocol
- `load_backbone`: by name, offline, from open_clip or transformers
- `OpenClipBackbone`, `HuggingFaceBackbone`: wrap a model you already have
"""

from __future__ import annotations

import torch

from arrcoc.assets import asset_path
from arrcoc.backbones.base import Backbone
from arrcoc.backbones.hf import HuggingFaceBackbone, load_hf
from arrcoc.backbones.open_clip import OpenClipBackbone, load_local, load_pretrained
from arrcoc.backbones.specs import did_you_mean_spec

__all__ = ["Backbone", "HuggingFaceBackbone", "OpenClipBackbone", "load_backbone"]

_KINDS = ("embedded", "open_clip", "hf")
_FORMS = (
    "'embedded', 'open_clip:NAME/TAG', 'open_clip:NAME/WEIGHTS_FILE', 'open_clip:local-dir:FOLDER', 'hf:NAME' or "
    "'hf:FOLDER'"
)


def load_backbone(
    spec: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    mode: str | None = None,
) -> Backbone:
    """Load a backbone with its real weights, frozen; never one with random weights.

    Args:
        spec: ``"embedded"`` (ships with the package, offline), ``"open_clip:NAME/TAG"`` (downloaded once),
            ``"open_clip:NAME/WEIGHTS_FILE"``, ``"open_clip:local-dir:FOLDER"``; for a transformers model ``"hf:NAME"``
            (downloaded once) or ``"hf:FOLDER"``.
        device: None means the CPU.
        dtype: floating point type to compute in; None means float32. The fingerprint is that of the weights before.
        mode: how patch tokens are read, one of ``backbone.modes``; None for the default of the tower.

    Returns:
        A `Backbone`.

    Raises:
        ValueError: if spec, dtype or mode is unknown, or the weights do not fit the model or are no numbers.
        FileNotFoundError: if a folder, its configuration or its weights are missing.
        ConnectionError: if weights must be downloaded and cannot be.

    Example:
        >>> backbone = load_backbone("embedded")                    # doctest: +SKIP
        >>> backbone(images).grid, backbone.encode_text(["a cup"])  # doctest: +SKIP
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating point type of torch, got {dtype!r}.")
    backbone = _load(spec, mode)
    for name, value in backbone.model.state_dict().items():
        if not value.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"weights of {spec!r} must be finite numbers, and those of {name!r} are not.")
    return backbone.to(device=device or "cpu", dtype=dtype or torch.float32)


def _load(spec: str, mode: str | None) -> Backbone:
    if not isinstance(spec, str):
        raise ValueError(f"backbone must be {_FORMS}, got {spec!r}.")
    if spec == "embedded":
        return load_local(asset_path("embedded_clip"), spec=spec, mode=mode)
    kind, _, rest = spec.partition(":")
    if kind == "open_clip" and rest.startswith("local-dir:"):
        if folder := rest.removeprefix("local-dir:"):
            return load_local(folder, spec=spec, mode=mode)
    elif kind == "open_clip" and rest:
        return load_pretrained(rest, spec=spec, mode=mode)
    elif kind == "hf" and rest:
        return load_hf(rest, spec=spec, mode=mode)
    raise ValueError(f"backbone must be {_FORMS}, got {spec!r}{did_you_mean_spec(spec, _KINDS)}.")
