"""Score the tokens of pictures for text queries: heat maps, kept tokens, and numbers as JSON.

For example: python scripts/score_tokens.py assets/photos/images/coffee.jpg --query "a cup" --output runs/scores
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import add_scorer_arguments, budget, load_scorer, run

if TYPE_CHECKING:
    from arrcoc import RelevanceResult


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _score, argv)


def _score(arguments: argparse.Namespace) -> None:
    from arrcoc import viz
    from arrcoc._files import save_picture, write_json

    folder = Path(arguments.output)
    scorer = load_scorer(arguments)
    tiles = []
    for number, path in enumerate(arguments.images):
        for asked, result in enumerate(scorer.score_queries(path, arguments.query)):
            name = f"{number:03d}_{Path(path).stem}_{asked:02d}_{_slug(result.query)}"
            allocation = result.keep(arguments.budget)
            kept = allocation.weights.unflatten(0, result.grid)
            overlay = result.overlay()
            save_picture(folder / f"{name}_overlay.png", overlay)
            save_picture(folder / f"{name}_tokens.png", viz.token_grid(result.image, kept))
            write_json(folder / f"{name}.json", _record(path, result, allocation.keep_indices.tolist()))
            peak = result.relevance.max().item()
            tiles += [(overlay, f"{result.query} (peak {peak:.2f})")]
            print(
                f"{path}  {result.query!r}: peak {peak:.2f}, kept {allocation.num_kept} of {kept.numel()}", flush=True
            )
    save_picture(folder / "overview.png", viz.contact_sheet(tiles, columns=min(4, max(2, len(arguments.query)))))
    print(f"\n{len(tiles)} overlays, token grids and JSON files, and overview.png, are in {folder}")


def _record(path: str, result: RelevanceResult, kept: list[int]) -> dict[str, Any]:
    return {
        "image": path,
        "query": result.query,
        "grid": list(result.grid),
        "relevance": [[round(value, 6) for value in row] for row in result.relevance.tolist()],
        "kept": kept,
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "query"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="picture files")
    add("--query", nargs="+", required=True, metavar="TEXT", help="what to look for, one or more texts")
    add("--output", required=True, metavar="DIR", help="where pictures and JSON go")
    add("--budget", type=budget, default=0.25, help="tokens kept: a count, or a share such as 0.25 (default: 0.25)")
    add_scorer_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
