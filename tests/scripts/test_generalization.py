"""The comparison of methods: equal effort, paired seeds, runs that are kept, intervals that are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

import generalization
from generalization import BASES, METHODS, PROBLEMS, Run, configurations, load, train
from generalization_report import kendall_table, paired_difference, write_report

SMALL = ["--problems", "cancer MLP", "--noises", "0.4", "--seeds", "2", "--tuning-seeds", "1", "--epochs", "1"]


@pytest.mark.parametrize("base", BASES)
def test_all_methods_are_tuned_on_as_many_configurations(base):
    for method in METHODS:
        tried = list(configurations(base, method))
        assert len(set(tried)) == 9
        assert all((rho == 0) == (method == "plain") for _, rho in tried)
    rates = [lr for lr, _ in configurations(base, "plain")]
    assert min(rates) < min(BASES[base][2])
    assert max(rates) > max(BASES[base][2])


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("noise", [0.0, 0.4, 0.8])
def test_labels_are_wrong_where_they_should_be(problem, noise):
    noisy, right = load(problem, noise, 3), load(problem, 0.0, 3)
    for part in ("train", "validation", "test"):
        torch.testing.assert_close(getattr(noisy, part)[0], getattr(right, part)[0])
        wrong = (getattr(noisy, part)[1] != getattr(right, part)[1]).float().mean()
        share = 0.0 if part == "test" else noise if "digits" in problem else noise / 2
        assert abs(float(wrong) - share) < 0.13
    assert len(noisy.train[1]) == PROBLEMS[problem][1]
    assert not torch.equal(load(problem, noise, 4).train[1], noisy.train[1])


def test_methods_of_a_seed_share_everything_but_the_method():
    def settings(method: str, rho: float) -> Run:
        shared = {"problem": "cancer MLP", "noise": 0.0, "base": "SGD", "lr": 0.03, "seed": 5, "epochs": 2}
        return Run(**shared, method=method, rho=rho, measured=False)

    assert train(settings("sam", 0.0)) == train(settings("plain", 0.0)) == train(settings("plain", 0.0))


def test_intervals_are_those_of_scipy():
    from scipy.stats import bootstrap

    values = torch.randn(12, generator=torch.Generator().manual_seed(0)).double()
    others = values - 0.5 + torch.randn(12, generator=torch.Generator().manual_seed(1)).double() / 3
    mean, low, high = paired_difference(values, others)
    truth = bootstrap(((values - others).numpy(),), lambda x, axis: x.mean(axis), method="percentile", rng=0)
    assert mean == pytest.approx(float((values - others).mean()))
    assert (low, high) == pytest.approx(tuple(truth.confidence_interval), abs=0.02)


def test_a_run_that_goes_on_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "--runs", str(tmp_path / "runs.jsonl"), "--output", str(tmp_path)]
    assert generalization.main(arguments) == 0
    first = capsys.readouterr().out
    assert "| cancer MLP, SGD | 40% |" in first
    assert (tmp_path / "generalization_tau.png").stat().st_size > 5_000
    monkeypatch.setattr(generalization, "train", None)
    assert generalization.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert generalization.main([*arguments, "--report-only"]) == 0
    assert capsys.readouterr().out == first
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    taus = kendall_table([record for record in records if "trace" in record])
    assert all(-1 <= tau <= 1 for values in taus.values() for tau in values.values())


def test_unfinished_comparisons_are_left_out_and_named(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    arguments = [*SMALL, "--runs", str(path), "--output", str(tmp_path)]
    assert generalization.main(arguments) == 0
    whole = capsys.readouterr().out
    lines = path.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"base": "AdamW"' in line and '"measured": true' in line)
    path.write_text("\n".join([*lines[:last], *lines[last + 1 :]]) + "\n")
    assert generalization.main([*arguments, "--report-only"]) == 0
    report = capsys.readouterr().out
    assert report.startswith("not finished, left out: cancer MLP, AdamW, 40%\n")
    assert "| cancer MLP, AdamW | 40% |" in whole
    assert "| cancer MLP, AdamW | 40% |" not in report
    assert "| cancer MLP, SGD | 40% |" in report


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^the file of runs holds no finished comparison\.$"):
        write_report([], tmp_path)
