"""Measure a relevance scorer on pictures with masks, clean and perturbed, beside its baselines.

For example: python scripts/evaluate_robustness.py --data photos --output runs/robustness
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from _common import add_scorer_arguments, budget, coco_path, load_scorer, positive, run

if TYPE_CHECKING:
    from arrcoc.evaluation.benchmark import Samples

DEFAULT_NUM_SCENES = 100
NUM_ABSENT = 2  # queries a photo that name nothing in it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _evaluate, argv)


def _evaluate(arguments: argparse.Namespace) -> None:
    from arrcoc.evaluation import evaluate, format_table, save_report

    samples = _samples(arguments.data, arguments.split, arguments.num, arguments.seed)
    report = evaluate(
        load_scorer(arguments),
        samples,
        severity=arguments.severity,
        budget=arguments.budget,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    print(format_table(report))
    if arguments.output:
        settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("model", "head", "scales", "data")}
        save_report(report, arguments.output, settings=settings)
        print(f"\nreport.json, table.md and robustness.png are in {arguments.output}")


def _samples(data: str, split: str, num: int | None, seed: int) -> Samples:
    """The data set by name; the first ``num`` pictures of it."""
    from torch.utils.data import Subset

    from arrcoc.data import CocoFolder, Scenes, sample_photos

    samples: Samples
    if data == "scenes":
        return Scenes(num or DEFAULT_NUM_SCENES, split="test", seed=seed)
    if data == "photos":
        samples = sample_photos(absent_queries=NUM_ABSENT)
    elif path := coco_path(data):
        samples = CocoFolder(path, split=None if split == "all" else split, absent_queries=NUM_ABSENT)
    else:
        raise ValueError(f"--data must be scenes, photos or coco:PATH, got {data!r}.")
    if num is None or num >= len(samples):
        return samples
    chosen: Samples = Subset(samples, range(num))  # type: ignore[arg-type]  # anything with a length and numbers
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_scorer_arguments(parser)
    add("--data", default="photos", help="scenes, photos (a few that ship with us) or coco:PATH (default: photos)")
    add(
        "--split",
        default="all",
        choices=("all", "train", "val"),
        help="part of a COCO folder; train_relevance.py trains on train (default: all)",
    )
    add("--num", type=positive, help=f"pictures (default: all; {DEFAULT_NUM_SCENES} of the endless scenes)")
    add("--severity", type=int, default=3, choices=range(1, 6), help="strength of the perturbations (default: 3)")
    add("--budget", type=budget, default=0.25, help="tokens kept: a count, or a share such as 0.25 (default: 0.25)")
    add("--seed", type=int, default=0, help="of the scenes, the noise and the bootstrap (default: 0)")
    add("--output", metavar="DIR", help="where report.json, table.md and robustness.png go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
