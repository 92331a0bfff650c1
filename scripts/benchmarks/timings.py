"""Time what a user waits for, as ratios of medians measured in one run.

For example: python scripts/benchmarks/timings.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import run

SCALES = (0.7, 1.0, 1.4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    return run(parser, _time, argv)


def _time(arguments: argparse.Namespace) -> None:
    import arrcoc
    from arrcoc.assets import asset_path
    from arrcoc.data import Scenes
    from arrcoc.images import load_image

    photo = asset_path("photos") / "images" / "coffee.jpg"
    program = "import arrcoc, sys; arrcoc.load_scorer().score(sys.argv[1], 'a cup')"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(photo)], check=True)
    print(f"fresh process, import, load and first score   {time.perf_counter() - started:.1f} s")

    picture = load_image(photo)
    scorer, wide = arrcoc.load_scorer(), arrcoc.load_scorer(scales=SCALES)
    one, three, backbone = _interleaved(
        [
            lambda: scorer.score(picture, "a cup"),
            lambda: wide.score(picture, "a cup"),
            lambda: scorer.model.backbone(scorer.preprocess(picture)),
        ],
        arguments.repeats,
    )
    print(f"a score (600 x 400 photo)                      {1000 * one:.0f} ms")
    print(f"score / backbone(preprocess)                   {one / backbone:.2f}")
    print(f"score at scales {SCALES} / score at one   {three / one:.2f}")

    model = arrcoc.load_scorer(head=None).model
    data = arrcoc.encode_samples(model, Scenes(32, split="train"))

    def epoch(optimizer: str) -> Callable[[], object]:
        config = arrcoc.TrainConfig(optimizer=optimizer, penalty_weight=0.0)
        head = arrcoc.RelevanceHead(arrcoc.HeadConfig(embed_dim=model.backbone.embed_dim, text_rank=32))
        trained = arrcoc.RelevanceModel(model.backbone, head)
        return lambda: arrcoc.train_relevance_model_with_sam(trained, data, epochs=6, config=config)

    sam, adamw = _interleaved([epoch("sam"), epoch("none")], 3)
    print(f"training with SAM / with AdamW (tokens cached) {sam / adamw:.2f}")


def _interleaved(actions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each action, run in turn so that what disturbs one disturbs all."""
    times: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for action, seconds in zip(actions, times, strict=True):
            started = time.perf_counter()
            action()
            if repeat:  # the first is a warm-up
                seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


if __name__ == "__main__":
    sys.exit(main())
