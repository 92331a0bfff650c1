"""A sweep runs each pair once, resumes from its file, and says no more than its numbers allow."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rho_sweep
from sam_core.tuning import RhoRun, RhoSweep, plot_sweeps, sweep_rho

RHOS = (0.0, 0.1, 0.2, 0.4)
SEEDS = (0, 1, 2, 3)
NOISE = np.random.default_rng(0).normal(size=(len(RHOS), len(SEEDS)))
VALUES = {
    (rho, seed): 0.9 + [0.0, 0.02, 0.04, -0.1][i] + 0.05 * seed + 0.004 * NOISE[i, seed]
    for i, rho in enumerate(RHOS)
    for seed in SEEDS
}


def train(rho, seed):
    return {"validation": VALUES[rho, seed], "sharpness": 1 / (0.1 + rho) + seed}


def sweep_of(values, mode="max"):
    """A sweep with the given validation values by rho, one a seed."""
    runs = [RhoRun(rho=rho, seed=i, validation=value) for rho, row in values.items() for i, value in enumerate(row)]
    return RhoSweep(runs=tuple(runs), mode=mode)


# The table ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_table_is_numpys(mode):
    sweep = sweep_rho(train, RHOS[::-1], seeds=SEEDS, mode=mode)
    assert (sweep.rhos, sweep.seeds) == (RHOS, SEEDS)
    plain = np.array([VALUES[0.0, seed] for seed in SEEDS])
    sign = 1 if mode == "max" else -1
    for row, rho in zip(sweep.table, RHOS, strict=True):
        values = np.array([VALUES[rho, seed] for seed in SEEDS])
        gains = sign * (values - plain)
        sharpness = 1 / (0.1 + rho) + np.array(SEEDS)
        for column, mean, error in (
            (values, row.validation, row.validation_error),
            (gains, row.gain, row.gain_error),
            (sharpness, row.sharpness, row.sharpness_error),
        ):
            assert mean == pytest.approx(column.mean(), rel=1e-12)
            assert error == pytest.approx(column.std(ddof=1) / 2, rel=1e-9, abs=1e-15)
    assert sweep.best().rho == (0.2 if mode == "max" else 0.4)


def test_gains_are_paired_by_seed_whatever_the_order_of_runs():
    sweep = sweep_rho(train, RHOS, seeds=SEEDS)
    order = np.random.default_rng(1).permutation(len(sweep.runs))
    assert RhoSweep(runs=tuple(sweep.runs[i] for i in order), mode="max").table == sweep.table


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], r"runs must hold every pair of rho and seed once, 0 runs, got 0\."),
        ([(0.0, 0), (0.0, 1), (0.1, 0)], r"runs must hold every pair of rho and seed once, 4 runs, got 3\."),
        ([(0.0, 0), (0.0, 0)], r"runs must hold every pair of rho and seed once, 1 runs, got 2\."),
    ],
)
def test_a_pair_that_is_missing_or_twice_there_is_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        RhoSweep(runs=tuple(RhoRun(rho=rho, seed=seed, validation=1.0) for rho, seed in pairs), mode="max")


def test_of_equal_rhos_the_smallest_is_best():
    assert sweep_of({0.0: [1.0], 0.1: [2.0], 0.2: [2.0]}).best().rho == 0.1


def test_what_is_not_known_is_nan_and_not_shown():
    sweep = sweep_of({0.1: [1.0], 0.2: [2.0], 0.3: [1.5]})
    assert all(math.isnan(value) for row in sweep.table for value in (row.gain, row.sharpness, row.validation_error))
    assert sweep.to_markdown().splitlines()[:4] == [
        "| rho | validation |",
        "| --- | --- |",
        "| 0.1 | 1 |",
        "| **0.2** | 2 |",
    ]


def test_markdown():
    text = sweep_rho(train, RHOS, seeds=SEEDS).to_markdown()
    assert text.splitlines() == [
        "| rho | validation | gain over rho = 0 | sharpness |",
        "| --- | --- | --- | --- |",
        "| 0 | 0.976 ± 0.032 | | 11.50 ± 0.65 |",
        "| 0.1 | 0.997 ± 0.034 | +0.0213 ± 0.0014 | 6.50 ± 0.65 |",
        "| **0.2** | 1.012 ± 0.033 | +0.0367 ± 0.0011 | 4.83 ± 0.65 |",
        "| 0.4 | 0.870 ± 0.033 | -0.1053 ± 0.0021 | 3.50 ± 0.65 |",
        "",
        "rho = 0.2 is better than rho = 0 by 0.0367 ± 0.0034 (95 %, 4 seeds, paired).",
    ]


# What it says ---------------------------------------------------------------------------------------------------------

LARGEST = "is the largest of the grid: try larger ones"
SMALLEST = "is the smallest of the grid: try smaller ones"
UNKNOWN = "rho = 0 is not in the grid: whether any rho helps is not known"
NONE_HELPS = "rho = 0 is best: no rho of the grid helps"
WITHIN = "The difference between rho = 0.1 and rho = 0 is within the error: 0.10 ± 0.37 (95 %, 3 seeds, paired)"
BETTER = "rho = 0.1 is better than rho = 0 by 0.100 ± 0.025 (95 %, 3 seeds, paired)"
CHANCE = "With one seed it is not known whether rho = 0.1 is better than rho = 0 by more than chance"
DIVERGED = "A run diverged at rho = 0.2"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({0.0: [1, 2, 3], 0.1: [1.09, 2.1, 3.11], 0.2: [0, 1, 2]}, [BETTER]),
        ({0.0: [1, 2, 3], 0.1: [1.25, 1.95, 3.1], 0.2: [0, 1, 2]}, [WITHIN]),
        ({0.0: [1, 2, 3], 0.1: [1.09, 2.1, 3.11]}, [f"The best rho, 0.1, {LARGEST}", BETTER]),
        ({0.0: [1, 2, 3], 0.1: [0, 1, 2]}, [NONE_HELPS]),
        ({0.05: [1, 2, 3], 0.1: [0, 1, 2]}, [f"The best rho, 0.05, {SMALLEST}", UNKNOWN]),
        ({0.05: [0, 1, 2], 0.1: [1, 2, 3]}, [f"The best rho, 0.1, {LARGEST}", UNKNOWN]),
        ({0.05: [0], 0.1: [2], 0.2: [1]}, [UNKNOWN]),
        ({0.0: [1], 0.1: [1.1], 0.2: [0]}, [CHANCE]),
        ({0.0: [1], 0.1: [1.1], 0.2: [math.nan]}, [DIVERGED, CHANCE]),
        ({0.0: [math.nan], 0.1: [1.1], 0.2: [1]}, ["A run diverged at rho = 0"]),
    ],
)
def test_remarks(values, expected):
    sweep = sweep_of(values)
    assert [remark.rstrip(".") for remark in sweep.remarks()] == expected
    assert all(remark in sweep.to_markdown() for remark in sweep.remarks())


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10, 16, 40])
def test_the_interval_is_students(num_seeds):
    """scipy's quantile; beyond 16 seeds ours stays that of 16, a little too wide."""
    from scipy.stats import t

    gains = np.random.default_rng(num_seeds).normal(1, 0.1, size=num_seeds)
    half = t.ppf(0.975, min(num_seeds, 16) - 1) * gains.std(ddof=1) / num_seeds**0.5
    (remark,) = sweep_of({0.0: [0.0] * num_seeds, 0.1: gains.tolist(), 0.2: [-1.0] * num_seeds}).remarks()
    assert float(remark.split("± ")[1].split()[0]) == pytest.approx(half, rel=0.05)


