"""Picture of sweeps over rho: validation with its errors on the left, the sharpness beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_core.tuning.results import RhoSweep

_BLUE, _RED, _GREY = "#1f5fa8", "#b5432e", "#8a8a8a"


def plot_sweeps(
    sweeps: Mapping[str, RhoSweep],
    path: str | os.PathLike[str],
    *,
    validation: str = "validation",
    sharpness: str = "sharpness",
) -> None:
    """Draw sweeps below each other, validation against rho and, where it was measured, sharpness.

    rho is on a logarithmic axis that is linear below the smallest rho > 0, so that 0 has a place. Points are means over
    seeds, bars their standard errors; the dashed line is rho = 0, the ring the best rho. A rho so large that training
    collapsed would squeeze all others: it is a triangle at the edge with its value, a cross if a run diverged.
    Sharpness is on a logarithmic axis if it is > 0 throughout. Needs matplotlib.

    Args:
        sweeps: by title.
        path: of the picture, e.g. a .png or .svg.
        validation: what the validation value is, for its axis.
        sharpness: what the sharpness is, for its axis.

    Raises:
        ImportError: without matplotlib.
        ValueError: for no sweep.

    Example:
        >>> from tempfile import mkdtemp
        >>> from sam_core.tuning.sweep import sweep_rho
        >>> sweep = sweep_rho(lambda rho, seed: {"validation": 0.9 + rho + 0.01 * seed}, [0.0, 0.05], seeds=[0, 1])
        >>> plot_sweeps({"clean": sweep, "noisy": sweep}, f"{mkdtemp()}/rho.png")
    """
    if not sweeps:
        raise ValueError("sweeps must hold one sweep at least, got none.")
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, nothing global
    except ImportError as error:
        raise ImportError("plotting a sweep needs matplotlib: pip install matplotlib.") from error

    with_sharpness = any(math.isfinite(row.sharpness) for sweep in sweeps.values() for row in sweep.table)
    num_columns = 2 if with_sharpness else 1
    figure = Figure(figsize=(4.4 * num_columns, 0.4 + 2.5 * len(sweeps)), layout="constrained")
    axes = figure.subplots(len(sweeps), num_columns, squeeze=False)
    for (title, sweep), row in zip(sweeps.items(), axes, strict=True):
        for ax in row:
            _dress(ax, sweep.rhos)
        _draw_validation(row[0], sweep)
        row[0].set_title(title, loc="left", fontsize="medium", fontweight="bold")
        row[0].set_ylabel(validation)
        if with_sharpness:
            _draw_sharpness(row[1], sweep)
            row[1].set_ylabel(sharpness)
    for ax in axes[-1]:
        ax.set_xlabel("rho")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _dress(ax: Any, rhos: Sequence[float]) -> None:
    if rhos[-1] > 0:
        ax.set_xscale("symlog", linthresh=next(rho for rho in rhos if rho > 0), linscale=0.4)
    ax.set_xticks(list(rhos), [f"{rho:g}" for rho in rhos])
    ax.tick_params(labelsize="small")
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    ax.set_axisbelow(True)


def _draw_validation(ax: Any, sweep: RhoSweep) -> None:
    best = sweep.best()
    # How far below the best a point may lie to be in the picture: three times as far as a usual one.
    distances = {row.rho: abs(row.validation - best.validation) for row in sweep.table}
    reach = 3 * median(distance for distance in distances.values() if math.isfinite(distance))
    shown = [row for row in sweep.table if distances[row.rho] <= reach]
    _points(ax, [(row.rho, row.validation, row.validation_error) for row in shown], colour=_BLUE)
    ax.plot(best.rho, best.validation, "o", markersize=12, markerfacecolor="none", markeredgecolor=_BLUE)
    if shown[0].rho == 0:
        ax.axhline(shown[0].validation, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)

    edge, marker, offset = (0.03, "v", 7) if sweep.mode == "max" else (0.97, "^", -14)
    for row in sweep.table:
        if not distances[row.rho] <= reach:
            collapsed = math.isfinite(row.validation)
            place = {"transform": ax.get_xaxis_transform(), "color": _BLUE if collapsed else _GREY}
            ax.plot([row.rho], [edge], marker if collapsed else "x", clip_on=False, **place)
            text = f"{row.validation:.3g}" if collapsed else "diverged"
            ax.annotate(
                text,
                (row.rho, edge),
                xycoords=ax.get_xaxis_transform(),
                xytext=(0, offset),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color=place["color"],
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )


def _draw_sharpness(ax: Any, sweep: RhoSweep) -> None:
    from matplotlib.ticker import LogLocator

    table = [row for row in sweep.table if math.isfinite(row.sharpness)]
    _points(ax, [(row.rho, row.sharpness, row.sharpness_error) for row in table], colour=_RED)
    if table and all(row.sharpness > 0 for row in table):
        ax.set_yscale("log", subs=[])
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")


def _points(ax: Any, points: Sequence[tuple[float, float, float]], *, colour: str) -> None:
    rhos, values, errors = zip(*points, strict=True) if points else ((), (), ())
    bars = [error if math.isfinite(error) else 0.0 for error in errors]
    ax.errorbar(rhos, values, yerr=bars, color=colour, marker="o", markersize=5, linewidth=1.5, capsize=3)
