"""What a sweep over rho says: means over seeds, gains paired by seed, and how far to believe them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from sam_core._checks import check_in

# Student's t: 97.5 % quantile by degrees of freedom, from 1; beyond the last one it is a little too wide.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, kw_only=True)
class RhoRun:
    """One training run.

    Attributes:
        rho: its radius.
        seed: its seed.
        validation: its validation value; NaN if it diverged.
        sharpness: of the trained model; None if not measured.
    """

    rho: float
    seed: int
    validation: float
    sharpness: float | None = None


@dataclass(frozen=True, kw_only=True)
class RhoRow:
    """All runs with one rho, summed up; errors are standard errors of the mean, NaN for a single seed.

    Attributes:
        rho: the radius.
        validation: mean over seeds, NaN if a run diverged.
        validation_error: its error.
        gain: mean over seeds of what is better than rho = 0 with the same seed, > 0 if better; NaN without rho = 0.
        gain_error: its error. Smaller than that of the two means where seeds make runs vary together.
        sharpness: mean over seeds; NaN if not measured in every run.
        sharpness_error: its error.
    """

    rho: float
    validation: float
    validation_error: float
    gain: float
    gain_error: float
    sharpness: float
    sharpness_error: float


@dataclass(frozen=True, kw_only=True)
class RhoSweep:
    """Result of :func:`sweep_rho`.

    Args:
        runs: of every rho the same seeds, in any order.
        mode: "max" if a large validation value is good, "min" if a small one is.

    Raises:
        ValueError: for a bad mode, or a pair of rho and seed that is missing or twice there.

    Example:
        >>> values = {0.0: (0.90, 0.92), 0.1: (0.93, 0.94), 0.2: (0.89, 0.93)}
        >>> runs = [RhoRun(rho=rho, seed=i, validation=pair[i]) for rho, pair in values.items() for i in (0, 1)]
        >>> sweep = RhoSweep(runs=tuple(runs), mode="max")
        >>> sweep.best().rho
        0.1
        >>> print(sweep.to_markdown())
        | rho | validation | gain over rho = 0 |
        | --- | --- | --- |
        | 0 | 0.910 ± 0.010 | |
        | **0.1** | 0.9350 ± 0.0050 | +0.0250 ± 0.0050 |
        | 0.2 | 0.910 ± 0.020 | +0.000 ± 0.010 |
        <BLANKLINE>
        The difference between rho = 0.1 and rho = 0 is within the error: 0.025 ± 0.064 (95 %, 2 seeds, paired).
    """

    runs: tuple[RhoRun, ...]
    mode: str

    def __post_init__(self) -> None:
        check_in("mode", self.mode, ("max", "min"))
        pairs, wanted = {(run.rho, run.seed) for run in self.runs}, len(self.rhos) * len(self.seeds)
        if not len(pairs) == len(self.runs) == wanted > 0:
            raise ValueError(f"runs must hold every pair of rho and seed once, {wanted} runs, got {len(self.runs)}.")

    @property
    def rhos(self) -> tuple[float, ...]:
        """The grid, ascending."""
        return tuple(sorted({run.rho for run in self.runs}))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def table(self) -> tuple[RhoRow, ...]:
        """One row a rho, ascending."""
        plain = [run.validation for run in self._runs(0.0)]
        sign = 1.0 if self.mode == "max" else -1.0
        rows = []
        for rho in self.rhos:
            runs = self._runs(rho)
            values = [run.validation for run in runs]
            gains = [sign * (value - zero) for value, zero in zip(values, plain, strict=True)] if plain else []
            sharpness = [math.nan if run.sharpness is None else run.sharpness for run in runs]
            columns = [_mean_and_error(column) for column in (values, gains, sharpness)]
            (validation, validation_error), (gain, gain_error), (mean_sharpness, sharpness_error) = columns
            rows.append(
                RhoRow(
                    rho=rho,
                    validation=validation,
                    validation_error=validation_error,
                    gain=gain,
                    gain_error=gain_error,
                    sharpness=mean_sharpness,
                    sharpness_error=sharpness_error,
                )
            )
        return tuple(rows)

    def best(self) -> RhoRow:
        """The row with the best mean, of equal ones the smallest rho.

        Raises:
            ValueError: if a run diverged with every rho.
        """
        rows = [row for row in self.table if math.isfinite(row.validation)]
        if not rows:
            raise ValueError("runs must be finite for one rho at least, got none.")
        return (max if self.mode == "max" else min)(rows, key=lambda row: row.validation)

    def remarks(self) -> tuple[str, ...]:
        """What must be known before the best rho is believed, in sentences: edges of the grid, errors, divergence."""
        best = self.best()
        said = [f"A run diverged at rho = {row.rho:g}." for row in self.table if not math.isfinite(row.validation)]
        if best.rho == self.rhos[-1] and best.rho > 0:
            said.append(f"The best rho, {best.rho:g}, is the largest of the grid: try larger ones.")
        elif best.rho == self.rhos[0] and best.rho > 0:
            said.append(f"The best rho, {best.rho:g}, is the smallest of the grid: try smaller ones.")
        if self.rhos[0] > 0:
            said.append("rho = 0 is not in the grid: whether any rho helps is not known.")
        elif best.rho == 0:
            said.append("rho = 0 is best: no rho of the grid helps.")
        elif math.isfinite(best.gain):
            said.append(self._belief(best))
        return tuple(said)

    def to_markdown(self) -> str:
        """Table and remarks; means with standard errors, the best rho in bold."""
        table, best = self.table, self.best()
        columns = {
            "rho": [f"**{row.rho:g}**" if row.rho == best.rho else f"{row.rho:g}" for row in table],
            "validation": [_with_error(row.validation, row.validation_error) for row in table],
            "gain over rho = 0": ["" if row.rho == 0 else _with_error(row.gain, row.gain_error, "+") for row in table],
            "sharpness": [_with_error(row.sharpness, row.sharpness_error) for row in table],
        }
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
        rows = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines]
        return "\n".join(rows) + "".join(f"\n\n{remark}" for remark in self.remarks())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw validation against rho, with standard errors, and the sharpness beside it; needs matplotlib.

        Args:
            path: of the picture, e.g. a .png or .svg.

        Raises:
            ImportError: without matplotlib.
        """
        from sam_core.tuning.plot import plot_sweeps

        plot_sweeps({"": self}, path)

    def _runs(self, rho: float) -> list[RhoRun]:
        return sorted((run for run in self.runs if run.rho == rho), key=lambda run: run.seed)

    def _belief(self, best: RhoRow) -> str:
        num_seeds = len(self.seeds)
        if num_seeds == 1:
            return (
                f"With one seed it is not known whether rho = {best.rho:g} is better than rho = 0 by more than chance."
            )
        half = best.gain_error * _T[min(num_seeds - 1, len(_T)) - 1]
        size = f"{_with_error(best.gain, half)} (95 %, {num_seeds} seeds, paired)"
        if best.gain <= half:
            return f"The difference between rho = {best.rho:g} and rho = 0 is within the error: {size}."
        return f"rho = {best.rho:g} is better than rho = 0 by {size}."


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error s / sqrt(n), s with n - 1; NaN for what is not known."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _with_error(value: float, error: float, sign: str = "") -> str:
    """The value to the second figure of its error, and the error; "" for what is not known."""
    if not math.isfinite(value):
        return ""
    if not error > 0:
        return f"{value:{sign}.4g}" + (" ± 0" if error == 0 else "")
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"