def test_a_sweep_that_diverged_everywhere_has_no_best():
    with pytest.raises(ValueError, match=r"runs must be finite for one rho at least, got none\."):
        sweep_of({0.0: [math.nan], 0.1: [math.nan]}).best()


# Running --------------------------------------------------------------------------------------------------------------


def counted(calls, stop=None):
    def function(rho, seed):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append((rho, seed))
        return train(rho, seed)

    return function


def test_every_pair_runs_once_seeds_outermost_and_is_logged(caplog):
    calls = []
    with caplog.at_level(logging.INFO, logger="sam_core.tuning.sweep"):
        sweep_rho(counted(calls), RHOS[:2], seeds=(3, 1))
    assert calls == [(0.0, 3), (0.1, 3), (0.0, 1), (0.1, 1)]
    assert caplog.messages[0] == f"rho 0, seed 3: validation {VALUES[0.0, 3]:.6g}"


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    file, first, second = tmp_path / "new" / "sweep.json", [], []
    with pytest.raises(KeyboardInterrupt):
        sweep_rho(counted(first, stop=3), RHOS, seeds=SEEDS, file=file)
    assert len(json.loads(file.read_text())["runs"]) == 3
    resumed = sweep_rho(counted(second), RHOS, seeds=SEEDS, file=file)
    assert len(first) + len(second) == len(set(first + second)) == len(RHOS) * len(SEEDS)
    assert resumed == sweep_rho(train, RHOS, seeds=SEEDS)
    assert [path.name for path in file.parent.iterdir()] == ["sweep.json"]


