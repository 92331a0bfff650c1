"""Score many pictures: workers decode, the tower sees batches of one shape, records come in the order of the inputs.

The stream is cut into parts of ``part_size`` pictures. A part is scored, written and noted before the next one starts,
and nothing is carried over, so a run that was cut goes on at its next part and writes what it would have written.
"""

from __future__ import annotations

import operator
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arrcoc.data.records import Record
from arrcoc.model.allocation import num_tokens_of
from arrcoc.scorer import RelevanceScorer, check_queries
from arrcoc.scoring.inputs import BrokenInput, Input, read_inputs
from arrcoc.scoring.part import Part
from arrcoc.scoring.prepare import Broken, Task, prepare
from arrcoc.scoring.state import PartDigest, RunState, fingerprint
from arrcoc.scoring.tables import WRITERS, Layout, import_pyarrow, part_name


@dataclass(frozen=True, kw_only=True)
class ScoringSummary:
    """What a run of ``score_many`` did.

    Args:
        num_pictures: pictures of the stream; scored and skipped ones.
        num_scored: pictures with records.
        num_records: records, one for each picture and query.
        num_skipped: reason -> number of pictures.
        num_resumed: of the pictures, those that an earlier run had done.
        seconds: time of this run, from its first new picture on.
    """

    num_pictures: int
    num_scored: int
    num_records: int
    num_skipped: dict[str, int]
    num_resumed: int
    seconds: float

    @property
    def pictures_per_second(self) -> float:
        """Throughput of this run, resumed pictures not counted."""
        return (self.num_pictures - self.num_resumed) / self.seconds

    def __str__(self) -> str:
        new = self.num_pictures - self.num_resumed
        before = f" ({self.num_resumed} were done before)" if self.num_resumed else ""
        lines = [
            f"{self.num_scored} pictures scored, {self.num_records} records; "
            f"{new} pictures in {self.seconds:.1f} s, {self.pictures_per_second:.1f} pictures/s{before}"
        ]
        lines += [f"{number} skipped: {reason}" for reason, number in sorted(self.num_skipped.items())]
        return "\n".join(lines)


def score_many(
    scorer: RelevanceScorer,
    inputs: Input | Iterable[Input],
    queries: Iterable[str] | None = None,
    *,
    output: str | os.PathLike[str],
    format: str = "jsonl",
    budget: int | float | None = None,
    precision: str = "float32",
    logits: bool = False,
    batch_size: int | None = None,
    part_size: int = 1000,
    num_workers: int = 2,
    on_error: str = "raise",
    shard_texts: str = "json",
    resume: bool = False,
    progress: bool | None = None,
) -> ScoringSummary:
    """Score every picture of a stream for its queries, into tables of relevance.

    The records are those of ``scorer.score``, up to the rounding of a batched pass. Memory does not grow with the
    stream: what is held is the pictures that wait for their batch, at most 8 batches of them, and the maps of a part.

    Args:
        scorer: scores; one pass of its vision tower (a scale) serves all queries of a picture.
        inputs: files, folders, manifests, shards, records; see ``read_inputs``.
        queries: asked of every picture, whatever it brings; None for each picture's own, of a manifest or shard.
        output: folder for ``part-00000.jsonl`` (or ``.parquet``) and so on, ``run.json``, and ``skipped.jsonl`` if
            pictures were skipped.
        format: "jsonl" or "parquet".
        budget: adds the tokens to keep, a number of them (int) or a share (float) as in ``RelevanceResult.keep``; None
            for none.
        precision: "float32" or "float16", of maps in Parquet; in JSON 6 or 4 decimals.
        logits: write the relevance logits too.
        batch_size: pictures that go through the tower together, >= 1; None for 2 on a CPU, which larger batches slow
            down, and 32 elsewhere.
        part_size: pictures of a part, >= 1; a run that is cut loses less than one.
        num_workers: processes that decode and resize; 0 does it in this one.
        on_error: "raise" stops at the first picture that cannot be scored, "skip" writes it to ``skipped.jsonl``,
            counts it and goes on.
        shard_texts: where the queries of shards are, if they are asked for: "json" or "txt"; see ``iterate_shards``.
        resume: go on after the last part that an earlier run completed.
        progress: show a bar; None for: on a terminal.

    Returns:
        What was done.

    Raises:
        ValueError: for bad settings or pictures, or if the run to resume had other settings or inputs.
        FileExistsError: if output is not empty and resume is False.
        FileNotFoundError: if an input is missing.
        ImportError: for Parquet without pyarrow.
    """
    texts = None if queries is None else check_queries(queries)
    layout = Layout(precision=precision, logits=logits, kept=budget is not None)
    if batch_size is None:
        batch_size = 2 if scorer.model.backbone.device.type == "cpu" else 32
    _check(format, on_error, batch_size, part_size, num_workers)
    settings = _identity(scorer) | {
        "queries": None if texts is None else list(texts),
        "budget": _describe_budget(budget),
        "format": format,
        "precision": precision,
        "logits": logits,
        "part_size": part_size,
    }
    stream = read_inputs(inputs, on_error=on_error, shard_texts=shard_texts if texts is None else "none")
    tasks = _tasks(stream, texts)
    first = next(tasks, None)
    if first is None:
        raise ValueError("inputs must hold at least one picture, got none.")
    tasks = chain([first], tasks)
    state = RunState(Path(output), settings, resume=resume)
    _pass_over(tasks, state, part_size)
    num_resumed = state.num_pictures
    started = time.perf_counter()
    ready = prepare(tasks, scorer.model.backbone, scorer.scales, num_workers=num_workers)
    bar = tqdm(unit=" pictures", initial=num_resumed, disable=None if progress is None else not progress)
    with bar, closing(ready):
        while True:
            part = Part(scorer, budget, layout, on_error)
            part.score(islice(ready, part_size), batch_size, bar.update)
            if not part.num_pictures:
                break
            scores = part.in_order()
            WRITERS[format](state.folder / part_name(len(state.parts), format), scores, layout)
            state.add_part(part.num_pictures, len(scores), part.skipped, part.digest)
    return ScoringSummary(
        num_pictures=state.num_pictures,
        num_scored=state.num_pictures - state.skipped.total(),
        num_records=state.num_records,
        num_skipped=dict(state.skipped),
        num_resumed=num_resumed,
        seconds=time.perf_counter() - started,
    )


