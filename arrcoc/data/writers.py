"""Any data set as a manifest or as WebDataset shards: pictures and masks as PNG, complete or absent."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from arrcoc._files import atomic_path, save_picture, write_text
from arrcoc.data.sample import RelevanceSample


def write_shards(
    samples: Iterable[RelevanceSample], folder: str | os.PathLike[str], *, per_shard: int = 1000
) -> list[Path]:
    """Write samples as WebDataset shards ``000000.tar``, ``000001.tar``, ...

    Args:
        samples: of any data set, read once.
        folder: where they go; made if it is missing.
        per_shard: samples a shard; >= 1.

    Returns:
        the shards, in order.

    Raises:
        ValueError: if per_shard is < 1 or there is no sample.
        FileExistsError: if the folder has shards already.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard must be >= 1, got {per_shard!r}.")
    folder = Path(folder)
    if any(folder.glob("*.tar")):
        raise FileExistsError(f"folder must have no shards in it, got {str(folder)!r}.")
    numbered = enumerate(samples)
    shards: list[Path] = []
    while batch := next(numbered, None):
        path = folder / f"{len(shards):06d}.tar"
        with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
            for number, sample in chain([batch], islice(numbered, per_shard - 1)):
                key = f"{number:09d}"
                line, masks = _describe(sample, "mask{}.png")
                _add(tar, f"{key}.png", _png(_picture(sample)))
                for name, mask in masks.items():
                    _add(tar, f"{key}.{name}", _png(mask))
                _add(tar, f"{key}.json", json.dumps(line, ensure_ascii=False).encode())
        shards.append(path)
    if not shards:
        raise ValueError("samples must hold at least one sample, got none.")
    return shards


def write_manifest(samples: Iterable[RelevanceSample], folder: str | os.PathLike[str]) -> Path:
    """Write samples as ``manifest.jsonl`` with ``images/`` and ``masks/``; the manifest is written last.

    Args:
        samples: of any data set, read once.
        folder: where they go; made if it is missing.

    Returns:
        path of the manifest.

    Raises:
        ValueError: if there is no sample.
        FileExistsError: if the folder has a manifest already.
    """
    folder = Path(folder)
    path = folder / "manifest.jsonl"
    if path.exists():
        raise FileExistsError(f"folder must have no manifest in it, got {str(folder)!r}.")
    lines = []
    for number, sample in enumerate(samples):
        line, masks = _describe(sample, f"masks/{number:09d}_{{}}.png")
        line["image"] = f"images/{number:09d}.png"
        save_picture(folder / line["image"], _picture(sample))
        for name, mask in masks.items():
            save_picture(folder / name, mask)
        lines.append(json.dumps(line, ensure_ascii=False))
    if not lines:
        raise ValueError("samples must hold at least one sample, got none.")
    write_text(path, "\n".join(lines) + "\n")
    return path


def _describe(sample: RelevanceSample, mask_name: str) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """A manifest line without "image", and the masks that it names."""
    queries: list[dict[str, Any]] = []
    masks = {}
    for number, (text, mask) in enumerate(zip(sample.queries, sample.masks.numpy(), strict=True)):
        if mask.any():
            name = mask_name.format(number)
            queries.append({"text": text, "mask": name})
            masks[name] = Image.fromarray(mask)
        else:
            queries.append({"text": text, "absent": True})
    return {"name": sample.name, "queries": queries}, masks


def _picture(sample: RelevanceSample) -> Image.Image:
    pixels = (sample.image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
