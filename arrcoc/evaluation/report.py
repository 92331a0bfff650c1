"""A benchmark report to read: aligned tables, Markdown, JSON and one plot."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from arrcoc._files import atomic_path, write_json, write_text
from arrcoc.evaluation.results import BenchmarkReport

_COLUMNS = {
    "AP": "average_precision",
    "hit": "pointing_hit",
    "recall": "recall",
    "paired": "paired",
    "ECE": "calibration_error",
    "absent": "absent_mass",
}
# Okabe and Ito's palette, safe for colour-blind readers; the two maps that look at no picture stay grey.
_COLOURS = {"model": "#0072B2", "zero-shot": "#D55E00", "negated": "#CC79A7", "centre": "#6E6E6E", "random": "#9A9A9A"}


def format_table(report: BenchmarkReport, *, markdown: bool = False) -> str:
    """The report as text: every metric on the first condition, then AP under each, with what the model keeps.

    Args:
        report: from ``evaluate``.
        markdown: tables in Markdown instead of aligned plain text.

    Returns:
        Lines of at most 120 characters, without a newline at the end.
    """
    first, *rest = report.conditions
    budget = f"{report.budget:.0%} of the tokens" if isinstance(report.budget, float) else f"{report.budget} tokens"
    quality = [["method", "AP", "95 % interval", *list(_COLUMNS)[1:]]]
    for method in report.methods:
        row = report.row(first, method)
        low, high = row.average_precision_interval
        ap, *others = (_number(getattr(row, attribute)) for attribute in _COLUMNS.values())
        quality.append([method, ap, f"{_number(low)}-{_number(high)}", *others])

    robustness = [["condition", *(f"AP {method}" for method in report.methods), "kept", "overlap"]]
    numbers = [
        [*(report.row(condition, method).average_precision for method in report.methods), *_kept(report, condition)]
        for condition in report.conditions
    ]
    robustness += [[condition, *map(_number, row)] for condition, row in zip(report.conditions, numbers, strict=True)]
    if len(rest) > 1:
        columns = zip(*numbers[1:], strict=True)
        robustness.append([f"mean but {first}", *(_number(fmean(values)) for values in columns)])

    blocks = [
        f"{report.num_images} pictures, {report.num_queries} queries in the picture, {report.num_absent} absent; "
        f"severity {report.severity}, budget {budget}, seed {report.seed}",
        f"Quality, {first}",
        _table(quality, markdown),
        "Robustness",
        _table(robustness, markdown),
        "\n".join(
            [
                "AP: average precision over tokens. hit: the top token is on the object. recall: share of the object",
                "inside the budget. paired: AP minus AP under the picture's other queries. ECE: calibration error.",
                "absent: mean relevance that queries get which are not in the picture; lower is better, as for ECE.",
                f"kept: the model's AP relative to {first}. overlap: its top tokens that are the clean picture's too.",
            ]
        ),
    ]
    if markdown:
        blocks[1], blocks[3] = f"### {blocks[1]}", f"### {blocks[3]}"
    return "\n\n".join(blocks)


def plot(report: BenchmarkReport, path: str | os.PathLike[str]) -> None:
    """AP of each method under each condition, with the 95 % intervals of the two that look, as a picture file.

    Args:
        report: from ``evaluate``.
        path: ends in .png, .svg or .pdf.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = list(range(len(report.conditions)))
    lasts: dict[str, float] = {}
    for method in reversed(report.methods):  # the model is drawn last, on top
        rows = [report.row(condition, method) for condition in report.conditions]
        heights = [row.average_precision for row in rows]
        colour, leads = _COLOURS.get(method, "#000000"), method == "model"
        looks = method in ("model", "zero-shot")
        axes.plot(places, heights, color=colour, linewidth=2.2 if leads else 1.3, alpha=0.9 if looks else 0.7)
        axes.scatter(places, heights, color=colour, s=46 if leads else 24, linewidths=1.2, edgecolors="white", zorder=3)
        if looks:
            lows, tops = zip(*(row.average_precision_interval for row in rows), strict=True)
            axes.vlines(places, lows, tops, color=colour, linewidth=5 if leads else 3.5, alpha=0.2)
        if leads:
            for place, row in zip(places, rows, strict=True):
                axes.annotate(
                    _number(row.average_precision),
                    (place, row.average_precision_interval[1]),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                    color=colour,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # over the grid lines
                )
        lasts[method] = heights[-1]

    highs = [row.average_precision_interval[1] for row in report.rows]
    top = 1.1 * max((high for high in highs if not math.isnan(high)), default=1.0)
    axes.set(xlim=(-0.3, len(places) - 0.7), ylim=(0, top))
    labels = _spread({method: last for method, last in lasts.items() if not math.isnan(last)}, 0.062 * top)
    for method, height in labels.items():
        axes.annotate(
            method,
            (places[-1], height),
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            color=_COLOURS.get(method, "#000000"),
            fontweight="bold" if method == "model" else "normal",
            annotation_clip=False,
        )
    axes.set_xticks(places, [condition.replace("_", "\n") for condition in report.conditions])
    axes.tick_params(length=0, labelcolor="#333333")
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_title("Average precision over tokens", loc="left", fontsize=12, fontweight="bold", color="#222222", pad=24)
    axes.annotate(
        f"{report.num_queries} queries on {report.num_images} pictures; "
        f"perturbations at severity {report.severity} of 5; bars: 95 % intervals",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        fontsize=9,
        color="#666666",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def save_report(
    report: BenchmarkReport, directory: str | os.PathLike[str], *, settings: Mapping[str, Any] | None = None
) -> None:
    """Write ``report.json``, ``table.md`` and ``robustness.png`` into a folder, which is made if needed.

    Args:
        report: from ``evaluate``.
        directory: the folder.
        settings: what else a reader must know to repeat it, e.g. the model's name; goes into the JSON.
    """
    folder = Path(directory)
    write_json(folder / "report.json", {"settings": dict(settings or {}), **report.to_dict()})
    write_text(folder / "table.md", format_table(report, markdown=True) + "\n")
    plot(report, folder / "robustness.png")


def _kept(report: BenchmarkReport, condition: str) -> tuple[float, float]:
    """What the first method, the model, keeps under a condition: its AP relative to the first one, its top tokens."""
    first, row = report.row(report.conditions[0], report.methods[0]), report.row(condition, report.methods[0])
    return row.average_precision / first.average_precision, row.overlap


def _number(value: float) -> str:
    """Three digits without the zero: .408, -.012, 1.000; a dash for nan."""
    if math.isnan(value):
        return "-"
    text = f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no -.000
    return re.sub(r"^(-?)0\.", r"\1.", text)


def _table(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """First column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    if markdown:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
    return "\n".join("  ".join(line) for line in (lines[0], ["-" * width for width in widths], *lines[1:]))


def _spread(heights: Mapping[str, float], distance: float) -> dict[str, float]:
    """Heights moved to stand ``distance`` apart: crowded labels share the room around their mean."""
    groups: list[list[str]] = []

    def places(group: Sequence[str]) -> list[float]:
        middle = sum(heights[name] for name in group) / len(group)
        return [middle + (number - (len(group) - 1) / 2) * distance for number in range(len(group))]

    for name in sorted(heights, key=lambda name: heights[name]):
        groups.append([name])
        while len(groups) > 1 and places(groups[-1])[0] - places(groups[-2])[-1] < distance:
            last = groups.pop()
            groups[-1] += last
    return {name: place for group in groups for name, place in zip(group, places(group), strict=True)}
