"""Pictures per second of score_many, and its memory over many pictures, on pictures drawn for it.

For example: python scripts/benchmarks/scoring_throughput.py

Speed is that of the embedded model on pictures of 640 x 480 and 480 x 640. Memory is watched on small pictures of many
shapes at scale 0.25, where a picture is cheap; what could grow with their number is the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import count, run

QUERIES = ("a cup", "a cat", "a red car", "a person")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=count, default=10_000, help="pictures for memory, 0 for none (default: 10000)")
    parser.add_argument("--num-timed", type=count, default=128, help="pictures for speed, 0 for none (default: 128)")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if arguments.num:
            _watch(Path(folder), arguments.num)
        if arguments.num_timed:
            _time(Path(folder), arguments.num_timed)


def _time(folder: Path, num: int) -> None:
    import arrcoc
    from arrcoc.scoring import score_many

    scorer = arrcoc.load_scorer()
    paths = _draw(folder / "large", num, sizes=((640, 480), (480, 640)))
    scorer.score_queries(paths[0], QUERIES)  # warms up
    started = time.perf_counter()
    for path in paths:
        scorer.score_queries(path, QUERIES)
    one = num / (time.perf_counter() - started)
    print(f"{'score_queries, one picture after the other':44} {one:5.1f} pictures/s", flush=True)
    for num_workers in (0, 1, 2):
        output = folder / f"scores{num_workers}"
        summary = score_many(scorer, paths, QUERIES, output=output, num_workers=num_workers, budget=0.25)
        speed, label = summary.pictures_per_second, f"score_many, {num_workers} workers"
        print(f"{label:44} {speed:5.1f} pictures/s, {speed / one:.2f} times", flush=True)


def _watch(folder: Path, num: int) -> None:
    import arrcoc
    from arrcoc.scoring import score_many

    sizes = [(160, height) for height in range(60, 320, 7)]
    paths = _draw(folder / "small", num, sizes=sizes)
    every = max(1, num // 40)
    samples: list[tuple[int, float, float]] = []

    def watched() -> Iterator[Path]:
        for number, path in enumerate(paths):
            if number % every == 0:
                workers = [_private(child.pid) for child in multiprocessing.active_children() if child.pid]
                samples.append((number, _resident(), max(workers, default=0.0)))
            yield path

    scorer = arrcoc.load_scorer(scales=0.25)
    summary = score_many(scorer, watched(), QUERIES, output=folder / "scores", budget=0.25, num_workers=2)
    print(summary)
    print("pictures   resident MB   largest worker's own MB")
    for number, resident, worker in samples[:: max(1, len(samples) // 10)] + samples[-1:]:
        print(f"{number:8d}   {resident:11.1f}   {worker:10.1f}")
    settled = [resident for number, resident, _ in samples if number >= num // 10]
    print(f"growth from picture {num // 10} to {samples[-1][0]}: {settled[-1] - settled[0]:+.1f} MB\n", flush=True)


def _draw(folder: Path, num: int, sizes: Sequence[tuple[int, int]]) -> list[Path]:
    """JPEG files of random colours, of the sizes (width, height) in turn."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{number:06d}.jpg" for number in range(num)]
    for number, path in enumerate(paths):
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        colours.resize(sizes[number % len(sizes)], Image.Resampling.BILINEAR).save(path, quality=90)
    return paths


def _resident() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def _private(pid: int) -> float:
    """Memory in MB that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
