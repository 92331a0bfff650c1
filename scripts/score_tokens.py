"""Score the tokens of pictures for text queries: heat maps for a few, tables of relevance for many.

A few pictures, each with an overlay, its kept tokens and its numbers:
  python scripts/score_tokens.py assets/photos/images/coffee.jpg --query "a cup" --output runs/scores

Many pictures, from folders, manifests (.jsonl) or WebDataset shards (.tar), as JSON lines or Parquet, resumable:
  python scripts/score_tokens.py assets/photos/images --query "a cup" "a cat" --output runs/table --format parquet
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import add_scorer_arguments, budget, count, load_scorer, positive, run

if TYPE_CHECKING:
    from PIL.Image import Image

    from arrcoc import RelevanceResult, RelevanceScorer
    from arrcoc.data.records import Record

_TABLES = ("jsonl", "parquet")
_MOST_TILES = 60  # of overview.png


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _score, argv)


def _score(arguments: argparse.Namespace) -> None:
    from arrcoc.scoring.inputs import kind_of

    kinds = {kind_of(entry) for entry in arguments.inputs}
    format = arguments.format or ("pictures" if kinds == {"picture"} else "jsonl")
    queries = arguments.query or (_read_queries(arguments.queries) if arguments.queries else None)
    if queries is None and kinds & {"picture", "folder"}:
        raise ValueError("--query or --queries must be given: only manifests and shards bring queries of their own.")
    if format == "pictures":
        defaults = _parser().parse_args(["-", "--output", "-"])
        for name in ("overlays", "on_error", "resume", "batch_size", "part_size", "workers", "precision", "logits"):
            if getattr(arguments, name) != getattr(defaults, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is for tables; add --format jsonl or --format parquet.")
        _write_pictures(load_scorer(arguments), arguments, queries)
    else:
        _write_tables(load_scorer(arguments), arguments, queries, format)


def _write_pictures(scorer: RelevanceScorer, arguments: argparse.Namespace, queries: Sequence[str] | None) -> None:
    from arrcoc import viz
    from arrcoc._files import save_picture, write_json

    folder = Path(arguments.output)
    tiles: list[tuple[Image, str]] = []
    num_results, columns = 0, 2
    for number, record in enumerate(_records(arguments, queries)):
        results = scorer.score_queries(record.image, queries or tuple(record.queries))
        for asked, result in enumerate(results):
            name = _name(number, record, asked, result)
            allocation = result.keep(arguments.budget)
            kept = allocation.weights.unflatten(0, result.grid)
            overlay = result.overlay()
            save_picture(folder / f"{name}_overlay.png", overlay)
            save_picture(folder / f"{name}_tokens.png", viz.token_grid(result.image, kept))
            write_json(folder / f"{name}.json", _numbers(record.name, result, allocation.keep_indices.tolist()))
            peak = result.relevance.max().item()
            if len(tiles) < _MOST_TILES:
                tiles += [(overlay, f"{result.query} (peak {peak:.2f})")]
            print(
                f"{record.name}  {result.query!r}: peak {peak:.2f}, kept {allocation.num_kept} of {kept.numel()}",
                flush=True,
            )
        num_results += len(results)
        columns = max(columns, len(results))
    save_picture(folder / "overview.png", viz.contact_sheet(tiles, columns=min(4, columns)))
    shown = "" if num_results == len(tiles) else f" of the first {len(tiles)}"
    print(f"\n{num_results} overlays, token grids and JSON files, and overview.png{shown}, are in {folder}")


def _write_tables(
    scorer: RelevanceScorer, arguments: argparse.Namespace, queries: Sequence[str] | None, format: str
) -> None:
    from arrcoc._files import save_picture
    from arrcoc.scoring import score_many

    folder = Path(arguments.output)
    try:
        summary = score_many(
            scorer,
            arguments.inputs,
            queries,
            output=folder,
            format=format,
            budget=arguments.budget,
            precision=arguments.precision,
            logits=arguments.logits,
            batch_size=arguments.batch_size,
            part_size=arguments.part_size,
            num_workers=arguments.workers,
            on_error=arguments.on_error,
            shard_texts=arguments.shard_texts,
            resume=arguments.resume,
        )
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(130) from None
    for number, record in enumerate(islice(_records(arguments, queries), arguments.overlays)):
        try:
            results = scorer.score_queries(record.image, queries or tuple(record.queries))
        except (ValueError, OSError):
            continue  # one of the skipped pictures, and listed as such
        for asked, result in enumerate(results):
            save_picture(folder / "overlays" / f"{_name(number, record, asked, result)}_overlay.png", result.overlay())
    print(summary)
    print(f"records are in {folder}/part-*.{format}")
    if summary.num_skipped:
        print(f"skipped pictures are listed in {folder}/skipped.jsonl")


def _records(arguments: argparse.Namespace, queries: Sequence[str] | None) -> Iterator[Record]:
    """The pictures, without broken lines of manifests."""
    from arrcoc.data.records import Record
    from arrcoc.scoring import read_inputs

    texts = "none" if queries else arguments.shard_texts
    stream = read_inputs(arguments.inputs, on_error=arguments.on_error, shard_texts=texts)
    return (entry for entry in stream if isinstance(entry, Record))


def _read_queries(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise ValueError(f"--queries must be UTF-8, {path!r} is not: {error}.") from error
    queries = [line.strip() for line in text.split("\n") if line.strip()]
    if not queries:
        raise ValueError(f"--queries must hold one text a line, got none in {path!r}.")
    return queries


def _numbers(name: str, result: RelevanceResult, kept: list[int]) -> dict[str, Any]:
    return {
        "image": name,
        "query": result.query,
        "grid": list(result.grid),
        "relevance": [[round(value, 6) for value in row] for row in result.relevance.tolist()],
        "kept": kept,
    }


def _name(number: int, record: Record, asked: int, result: RelevanceResult) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", result.query.lower()).strip("-")[:40] or "query"
    return f"{number:03d}_{Path(record.name).stem}_{asked:02d}_{slug}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="picture files; folders, manifests (.jsonl), WebDataset shards (.tar)",
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--query", nargs="+", metavar="TEXT", help="what to look for in every picture, one or more texts"
    )
    asked.add_argument(
        "--queries",
        metavar="FILE",
        help="the same from a file, one text a line; without either, manifests and shards ask",
    )
    add("--output", required=True, metavar="DIR", help="where everything goes; for tables a new folder")
    add(
        "--format",
        choices=("pictures", *_TABLES),
        help="pictures: overlay, kept tokens and JSON for each; jsonl, parquet: tables "
        "(default: pictures for picture files, jsonl for anything else)",
    )
    add("--budget", type=budget, default=0.25, help="tokens kept: a count, or a share such as 0.25 (default: 0.25)")
    add(
        "--shard-texts",
        choices=("json", "txt"),
        default="json",
        help="where the queries of shards are, without --query and --queries (default: json)",
    )
    add_scorer_arguments(parser)
    add = parser.add_argument_group("tables").add_argument
    add("--resume", action="store_true", help="go on with the run that is in --output")
    add("--on-error", choices=("raise", "skip"), default="raise", help="skip: list broken pictures in skipped.jsonl")
    add("--overlays", type=count, default=0, metavar="N", help="draw the first N pictures too (default: 0)")
    add("--batch-size", type=positive, metavar="N", help="pictures scored together (default: 2 on a CPU, 32 elsewhere)")
    add("--part-size", type=positive, default=1000, metavar="N", help="pictures in a part file (default: 1000)")
    add("--workers", type=count, default=2, metavar="N", help="processes that decode pictures (default: 2)")
    add("--precision", choices=("float32", "float16"), default="float32", help="of the maps (default: float32)")
    add("--logits", action="store_true", help="write logits beside the relevance")
    return parser


if __name__ == "__main__":
    sys.exit(main())
