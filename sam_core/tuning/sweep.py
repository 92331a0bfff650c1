"""A sweep over rho with a training function of one's own: several seeds, and a file to resume from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

from sam_core._checks import check_count, check_in, check_nonnegative
from sam_core.tuning.results import RhoRun, RhoSweep

_logger = logging.getLogger(__name__)


def sweep_rho(
    train: Callable[[float, int], Mapping[str, float]],
    rhos: Sequence[float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    mode: str = "max",
    file: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RhoSweep:
    """Train with every rho of a grid and every seed, and sum up validation and sharpness.

    Put rho = 0, the base optimizer, into the grid: gains are differences to it with the same seed. Seeds go outermost,
    so that the first one shows the whole grid early; each run is logged at INFO (``sam_core.tuning.sweep``). Choosing
    the best of a grid favours it: confirm it on new seeds, or on a test set, before it is reported.

    Args:
        train: ``train(rho, seed)`` trains a model from scratch and returns {"validation": value} and, if measured,
            "sharpness", e.g. :func:`compute_sam_sharpness` with one fixed radius for all runs. Everything random in it
            should follow the seed. NaN or infinity is a run that diverged.
        rhos: the grid, different numbers >= 0.
        seeds: different integers >= 0.
        mode: "max" if a large validation value is good (accuracy), "min" if a small one is (loss).
        file: JSON file that takes in every finished run, atomically; runs that it holds already are not repeated, so
            that a sweep resumes and a grid may grow. One process a file.
        settings: what else the result depends on (data, epochs, optimizer), as JSON knows it; kept in the file.

    Returns:
        The table, what is best in it, and how far to believe it.

    Raises:
        ValueError: for a bad option, a result of another form, or a file of other settings.

    Example:
        >>> def train(rho, seed):  # stands for a training run
        ...     return {"validation": 0.9 + rho - 2 * rho**2 + 0.01 * seed, "sharpness": 1 / (1 + rho)}
        >>> sweep = sweep_rho(train, [0.0, 0.1, 0.2, 0.5], seeds=[0, 1])
        >>> sweep.best().rho
        0.2
        >>> round(sweep.best().gain, 4)
        0.12
    """
    check_in("mode", mode, ("max", "min"))
    rhos, seeds = list(rhos), list(seeds)
    for name, values in (("rhos", rhos), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must hold one value at least, none of them twice, got {values!r}.")
    for rho in rhos:
        check_nonnegative("rho", rho)
    for seed in seeds:
        check_count("seed", seed)
    told = json.loads(json.dumps(dict(settings or {})))  # as the file will give it back

    known = {} if file is None else _read(Path(file), told)
    pairs = [(float(rho), int(seed)) for seed in seeds for rho in rhos]
    for rho, seed in pairs:
        if (rho, seed) not in known:
            run = known[rho, seed] = _as_run(rho, seed, train(rho, seed))
            _logger.info("rho %g, seed %d: validation %.6g", rho, seed, run.validation)
            if file is not None:
                _write(Path(file), told, known)
    return RhoSweep(runs=tuple(known[pair] for pair in pairs), mode=mode)


def _as_run(rho: float, seed: int, result: Any) -> RhoRun:
    keys = {"validation"}, {"validation", "sharpness"}
    if not isinstance(result, Mapping) or set(result) not in keys or not all(map(_is_real, result.values())):
        raise ValueError(f"train must return numbers as 'validation' and, if measured, 'sharpness', got {result!r}.")
    numbers = {name: float(value) if math.isfinite(value) else math.nan for name, value in result.items()}
    return RhoRun(rho=rho, seed=seed, **numbers)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _read(file: Path, settings: dict[str, Any]) -> dict[tuple[float, int], RhoRun]:
    """Finished runs by rho and seed; none if there is no file."""
    if not file.exists():
        return {}
    saved = json.loads(file.read_text(encoding="utf-8"))
    if saved["settings"] != settings:
        raise ValueError(f"settings must be those of {str(file)!r}, {saved['settings']!r}, got {settings!r}.")
    found = {}
    for run in saved["runs"]:
        numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in run.items()}
        found[run["rho"], run["seed"]] = RhoRun(**numbers)
    return found


def _write(file: Path, settings: dict[str, Any], runs: Mapping[tuple[float, int], RhoRun]) -> None:
    """Replace the file as a whole: a reader, and a run that was stopped, finds the old one or the new one."""
    packed = []
    for run in runs.values():
        known = {name: value for name, value in asdict(run).items() if value is not None}  # sharpness: not measured
        packed.append({name: value if math.isfinite(value) else None for name, value in known.items()})  # JSON: no NaN
    text = json.dumps({"settings": settings, "runs": packed}, indent=1, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
