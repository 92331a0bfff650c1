"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from arrcoc.training.schedule import lr_factor


def test_warm_up_is_a_line_from_almost_zero_to_the_peak() -> None:
    assert 0 < lr_factor(0.0, warm_up=0.1) < 0.011
    assert lr_factor(0.05, warm_up=0.1) == pytest.approx(0.051 / 0.101)
    assert lr_factor(0.1, warm_up=0.1) == 1
    assert lr_factor(0.0, warm_up=0.0) == 1


@pytest.mark.parametrize(
    ("shape", "truth"),
    [("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2), ("linear", lambda p: 1 - p), ("constant", lambda p: 1.0)],
)
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_the_fall_has_its_shape_and_its_floor(shape: str, truth: object, floor: float) -> None:
    for share in (0.0, 0.3, 0.9, 1.0):
        factor = lr_factor(0.1 + 0.9 * share, warm_up=0.1, shape=shape, floor=floor)
        assert factor == pytest.approx(floor + (1 - floor) * truth(share))
