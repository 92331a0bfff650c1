"""Tokens of the frozen backbone, kept on disk: a picture is encoded once, whatever run or epoch asks for it.

    folder/SPACE/space.json       what the tokens depend on besides the picture
    folder/SPACE/000001.tokens    records of one writer, all of one size: levels x (N patches, then pooled) x D values
    folder/SPACE/000001.index     one line a record: key of the picture, number of the record, checksum

Stale entries cannot be: the key is the hash of the pixels, and the space holds the backbone's weights, mode, type and
sizes, so whatever changes the tokens changes their address. A record is written before its line; a writer that is
interrupted leaves at most a record without a line or a torn line, and both are passed over. Every writer has a part of
its own, and readers see all of them. A checksum is verified before an entry is first used; a damaged entry counts as
missing.

Axes: B pictures, N tokens, D embedding width, L levels.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arrcoc._files import write_json
from arrcoc.tokens import VisualTokens, fuse

if TYPE_CHECKING:
    from arrcoc.model.relevance import RelevanceModel

_FORMAT = "arrcoc-tokens-1"  # another number if the meaning of the records changes
_LINE = re.compile(r"([0-9a-f]{32}) (\d+) ([0-9a-f]{8})\n")
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}  # numpy has no bfloat16


class TokenCacheWarning(UserWarning):
    """Entries of a token cache were damaged and are encoded anew."""


def picture_key(image: Tensor) -> str:
    """32 hex digits that depend on the type, shape and bits of a picture [3, H, W]: the start of their SHA-256."""
    digest = hashlib.sha256(f"{image.dtype} {list(image.shape)} ".encode())
    digest.update(image.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Record:
    """Where an entry lies."""

    part: Path
    row: int
    checksum: int


class _Part:
    """A file of records, mapped and not read: the bits of all that are whole, [rows, L, N + 1, D]."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = math.prod(shape)
        num_rows = len(self._map) // (size * dtype.itemsize)
        bits = np.frombuffer(self._map, f"i{dtype.itemsize}", num_rows * size)
        self.rows: NDArray[np.signedinteger[Any]] = bits.reshape(num_rows, *shape)

    def release(self) -> None:
        """Give the pages that were read back to the system, which keeps the file in its own memory if it has some."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class TokenCache:
    """Tokens of square pictures on disk, for one model's backbone and scales.

    Args:
        folder: holds the tokens of any number of backbones and sizes, each in a folder of its own; made if missing.
            To make room, delete a folder when no run uses it.
        model: gives the backbone and the scales.
        dtype: torch.float32 keeps every bit; torch.float16 and torch.bfloat16 halve the size and round.

    Attributes:
        grid: (h, w) of the tokens.
        damaged: keys of pictures whose every entry was found to be damaged.

    Raises:
        ValueError: for another dtype, a backbone whose last blocks are trained, or a folder that holds something else.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: RelevanceModel, *, dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in _BITS:
            raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}.")
        if model.backbone.num_trained:
            raise ValueError("the backbone must be frozen for its tokens to be kept, got one whose blocks are trained.")
        self.space = _space(model, dtype)
        backbone = model.backbone
        self.grid = square_grid(model)
        self.dtype, self.device = dtype, backbone.device
        self._shape = (len(model.multiscale.scales), self.grid[0] * self.grid[1] + 1, backbone.embed_dim)
        digest = hashlib.sha256(json.dumps(self.space, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / f"{re.sub(r'[^A-Za-z0-9]+', '-', backbone.spec)[-40:]}-{digest}"
        self._check_folder()
        self.damaged: set[str] = set()
        self._found: dict[str, list[_Record]] = {}
        self._whole: dict[str, _Record] = {}
        self._writer: tuple[Path, FileIO, FileIO] | None = None
        self._num_written = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again for what other processes have written meanwhile."""
        self._found = {}
        size = self._record_bytes
        for index in sorted(self.folder.glob("*.index")):
            part = index.with_suffix(".tokens")
            num_rows = part.stat().st_size // size if part.is_file() else 0
            for line in index.read_text(encoding="ascii", errors="replace").splitlines(keepends=True):
                if (match := _LINE.fullmatch(line)) and int(match[2]) < num_rows:
                    record = _Record(part, int(match[2]), int(match[3], 16))
                    self._found.setdefault(match[1], []).append(record)

    def __len__(self) -> int:
        """Pictures that have an entry."""
        return len(self._found)

    def __contains__(self, key: str) -> bool:
        """Whether a picture, by its `picture_key`, has an entry that is whole."""
        return self._find(key) is not None

    def keys(self) -> frozenset[str]:
        """Keys of all pictures that have an entry, verified or not."""
        return frozenset(self._found)

    def fits(self, model: RelevanceModel) -> bool:
        """Whether the tokens are those of this model's backbone and scales."""
        return _space(model, self.dtype) == self.space and not model.backbone.num_trained

    @property
    def num_bytes(self) -> int:
        """Size of all parts on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

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
        data = values.view(torch.uint8).numpy().tobytes()
        part, records, index = self._writer or self._open_part()
        record = _Record(part, self._num_written, _checksum(key, data))
        try:
            _write(records, data)
            _write(index, f"{key} {record.row} {record.checksum:08x}\n".encode())
        except BaseException:
            self.close()  # whatever stands at the end of this part, nothing follows it
            raise
        self._num_written += 1
        self._found.setdefault(key, []).append(record)
        self._whole[key] = record

    def close(self) -> None:
        """Close this writer's part; the next `put` begins another one."""
        if self._writer is not None:
            for file in self._writer[1:]:
                file.close()
        self._writer, self._num_written = None, 0

    def __del__(self) -> None:
        if getattr(self, "_writer", None) is not None:
            self.close()

    def tokens(self, keys: Sequence[str]) -> CachedTokens:
        """The tokens of pictures by their keys, to be read when they are selected.

        Raises:
            KeyError: if one has no entry that is whole.
        """
        records = []
        for key in keys:
            record = self._find(key)
            if record is None:
                raise KeyError(f"picture {key} has no entry in {self.folder}.")
            records.append(record)
        return CachedTokens(records, self._shape, self.grid, self.dtype, self.device)

    @property
    def _record_bytes(self) -> int:
        return math.prod(self._shape) * self.dtype.itemsize

    def _find(self, key: str) -> _Record | None:
        """The first entry of a picture that is whole; each is verified once."""
        if key not in self._whole and key in self._found:
            for record in self._found[key]:
                data = _Part(record.part, self._shape, self.dtype).rows[record.row].tobytes()
                if _checksum(key, data) == record.checksum:
                    self._whole[key] = record
                    break
            else:
                self.damaged.add(key)
                del self._found[key]
        return self._whole.get(key)

    def _open_part(self) -> tuple[Path, FileIO, FileIO]:
        """A new part with the next free number; two processes never get the same one."""
        number = 1 + max((int(path.stem) for path in self.folder.glob("*.tokens")), default=0)
        while True:
            part = self.folder / f"{number:06d}.tokens"
            try:
                records = part.open("xb", buffering=0)
            except FileExistsError:
                number += 1
                continue
            self._writer = (part, records, part.with_suffix(".index").open("xb", buffering=0))
            return self._writer

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
    """Tokens of S pictures in a `TokenCache`: what is selected is read, and nothing stays in memory.

    The files are mapped, and after each selection their pages are given back: a process does not grow as it reads.
    """

    def __init__(
        self,
        records: Sequence[_Record],
        shape: tuple[int, int, int],
        grid: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.grid, self.dtype, self.device = grid, dtype, device
        self._records, self._shape = list(records), shape
        self._parts: dict[Path, _Part] = {}

    def __len__(self) -> int:
        return len(self._records)

    def select(self, index: Tensor) -> VisualTokens:
        """Tokens, in float32, of the pictures that an integer tensor [B] names."""
        num_levels, length, width = self._shape
        patches_LBND = torch.empty(num_levels, len(index), length - 1, width, dtype=_BITS[self.dtype])
        pooled_LBD = torch.empty(num_levels, len(index), width, dtype=_BITS[self.dtype])
        for place, number in enumerate(index.tolist()):
            record = self._records[number]
            if record.part not in self._parts:
                self._parts[record.part] = _Part(record.part, self._shape, self.dtype)
            stored = self._parts[record.part].rows[record.row]
            np.copyto(patches_LBND[:, place].numpy(), stored[:, :-1])
            np.copyto(pooled_LBD[:, place].numpy(), stored[:, -1])
        for part in self._parts.values():
            part.release()
        patches_LBND, pooled_LBD = (
            bits.view(self.dtype).to(self.device, torch.float32) for bits in (patches_LBND, pooled_LBD)
        )
        levels = (VisualTokens(*level, self.grid) for level in zip(patches_LBND, pooled_LBD, strict=True))
        return fuse(tuple(levels))


def square_grid(model: RelevanceModel) -> tuple[int, int]:
    """The grid of pictures that are squashed to a square."""
    stride = model.backbone.stride
    height, width = model.backbone.input_size(1, 1, scale=model.multiscale.base_scale)
    return height // stride[0], width // stride[1]


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


def _checksum(key: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key.encode()))


def _write(file: FileIO, data: bytes) -> None:
    """Write all of it: an unbuffered file may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
