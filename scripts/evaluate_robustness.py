"""Measure a relevance scorer on pictures with masks, clean and perturbed, beside its baselines.

For example: python scripts/evaluate_robustness.py --data photos --output runs/robustness
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from _common import add_scorer_arguments, budget, load_scorer, positive, run

if TYPE_CHECKING:
    from arrcoc.data.spec import DataConfig
    from arrcoc.evaluation.benchmark import Samples

DEFAULT_NUM_SCENES = 100
NUM_ABSENT = 2  # queries a photo that name nothing in it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _evaluate, argv)


def _evaluate(arguments: argparse.Namespace) -> None:
    from arrcoc.evaluation import evaluate, format_table, save_report
    from arrcoc.evaluation.orientation import check_first

    samples = _samples(arguments)
    scorer = load_scorer(arguments)
    report = evaluate(
        scorer,
        samples,
        severity=arguments.severity,
        budget=arguments.budget,
        seed=arguments.seed,
        progress=sys.stderr.isatty(),
    )
    print(format_table(report))
    check_first(scorer.model, (samples[number] for number in range(len(samples))))  # warns if the sign is wrong
    if arguments.output:
        settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("model", "head", "scales", "data")}
        save_report(report, arguments.output, settings=settings)
        print(f"\nreport.json, table.md and robustness.png are in {arguments.output}")


def _samples(arguments: argparse.Namespace) -> Samples:
    """The data set by name; the first ``num`` pictures of it."""
    from dataclasses import replace

    from torch.utils.data import Subset

    from arrcoc.data import RelevanceDataset, Scenes, load_data, sample_photos

    num, split = arguments.num, None if arguments.split == "all" else arguments.split
    samples: Samples
    if arguments.data == "scenes":
        return Scenes(num or DEFAULT_NUM_SCENES, split=split or "test", seed=arguments.seed)
    if arguments.data == "photos":
        samples = sample_photos(absent_queries=NUM_ABSENT)
    else:
        read = load_data(arguments.data, replace(_reading(arguments), stream=False, split=split))
        if not isinstance(read, RelevanceDataset):
            raise ValueError(f"--data must be read by number; convert shards to a manifest, got {arguments.data!r}.")
        if skips := getattr(read, "skips", None):
            print(f"{skips.summary()}\n")
        samples = read
    if num is None or num >= len(samples):
        return samples
    chosen: Samples = Subset(samples, range(num))  # type: ignore[arg-type]  # anything with a length and numbers
    return chosen


def _reading(arguments: argparse.Namespace) -> DataConfig:
    """How the data is read: as in training, if the model was trained on it; then as the flags say."""
    from pathlib import Path

    from arrcoc.flags import with_flags
    from arrcoc.training.run import read_run
    from arrcoc.training.run_config import RunConfig

    config = RunConfig()
    if (Path(arguments.model) / "run.json").is_file():
        run = read_run(Path(arguments.model))
        config = run if run.data == arguments.data else config
    return with_flags(config, arguments).reading


def _parser() -> argparse.ArgumentParser:
    from arrcoc.flags import add_flags
    from arrcoc.training.run_config import RunConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_scorer_arguments(parser)
    add(
        "--data",
        default="photos",
        help="photos (a few that ship with us), scenes, coco:PATH, folder:PATH, manifest:PATH or hf:NAME "
        "(default: photos)",
    )
    add(
        "--split",
        default="all",
        choices=("all", "train", "val", "test"),
        help="part of the data, split as in the training of --model if it was trained on it (default: all)",
    )
    add("--num", type=positive, help=f"pictures (default: all; {DEFAULT_NUM_SCENES} of the endless scenes)")
    add("--severity", type=int, default=3, choices=range(1, 6), help="strength of the perturbations (default: 3)")
    add("--budget", type=budget, default=0.25, help="tokens kept: a count, or a share such as 0.25 (default: 0.25)")
    add("--seed", type=int, default=0, help="of the scenes, the noise and the bootstrap (default: 0)")
    add("--output", metavar="DIR", help="where report.json, table.md and robustness.png go")
    add_flags(parser, RunConfig(), only="reading", without=("num", "limit", "stream", "shuffle"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
