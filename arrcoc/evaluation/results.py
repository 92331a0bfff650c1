"""What a benchmark found: one row of scores a condition and method, and what was measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MethodScores:
    """One method under one condition: means over the queries whose answer is in the picture, unless said otherwise.

    Args:
        condition: e.g. "clean", "blur".
        method: e.g. "model", "zero-shot".
        average_precision: AP over tokens, in (0, 1].
        average_precision_interval: 95 % bootstrap interval of it over pictures.
        pointing_hit: share of maps whose maximum is on the object.
        recall: share of the object's area inside the budget.
        paired: AP minus AP of the maps of the picture's other queries; nan without any.
        overlap: share of the top tokens, as many as the budget keeps, that stay the same as on the clean picture.
        calibration_error: ECE pooled over the tokens of all queries, absent ones too; nan for methods that only rank.
        absent_mass: mean relevance that absent queries get; nan for methods that only rank, or without such queries.
    """

    condition: str
    method: str
    average_precision: float
    average_precision_interval: tuple[float, float]
    pointing_hit: float
    recall: float
    paired: float
    overlap: float
    calibration_error: float
    absent_mass: float


@dataclass(frozen=True, kw_only=True)
class BenchmarkReport:
    """Every method under every condition, with what was measured.

    Args:
        rows: one entry a (condition, method), methods of a condition together.
        num_images: pictures with at least one query.
        num_queries: queries whose answer is in the picture; the rank metrics are means over these.
        num_absent: queries whose answer is not; skipped by the rank metrics.
        severity: strength of the perturbations, 1 to 5.
        budget: tokens kept, a count or a share.
        seed: of all randomness.
    """

    rows: tuple[MethodScores, ...]
    num_images: int
    num_queries: int
    num_absent: int
    severity: int
    budget: float
    seed: int

    @property
    def conditions(self) -> tuple[str, ...]:
        """Conditions measured, in order."""
        return tuple(dict.fromkeys(row.condition for row in self.rows))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods measured, in order."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def row(self, condition: str, method: str) -> MethodScores:
        """The scores of one method under one condition.

        Raises:
            ValueError: if they were not measured.
        """
        for row in self.rows:
            if (row.condition, row.method) == (condition, method):
                return row
        raise ValueError(f"the report must hold condition {condition!r} with method {method!r}, and does not.")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts for JSON; nan becomes None."""
        plain: dict[str, Any] = _without_nan(asdict(self))
        return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
