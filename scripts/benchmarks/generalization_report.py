"""Tables and figures of the generalisation runs: bootstrap intervals of differences, Kendall's tau of each measure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]
Cell = tuple[str, float, str]  # problem, noise, base optimizer

LABELS = {"plain": "alone", "sam": "SAM", "asam": "ASAM", "looksam": "LookSAM", "msam": "MSAM", "gsam": "GSAM"}
LABELS["friendlysam"] = "FriendlySAM"


def write_report(records: Sequence[Record], folder: Path) -> None:
    """Print all tables as Markdown, and draw Kendall's tau."""
    ratios = {(r["run"]["problem"], r["run"]["base"], r["run"]["time_of"]): r["ratio"] for r in records if "ratio" in r}
    runs = _of_finished_cells([r for r in records if "ratio" not in r and r["run"]["seed"] < 1000])
    equal = [r for r in runs if r["run"]["measured"]]
    if not equal:
        raise ValueError("the file of runs holds no finished comparison.")
    print("## Test error at equal epochs, percent\n")
    print(_error_table(equal))
    print("\n## Test error at equal time, percent\n")
    print(_error_table(_at_equal_time(runs, ratios)))
    print("\n## Cells in which a method is clearly better than the base optimizer / clearly worse / neither\n")
    print(_count_table({"equal epochs": equal, "equal time": _at_equal_time(runs, ratios)}))
    print("\n## Flatness\n")
    print(_flatness_table(equal))
    print("\n## Kendall's tau between a measure and the test error\n")
    taus = kendall_table(equal)
    print(_tau_table(taus))
    _draw_taus(taus, folder / "generalization_tau.png")


def _of_finished_cells(runs: Sequence[Record]) -> list[Record]:
    """Leave out cells in which some methods have not run on all seeds yet, and say so."""
    cells = _by_cell([record for record in runs if record["run"]["measured"]])
    finished = {
        cell for cell, methods in cells.items() if len({tuple(sorted(methods[method])) for method in LABELS}) == 1
    }
    for problem, noise, base in cells.keys() - finished:
        print(f"not finished, left out: {problem}, {base}, {noise:.0%}\n")
    return [record for record in runs if _key(record)[:3] in finished]


def _at_equal_time(runs: Sequence[Record], ratios: dict[tuple[str, str, str], float]) -> list[Record]:
    """Of each cell and method the runs that end within SAM's time: of two lengths the one that validates better."""
    lengths: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in runs:
        lengths[_key(record)][record["run"]["epochs"]].append(record["validation_error"])
    chosen = {}
    for key, errors in lengths.items():
        problem, _, base, method = key
        sam = max(record["run"]["epochs"] for record in runs if record["run"]["measured"])
        affordable = [epochs for epochs in errors if epochs <= round(sam / ratios[problem, base, method])]
        chosen[key] = min(affordable, key=lambda epochs: mean(errors[epochs]))
    return [record for record in runs if record["run"]["epochs"] == chosen[_key(record)]]


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record["run"][name] for name in ("problem", "noise", "base", "method"))


