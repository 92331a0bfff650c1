"""Argument checks: a bad value is refused by name, with the rule it breaks."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def check_finite(name: str, value: Any) -> None:
    """Refuse what is not a finite real number.

    Raises:
        ValueError: with the name, the rule and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a real number, got {value!r}.")
    # torch.compile traces no math.isfinite of a number that changes.
    if not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name} must be finite, got {value!r}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Refuse what is not a finite number >= 0.

    Raises:
        ValueError: with the name, the rule and the value.
    """
    check_finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a finite number > 0.

    Raises:
        ValueError: with the name, the rule and the value.
    """
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value!r}.")


def check_share(name: str, value: Any) -> None:
    """Refuse what is not a number in [0, 1).

    Raises:
        ValueError: with the name, the rule and the value.
    """
    check_finite(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}.")


def check_count(name: str, value: Any, *, at_least: int = 0) -> None:
    """Refuse what is not a whole number >= ``at_least``.

    Raises:
        ValueError: with the name, the rule and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ValueError(f"{name} must be an integer >= {at_least}, got {value!r}.")


def check_in(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Refuse what is not one of the allowed values.

    Raises:
        ValueError: with the name, the allowed values and the value.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