def _tasks(inputs: Iterable[Record | BrokenInput], texts: tuple[str, ...] | None) -> Iterator[Task | Broken]:
    for number, entry in enumerate(inputs):
        if isinstance(entry, BrokenInput):
            error = ValueError(str(entry.error))  # a plain one, that goes to a worker and back
            yield Broken(number=number, name=entry.name, queries=(), reason=entry.error.reason, error=error)
            continue
        task = Task(number=number, name=entry.name, image=entry.image, queries=texts or tuple(entry.queries))
        try:
            check_queries(task.queries)
        except ValueError as refusal:
            yield task.broken("no query", refusal)
        else:
            yield task


def _pass_over(tasks: Iterator[Task | Broken], state: RunState, part_size: int) -> None:
    """Skip the pictures of the parts that are done, and see that they are the same ones."""
    for part, expected in enumerate(state.parts):
        digest = PartDigest()
        for task in islice(tasks, part_size):
            digest.add(task.name, task.queries)
        if str(digest) != expected:
            last = min((part + 1) * part_size, state.num_pictures) - 1
            raise ValueError(
                f"inputs must be those of the run in {str(state.folder)!r} to resume it: "
                f"pictures {part * part_size} to {last}, or their queries, are not the same."
            )


def _identity(scorer: RelevanceScorer) -> dict[str, Any]:
    """What of a scorer decides about its results."""
    model = scorer.model
    return {
        "backbone": model.backbone.fingerprint(),
        "mode": model.backbone.mode,
        "dtype": str(model.backbone.dtype),
        "head": None if model.head is None else fingerprint(model.head.state_dict()),
        "scales": list(scorer.scales),
    }


def _describe_budget(budget: int | float | None) -> str | None:
    """The budget as text, for 1 is one token and 1.0 all of them."""
    if budget is None:
        return None
    num_tokens_of(budget, sys.maxsize)  # refuses what no grid allows
    return str(operator.index(budget)) if hasattr(budget, "__index__") else str(float(budget))


def _check(format: str, on_error: str, batch_size: int, part_size: int, num_workers: int) -> None:
    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}, got {format!r}.")
    if format == "parquet":
        import_pyarrow()
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("part_size", part_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value!r}.")
