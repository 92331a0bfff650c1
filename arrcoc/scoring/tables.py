"""Tables of relevance: a record for each picture and query, JSON lines or Parquet, in parts that are whole or absent.

Axes: K kept tokens, h and w grid height and width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrcoc._files import atomic_path

# Decimals of numbers in JSON, by precision: about what the type itself resolves near 1.
_DECIMALS = {"float32": 6, "float16": 4}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns a table has, and how exact they are.

    Args:
        precision: "float32" or "float16", of the maps in Parquet; in JSON 6 or 4 decimals.
        logits: with the relevance logits.
        kept: with the tokens within the budget.
    """

    precision: str = "float32"
    logits: bool = False
    kept: bool = False

    def __post_init__(self) -> None:
        if self.precision not in _DECIMALS:
            raise ValueError(f"precision must be one of {', '.join(_DECIMALS)}, got {self.precision!r}.")


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Score:
    """Relevance of one picture for one query.

    Args:
        number: the picture's position in the inputs, from 0.
        image: its name.
        query: the text.
        relevance: float32 [h, w] in [0, 1].
        logits: float32 [h, w]; None if the layout is without.
        kept: int32 [K], row-major numbers of the tokens within the budget, ascending; None if the layout is without.
    """

    number: int
    image: str
    query: str
    relevance: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    kept: NDArray[np.int32] | None


def write_jsonl(path: Path, scores: Sequence[Score], layout: Layout) -> None:
    """Scores as JSON lines, atomically; maps are lists of rows."""
    decimals = _DECIMALS[layout.precision]

    def rounded(values: NDArray[np.float32] | np.float32) -> Any:
        return values.astype(np.float64).round(decimals).tolist()

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for score in scores:
            record: dict[str, Any] = {
                "number": score.number,
                "image": score.image,
                "query": score.query,
                "grid": list(score.relevance.shape),
                "peak": rounded(score.relevance.max()),
                "relevance": rounded(score.relevance),
            }
            if score.logits is not None:
                record["logits"] = rounded(score.logits)
            if score.kept is not None:
                record["kept"] = score.kept.tolist()
            file.write(json.dumps(record, allow_nan=False) + "\n")


def write_parquet(path: Path, scores: Sequence[Score], layout: Layout) -> None:
    """Scores as Parquet, atomically; maps are row-major lists.

    Bytes of a file's name that are not UTF-8, which JSON can hold and Parquet cannot, are written as ``\\udcXX``.
    """
    pa, parquet = import_pyarrow()
    real = np.dtype(layout.precision)

    def lists(rows: Sequence[Any], dtype: Any) -> Any:
        flat = [np.asarray(row, dtype).reshape(-1) for row in rows]
        offsets = np.cumsum([0, *map(len, flat)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, np.concatenate([np.empty(0, dtype), *flat]))

    columns = {
        "number": pa.array([score.number for score in scores], pa.int64()),
        "image": pa.array([score.image.encode(errors="backslashreplace") for score in scores]).cast(pa.string()),
        "query": pa.array([score.query for score in scores], pa.string()),
        "grid": lists([score.relevance.shape for score in scores], np.int32),
        "peak": pa.array([score.relevance.max().item() for score in scores], pa.float32()),
        "relevance": lists([score.relevance for score in scores], real),
    }
    if layout.logits:
        columns["logits"] = lists([score.logits for score in scores], real)
    if layout.kept:
        columns["kept"] = lists([score.kept for score in scores], np.int32)
    with atomic_path(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)


WRITERS: dict[str, Callable[[Path, Sequence[Score], Layout], None]] = {"jsonl": write_jsonl, "parquet": write_parquet}


def part_name(number: int, format: str) -> str:
    """File name of a part."""
    return f"part-{number:05d}.{format}"


def read_scores(output: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of an output of ``score_many``, one at a time, in the order of the inputs.

    ``numpy.reshape(record["relevance"], record["grid"])`` is the map in either format.

    Raises:
        FileNotFoundError: if the folder holds no parts.
        ImportError: for Parquet without pyarrow.
    """
    paths = sorted(path for format in WRITERS for path in Path(output).glob(f"part-*.{format}"))
    if not paths:
        raise FileNotFoundError(f"{str(output)!r} holds no scores: there is no part-*.jsonl and no part-*.parquet.")
    for path in paths:
        if path.suffix == ".parquet":
            yield from import_pyarrow()[1].read_table(path).to_pylist()
        else:
            with path.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)


def import_pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'arrcoc[parquet]'.") from error
    return pyarrow, pyarrow.parquet