def _by_cell(records: Sequence[Record]) -> dict[Cell, dict[str, dict[int, Record]]]:
    """Records by cell, method and seed."""
    cells: dict[Cell, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        problem, noise, base, method = _key(record)
        cells[problem, noise, base][method][record["run"]["seed"]] = record
    return {cell: cells[cell] for cell in sorted(cells, key=lambda cell: (cell[0], cell[1], cell[2] != "SGD"))}


def paired_difference(values: Tensor, others: Tensor, *, num_draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of values - others over paired seeds [s], and the ends of its 95 % bootstrap interval."""
    differences = (values - others).double()
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(differences), (num_draws, len(differences)), generator=generator)
    means = differences[draws].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(differences.mean()), low, high


def _error_table(records: Sequence[Record]) -> str:
    rows = ["| | labels replaced | " + " | ".join(LABELS.values()) + " |", "| --- " * (2 + len(LABELS)) + "|"]
    for (problem, noise, base), methods in _by_cell(records).items():
        cells = []
        for method in LABELS:
            found = methods[method]
            errors = torch.tensor([found[seed]["test_error"] for seed in sorted(found)]) * 100
            if method == "plain":
                cells.append(f"{errors.mean():.2f}")
                continue
            plain = torch.tensor([methods["plain"][seed]["test_error"] for seed in sorted(found)]) * 100
            difference, low, high = paired_difference(errors, plain)
            sure = "**" if low > 0 or high < 0 else ""
            cells.append(f"{sure}{difference:+.2f}{sure} [{low:+.2f}, {high:+.2f}]")
        rows.append(f"| {problem}, {base} | {noise:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def measures(records: Sequence[Record]) -> list[str]:
    """Names of what was measured beside the errors."""
    return [name for name in records[0] if name not in ("run", "validation_error", "test_error")]


def _flatness_table(records: Sequence[Record]) -> str:
    """Geometric mean over cells of each method's measure relative to the base optimizer's."""
    names = [name for name in measures(records) if name not in ("train_error", "train_loss")]
    rows = ["| relative to the base optimizer alone | " + " | ".join(names) + " |", "| --- " * (1 + len(names)) + "|"]
    cells = _by_cell(records)
    for method in list(LABELS)[1:]:
        ratios = []
        for name in names:
            logs = []
            for methods in cells.values():
                seeds = [s for s in methods[method] if min(methods[m][s].get(name, 0) for m in (method, "plain")) > 0]
                logs += [torch.log(torch.tensor(methods[method][s][name] / methods["plain"][s][name])) for s in seeds]
            ratios.append(f"{float(torch.stack(logs).mean().exp()):.2f}" if logs else "")
        rows.append(f"| {LABELS[method]} | " + " | ".join(ratios) + " |")
    return "\n".join(rows)


def kendall_table(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Kendall's tau of each measure with the test error: over all runs of a problem and noise, and averages."""
    from scipy.stats import kendalltau

    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: _key(record)[:2]):
        groups[f"{record['run']['problem']}, {record['run']['noise']:.0%}"].append(record)
    taus: dict[str, dict[str, float]] = {}
    for name in measures(records):
        taus[name] = {}
        for group, members in groups.items():
            known = [(m[name], m["test_error"]) for m in members if name in m]
            taus[name][group] = float(kendalltau(*zip(*known, strict=True)).statistic)
        taus[name]["mean"] = mean(taus[name].values())
    return taus


def _tau_table(taus: dict[str, dict[str, float]]) -> str:
    groups = list(next(iter(taus.values())))
    rows = ["| | " + " | ".join(groups) + " |", "| --- " * (1 + len(groups)) + "|"]
    rows += [f"| {name} | " + " | ".join(f"{values[g]:+.2f}" for g in groups) + " |" for name, values in taus.items()]
    return "\n".join(rows)


def _draw_taus(taus: dict[str, dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = sorted(taus, key=lambda name: taus[name]["mean"])
    figure = Figure(figsize=(6.4, 0.34 * len(names) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#8a8a8a", linewidth=0.8)
    for row, name in enumerate(names):
        single = [value for group, value in taus[name].items() if group != "mean"]
        axes.plot(single, [row] * len(single), "o", color="#1f5fa8", alpha=0.4, markersize=5, markeredgewidth=0)
        axes.plot(taus[name]["mean"], row, "|", color="#b5432e", markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set(xlim=(-1, 1), xlabel="Kendall's tau with the test error: one point a problem, bar the mean")
    figure.savefig(path, dpi=150)


def _count_table(comparisons: dict[str, list[Record]]) -> str:
    rows = ["| | " + " | ".join(list(LABELS.values())[1:]) + " |", "| --- " * len(LABELS) + "|"]
    for name, records in comparisons.items():
        cells = (" / ".join(map(str, counts)) for counts in count_clear(records).values())
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def count_clear(records: Sequence[Record]) -> dict[str, tuple[int, int, int]]:
    """For each method the numbers of cells where it is clearly better, clearly worse, and neither."""
    counts = {method: [0, 0, 0] for method in list(LABELS)[1:]}
    for methods, method in itertools.product(_by_cell(records).values(), counts):
        found = methods[method]
        errors, plain = (
            torch.tensor([methods[m][seed]["test_error"] for seed in sorted(found)]) for m in (method, "plain")
        )
        _, low, high = paired_difference(errors, plain)
        counts[method][0 if high < 0 else 1 if low > 0 else 2] += 1
    return {method: (better, worse, neither) for method, (better, worse, neither) in counts.items()}
