"""Train a relevance head, and the last blocks of its backbone if asked, with sharpness-aware minimization.

For example: python scripts/train_relevance.py --data scenes --output runs/scenes

Settings come from --config FILE (TOML or JSON, its sections as below), then from the other flags. On several processes:
torchrun --nproc-per-node 2 -- scripts/train_relevance.py ...
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _common import check_device, run

if TYPE_CHECKING:
    from arrcoc.training.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _train, argv)


def _train(arguments: argparse.Namespace) -> None:
    from arrcoc.training.distributed import process_group
    from arrcoc.training.run import run_training

    # What can be refused is refused before pictures are encoded, which takes a while.
    config = _config(arguments)
    check_device(config.device)
    started = time.perf_counter()
    with process_group(config.device) as ranks:
        result = run_training(
            config,
            resume=arguments.resume,
            progress=sys.stderr.isatty() or arguments.progress,
            report=lambda record: print(_line(record), flush=True),
            note=lambda text: print(text, flush=True),
        )
        if not ranks.is_writer:
            return
    print(f"\nAP over tokens       {'zero-shot':>9} {'trained':>9}")
    for name, score in result.zero_shot.items():
        print(f"{name.removeprefix('ap_'):<20} {score:>9.3f} {result.trained[name]:>9.3f}")
    print(f"\nmodel, checkpoint and log are in {config.output} ({time.perf_counter() - started:.0f} s)")


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The settings: defaults, or those of the run that is resumed; then those of the file; then the flags.

    The file may be what another run wrote down as its ``run.json``.
    """
    from arrcoc.flags import with_flags
    from arrcoc.settings import read_settings, updated
    from arrcoc.training.run import RUN_FORMAT, read_run
    from arrcoc.training.run_config import RunConfig

    values = {} if arguments.config is None else read_settings(arguments.config)
    if values.get("format") == RUN_FORMAT:
        values = values["config"]
    config = with_flags(updated(RunConfig(), values), arguments)
    if arguments.resume and (Path(config.output) / "run.json").is_file():
        config = with_flags(updated(read_run(Path(config.output)), values), arguments)
    return config


def _line(record: dict[str, float]) -> str:
    scores = "  ".join(f"{name.removeprefix('ap_')} AP {value:.3f}" for name, value in record.items() if "ap_" in name)
    skipped = f"  {record['num_skipped']} steps skipped" if record["num_skipped"] else ""
    return (
        f"epoch {record['epoch']:>3}  loss {record['loss']:.4f}  penalty {record['penalty']:.4f}  "
        f"sharpness {record['sharpness']:.5f}  {scores}{skipped}"
    )


def _parser() -> argparse.ArgumentParser:
    from arrcoc.flags import add_flags
    from arrcoc.training.run_config import RunConfig

    parser = argparse.ArgumentParser(
        usage="train_relevance.py [--config FILE] [--SETTING VALUE ...] [--resume] [--progress]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a name that is cut off or mistaken is no other name
    )
    parser.add_argument("--config", metavar="FILE", help="settings, TOML or JSON; the other flags override it")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    parser.add_argument("--progress", action="store_true", help="progress bars even where the output is no terminal")
    add_flags(parser, RunConfig())
    return parser


if __name__ == "__main__":
    sys.exit(main())
