"""Tokens of the frozen backbone, kept on disk: a picture is encoded once, whatever run or epoch asks for it.

    folder/SPACE/space.json    what the tokens depend on besides the picture
    folder/SPACE/...           a `RecordStore`: levels x (N patches, then pooled) x D values by the key of the picture

No entry can be stale: the key is the hash of the pixels, and the space holds the backbone's weights, mode, type and
sizes, so whatever changes the tokens changes their address.

Axes: B pictures, N tokens, D embedding width, L levels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arrcoc._files import write_json
from arrcoc.tokens import VisualTokens, fuse
from arrcoc.training.record_store import MappedPart, Record, RecordStore

if TYPE_CHECKING:
    from arrcoc.model.relevance import RelevanceModel

_FORMAT = "arrcoc-tokens-1"  # another number if the meaning of the records changes
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TokenCacheWarning(UserWarning):
    """Entries of a token cache were damaged and are encoded anew."""


def picture_key(image: Tensor) -> str:
    """32 hex digits that depend on the type, shape and bits of a picture [3, H, W]: the start of their SHA-256."""
    digest = hashlib.sha256(f"{image.dtype} {list(image.shape)} ".encode())
    digest.update(image.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


def square_grid(model: RelevanceModel) -> tuple[int, int]:
    """The grid of pictures that are squashed to a square."""
    stride = model.backbone.stride
    height, width = model.backbone.input_size(1, 1, scale=model.multiscale.base_scale)
    return height // stride[0], width // stride[1]


class TokenCache:
    """Tokens of squashed pictures on disk, for one model's backbone and scales.

    Any number of processes may read and write at once. An entry that is damaged counts as missing.

    Args:
        folder: holds the tokens of any number of backbones and sizes, each in a folder of its own; made if missing.
            To make room, delete a folder when no run uses it.
        model: gives the backbone and the scales.
        dtype: torch.float32 keeps every bit; torch.float16 and torch.bfloat16 halve the size and round.

    Attributes:
        folder: where this model's tokens are.
        grid: (h, w) of the tokens.

    Raises:
        ValueError: for another dtype, a backbone whose last blocks are trained, or a folder that holds something else.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: RelevanceModel, *, dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}.")
        if model.backbone.num_trained:
            raise ValueError("the backbone must be frozen for its tokens to be kept, got one whose blocks are trained.")
        self.space = _space(model, dtype)
        self.grid, self.dtype, self.device = square_grid(model), dtype, model.backbone.device
        self._shape = (len(model.multiscale.scales), math.prod(self.grid) + 1, model.backbone.embed_dim)
        name = re.sub(r"[^A-Za-z0-9]+", "-", model.backbone.spec)[-40:]
        digest = hashlib.sha256(json.dumps(self.space, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / f"{name}-{digest}"
        self._check_folder()
        self._store = RecordStore(self.folder, math.prod(self._shape) * dtype.itemsize)

    def __len__(self) -> int:
        """Pictures that have an entry."""
        return len(self._store.keys())

    def __contains__(self, key: str) -> bool:
        """Whether a picture, by its `picture_key`, has an entry that is whole."""
        return self._store.find(key) is not None

    def keys(self) -> frozenset[str]:
        """Keys of all pictures that have an entry, verified or not."""
        return self._store.keys()

    @property
    def damaged(self) -> frozenset[str]:
        """Keys of pictures whose every entry was found to be damaged."""
        return frozenset(self._store.damaged)

    @property
    def num_bytes(self) -> int:
        """Size of all entries on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def fits(self, model: RelevanceModel) -> bool:
        """Whether the tokens are those of this model's backbone and scales."""
        return _space(model, self.dtype) == self.space and not model.backbone.num_trained

    def refresh(self) -> None:
        """Look again for what other processes have written meanwhile."""
        self._store.refresh()

    def close(self) -> None:
        """Close the files that `put` holds open; it opens new ones."""
        self._store.close()

    def put(self, key: str, tokens: VisualTokens) -> None:
        """Write the tokens of one picture.

        Raises:
            ValueError: if they are not of one picture, or have another grid, width or number of levels.
            OSError: if they cannot be written; what was written before stays.
        """
        levels = tokens.levels or (tokens,)
        shape = (len(levels), tokens.num_tokens + 1, tokens.patches.shape[2])
        if len(tokens) != 1 or shape != self._shape or tokens.grid != self.grid:
            raise ValueError(
                f"tokens must be of one picture on the grid {self.grid}, {self._shape[0]} levels of width "
                f"{self._shape[2]}, got {len(tokens)} on {tokens.grid}, {shape[0]} of width {shape[2]}."
            )
        values = torch.stack([torch.cat([level.patches[0], level.pooled]) for level in levels]).to("cpu", self.dtype)
        self._store.put(key, values.view(torch.uint8).numpy().tobytes())

    def tokens(self, keys: Sequence[str]) -> CachedTokens:
        """The tokens of pictures by their keys, to be read when they are selected.

        Raises:
            KeyError: if one has no entry that is whole.
        """
        records = []
        for key in keys:
            record = self._store.find(key)
            if record is None:
                raise KeyError(f"picture {key} has no entry in {self.folder}.")
            records.append(record)
        return CachedTokens(records, self._shape, self.grid, self.dtype, self.device)

    def _check_folder(self) -> None:
        path = self.folder / "space.json"
        if not path.is_file():
            write_json(path, self.space)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}; delete its folder.") from error
        if stored != self.space:
            raise ValueError(f"{path} must describe {self.space}, got {stored}; delete its folder.")


class CachedTokens:
    """Tokens of S pictures in a `TokenCache`: what is selected is read, and nothing stays in memory."""

    def __init__(
        self,
        records: Sequence[Record],
        shape: tuple[int, int, int],
        grid: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.grid, self.dtype, self.device = grid, dtype, device
        self._records, self._shape = list(records), shape
        self._parts: dict[Path, MappedPart] = {}

    def __len__(self) -> int:
        return len(self._records)

    def select(self, index: Tensor) -> VisualTokens:
        """Tokens, in float32, of the pictures that an integer tensor [B] names."""
        num_levels, length, width = self._shape
        patches_LBND = torch.empty(num_levels, len(index), length - 1, width)
        pooled_LBD = torch.empty(num_levels, len(index), width)
        for place, number in enumerate(index.tolist()):
            stored = self._read(self._records[number])
            patches_LBND[:, place] = stored[:, :-1]
            pooled_LBD[:, place] = stored[:, -1]
        for part in self._parts.values():
            part.release()
        levels = (
            VisualTokens(patches.to(self.device), pooled.to(self.device), self.grid)
            for patches, pooled in zip(patches_LBND, pooled_LBD, strict=True)
        )
        return fuse(tuple(levels))

    def _read(self, record: Record) -> Tensor:
        """The values [L, N + 1, D] of one picture, still on disk."""
        if record.part not in self._parts:
            self._parts[record.part] = MappedPart(record.part, math.prod(self._shape) * self.dtype.itemsize)
        return self._parts[record.part].records[record.row].view(self.dtype).view(self._shape)


def _space(model: RelevanceModel, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that tokens depend on besides the picture. Orientation is not among it: who scores multiplies."""
    backbone = model.backbone
    return {
        "format": _FORMAT,
        "fingerprint": backbone.fingerprint(),
        "mode": backbone.mode,
        "computed_in": str(backbone.dtype),
        "stored_in": str(dtype),
        "sizes": [list(backbone.input_size(1, 1, scale=scale)) for scale in model.multiscale.scales],
        "grid": list(square_grid(model)),
        "embed_dim": backbone.embed_dim,
        "normalize_patches": backbone.normalize_patches,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
