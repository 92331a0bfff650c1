"""Draw the README's pictures from the sample photos and the default scorer.

For example: python scripts/make_figures.py --output assets/figures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _common import run

QUERIES = {
    "chelsea.jpg": ("a cat",),
    "coffee.jpg": ("a cup",),
    "astronaut.jpg": ("a rocket", "a person"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="assets/figures", metavar="DIR")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.7, 1.0, 1.4], metavar="S")
    return run(parser, _draw, argv)


def _draw(arguments: argparse.Namespace) -> None:
    import arrcoc
    from arrcoc import viz
    from arrcoc._files import save_picture
    from arrcoc.assets import asset_path

    scorer = arrcoc.load_scorer(scales=tuple(arguments.scales))
    tiles = []
    for name, queries in QUERIES.items():
        for result in scorer.score_queries(asset_path("photos") / "images" / name, queries):
            kept = result.keep(0.25)
            tiles.append((result.overlay(), result.query))
            picture = viz.token_grid(result.image, kept.weights.unflatten(0, result.grid))
            tiles.append((picture, f"{result.query}: {kept.num_kept} of {result.relevance.numel()} tokens kept"))
    save_picture(Path(arguments.output) / "overview.png", viz.contact_sheet(tiles, columns=4, tile_width=240))


if __name__ == "__main__":
    sys.exit(main())