def test_a_grid_may_grow_and_a_smaller_one_reads_its_part(tmp_path):
    file, calls = tmp_path / "sweep.json", []
    sweep_rho(train, RHOS[:2], seeds=(0,), file=file)
    assert sweep_rho(counted(calls), RHOS, seeds=(0, 1), file=file) == sweep_rho(train, RHOS, seeds=(0, 1))
    assert len(calls) == 6
    assert sweep_rho(counted(calls), RHOS[1:2], seeds=(1,), file=file).runs == (
        RhoRun(rho=0.1, seed=1, validation=VALUES[0.1, 1], sharpness=6.0),
    )
    assert len(calls) == 6


def test_a_file_of_other_settings_is_refused_and_kept(tmp_path):
    file = tmp_path / "sweep.json"
    sweep_rho(train, RHOS[:2], seeds=(0,), file=file, settings={"epochs": 5, "sizes": (1, 2)})
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match=r"settings must be those of .*sweep\.json', \{'epochs': 5, .* got \{'epochs': 6"
    ):
        sweep_rho(train, RHOS[:2], seeds=(0,), file=file, settings={"epochs": 6, "sizes": (1, 2)})
    assert file.read_bytes() == before
    sweep_rho(counted([], stop=0), RHOS[:2], seeds=(0,), file=file, settings={"epochs": 5, "sizes": [1, 2]})


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "sweep.json"
    sweep_rho(train, RHOS[:1], seeds=(0,), file=file)
    before = file.read_bytes()

    def full(self, target):
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        sweep_rho(train, RHOS[:2], seeds=(0,), file=file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_that_diverged_is_kept_as_such(tmp_path):
    file = tmp_path / "sweep.json"
    results = {0.0: {"validation": 1.0, "sharpness": 2.0}, 9.0: {"validation": math.inf, "sharpness": math.nan}}
    for _ in range(2):
        sweep = sweep_rho(lambda rho, seed: results[rho], [0.0, 9.0], seeds=[0], file=file)
        assert math.isnan(sweep.table[1].validation) and math.isnan(sweep.table[1].sharpness)
        assert (sweep.best().rho, sweep.table[0].sharpness) == (0.0, 2.0)
    assert json.loads(file.read_text())["runs"][1] == {"rho": 9.0, "seed": 0, "validation": None, "sharpness": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rhos": []}, r"rhos must hold one value at least, none of them twice, got \[\]\."),
        ({"rhos": [0.1, 0.1]}, r"rhos must hold one value at least, none of them twice, got \[0\.1, 0\.1\]\."),
        ({"rhos": [0.1, -0.1]}, r"rho must be >= 0, got -0\.1\."),
        ({"seeds": []}, r"seeds must hold one value at least, none of them twice, got \[\]\."),
        ({"seeds": [0.5]}, r"seed must be an integer >= 0, got 0\.5\."),
        ({"mode": "best"}, r"mode must be one of 'max', 'min', got 'best'\."),
        ({"train": lambda rho, seed: 0.9}, r"train must return numbers as 'validation' and, .*, got 0\.9\."),
        (
            {"train": lambda rho, seed: {"accuracy": 0.9}},
            r"train must return numbers as .*, got \{'accuracy': 0\.9\}\.",
        ),
        (
            {"train": lambda rho, seed: {"validation": None}},
            r"train must return numbers as .*, got \{'validation': None",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sweep_rho(**{"train": train, "rhos": RHOS, **arguments})


# The picture ----------------------------------------------------------------------------------------------------------


def figure_of(monkeypatch, sweeps, **options):
    """The figure that would be saved."""
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    plot_sweeps(sweeps, "unused.png", **options)
    return saved[0]


def test_a_picture_is_written(tmp_path):
    from PIL import Image

    path = tmp_path / "new" / "rho.png"
    sweep_rho(train, RHOS, seeds=SEEDS).plot(path)
    with Image.open(path) as picture:
        assert picture.width > 800 and picture.height > 250
        assert len(set(picture.convert("L").tobytes())) > 50


def test_the_picture_shows_the_means_and_the_sharpness_beside_them(monkeypatch):
    sweep = sweep_rho(train, RHOS[:3], seeds=SEEDS)
    figure = figure_of(monkeypatch, {"clean": sweep, "noisy": sweep}, validation="accuracy", sharpness="eigenvalue")
    assert [ax.get_ylabel() for ax in figure.axes] == ["accuracy", "eigenvalue"] * 2
    assert [ax.get_title("left") for ax in figure.axes[::2]] == ["clean", "noisy"]
    for ax, name in zip(figure.axes, ("validation", "sharpness"), strict=False):
        (line, _, bars) = ax.containers[0]
        np.testing.assert_allclose(line.get_ydata(orig=False), [getattr(row, name) for row in sweep.table])
        halves = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars[0].get_segments()]
        np.testing.assert_allclose(halves, [getattr(row, f"{name}_error") for row in sweep.table])
        assert ax.get_xscale() == "symlog"
        assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.1", "0.2"]


def test_a_collapse_does_not_squeeze_the_rest(monkeypatch):
    sweep = sweep_of({0.0: [0.90], 0.1: [0.92], 0.2: [0.93], 0.5: [0.91], 1.0: [0.1], 2.0: [math.nan]})
    (ax,) = figure_of(monkeypatch, {"": sweep}).axes  # no sharpness, no second panel
    assert list(ax.containers[0][0].get_xdata()) == [0.0, 0.1, 0.2, 0.5]
    assert ax.get_ylim()[0] > 0.85
    assert [text.get_text() for text in ax.texts] == ["0.1", "diverged"]


def test_a_grid_of_zero_alone_has_a_picture(monkeypatch):
    (ax,) = figure_of(monkeypatch, {"": sweep_of({0.0: [1.0, 2.0]})}).axes
    assert ax.get_xscale() == "linear"


def test_the_picture_refuses(monkeypatch):
    with pytest.raises(ValueError, match=r"sweeps must hold one sweep at least, got none\."):
        plot_sweeps({}, "unused.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plotting a sweep needs matplotlib: pip install matplotlib\."):
        sweep_of({0.0: [1.0]}).plot("unused.png")


# The benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_trains_and_reports(tmp_path, capsys):
    argv = ["--rhos", "0", "0.3", "--noise", "0", "0.4", "--num-seeds", "1", "--num-steps", "10", "--num-train", "50"]
    argv += ["--perturb", "norms", "--sharpness", "rise"]
    for _ in range(2):  # the second time from the files
        assert rho_sweep.main([*argv, "--file", str(tmp_path / "runs"), "--output", str(tmp_path / "rho.png")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "labels all right" in lines and "40% of the labels random" in lines
    assert {path.name for path in tmp_path.iterdir()} == {"runs_0.json", "runs_0.4.json", "rho.png"}
    argv[argv.index("10")] = "11"
    assert rho_sweep.main([*argv, "--file", str(tmp_path / "runs")]) == 2
    assert "error: settings must be those of" in capsys.readouterr().err
