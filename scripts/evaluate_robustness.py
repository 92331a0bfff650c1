"""Measure a relevance scorer on pictures with masks, clean and perturbed, beside its baselines.

For example: python scripts/evaluate_robustness.py --data photos --output runs/robustness
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arrcoc.evaluation.benchmark import Samples

DEFAULT_NUM_SCENES = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    import torch

    import arrcoc
    from arrcoc.evaluation import evaluate, format_table, save_report

    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that this machine has, got {arguments.device!r}.") from error
    samples = _samples(arguments.data, arguments.num, arguments.seed)
    scorer = arrcoc.load_scorer(
        arguments.model,
        head=None if arguments.head == "none" else arguments.head,
        device=arguments.device,
        scales=tuple(arguments.scales),
    )
    report = evaluate(
        scorer,
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
    return 0


def _samples(data: str, num: int | None, seed: int) -> Samples:
    """The data set by name; the first ``num`` pictures of it."""
    from torch.utils.data import Subset

    from arrcoc.data import CocoFolder, Scenes, sample_photos

    kind, _, path = data.partition(":")
    samples: Samples
    if data == "scenes":
        return Scenes(num or DEFAULT_NUM_SCENES, split="test", seed=seed)
    if data == "photos":
        samples = sample_photos()
    elif kind == "coco" and path:
        samples = CocoFolder(path)
    else:
        raise ValueError(f"--data must be scenes, photos or coco:PATH, got {data!r}.")
    if num is None or num >= len(samples):
        return samples
    chosen: Samples = Subset(samples, range(num))  # type: ignore[arg-type]  # anything with a length and numbers
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="embedded", help="backbone, e.g. open_clip:ViT-B-16/openai, or a folder (default: embedded)")
    add("--head", default="default", help="default, none (zero-shot) or a folder (default: default)")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="sizes at which the picture is seen")
    add("--data", default="photos", help="scenes, photos (a few that ship with us) or coco:PATH (default: photos)")
    add("--num", type=_positive, help=f"pictures (default: all; {DEFAULT_NUM_SCENES} of the endless scenes)")
    add("--severity", type=int, default=3, choices=range(1, 6), help="strength of the perturbations (default: 3)")
    add("--budget", type=_budget, default=0.25, help="tokens kept: a count, or a share such as 0.25 (default: 0.25)")
    add("--seed", type=int, default=0, help="of the scenes, the noise and the bootstrap (default: 0)")
    add("--device", help="e.g. cpu or cuda (default: the scorer's choice)")
    add("--output", metavar="DIR", help="where report.json, table.md and robustness.png go")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _budget(text: str) -> float:
    """A count as int, a share as float: the type says which."""
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if "." not in text or not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number of tokens, or a share in (0, 1] such as 0.25, got {text!r}")
    return share


if __name__ == "__main__":
    sys.exit(main())
