"""Time what SAM adds to a step beside its second pass: to the perturbed point and back, on real sets of parameters.

Side by side in one run: sam_core, a plain loop over the parameters, pytorch_optimizer if it is installed (foreach on),
and the time of moving 10 parameter-sizes of memory. The base optimizer does nothing.

For example: python scripts/benchmarks/optimizer_ascent.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ascent_competitors import MODELS, competitors, interleaved, make_parameters
from torch import Tensor

from _common import run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="e.g. cpu or cuda (default: cpu)")
    return run(parser, _time, argv)


def _time(arguments: argparse.Namespace) -> None:
    print(f"{'model':<20} {'tensors':>7} {'params':>8}  best ms, and relative to moving 10 parameter-sizes")
    for name in arguments.models:
        params = make_parameters(name, arguments.device)
        flat = torch.zeros(sum(p.numel() for p in params), device=arguments.device)
        other = torch.ones_like(flat)
        contestants: dict[str, Callable[[], object]] = {
            "moving 10 sizes": partial(_move, flat, other),
            **competitors(params),
        }
        rounds = interleaved(contestants, arguments.repeats, arguments.device)
        times = {competitor: min(seconds) for competitor, seconds in rounds.items()}
        for competitor, seconds in times.items():
            ratio = seconds / times["moving 10 sizes"]
            count = f"{name:<20} {len(params):>7} {flat.numel() / 1e6:>6.1f} M"
            print(f"{count}  {competitor:<17} {1000 * seconds:>8.1f} {ratio:>6.2f}")


def _move(target: Tensor, source: Tensor) -> None:
    for _ in range(5):  # each reads one size and writes one
        target.copy_(source)


if __name__ == "__main__":
    raise SystemExit(main())
