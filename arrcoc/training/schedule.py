"""Learning rate over a run: a linear warm-up, then a cosine, a line or nothing down to a floor."""

from __future__ import annotations

import math

_START = 1e-3  # so that the first step of a warm-up moves


def lr_factor(progress: float, *, warm_up: float = 0.05, shape: str = "cosine", floor: float = 0.0) -> float:
    """Learning rate relative to its peak.

    With p the share of the run after the warm-up:  floor + (1 - floor) f(p),  f = (1 + cos(pi p)) / 2  for "cosine",
    1 - p  for "linear" and  1  for "constant".

    Args:
        progress: share of the run that is done, in [0, 1].
        warm_up: share of the run in which the rate rises as a line from almost 0, in [0, 1).
        shape: "cosine", "linear" or "constant".
        floor: what the rate falls to, relative to the peak, in [0, 1].
    """
    if progress < warm_up:
        return (progress + _START) / (warm_up + _START)
    share = min(1.0, (progress - warm_up) / (1 - warm_up))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[shape]
    return floor + (1 - floor) * fall
