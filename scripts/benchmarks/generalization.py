"""Does a flat minimum generalise? Real data, methods with the same tuning effort, paired seeds, and the measures.

Problems are scikit-learn's digits (with a perceptron and with a small convolutional network) and breast cancer, with
labels as they are and with 40 % and 80 % of the training and validation labels replaced by other ones. A problem, a
base optimizer and a method are tuned on the same number of configurations, by the (equally noisy) validation split of
seeds of their own; the best one is run on new seeds, which all methods share: split, noise, first weights, batches.

Finished runs are kept in a file of JSON lines; the same command goes on where it stopped. For example:

    python scripts/benchmarks/generalization.py --runs runs.jsonl --output docs/figures
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from generalization_report import write_report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sam_core
from _common import positive, run
from sam_core import sharpness
from sam_core.bounds import VacuousBoundWarning, compute_pac_bayes_bound

PROBLEMS = {"digits MLP": ("digits", 700, 300), "digits CNN": ("digits", 700, 300), "cancer MLP": ("cancer", 200, 100)}
NOISES = (0.0, 0.4, 0.8)
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float], tuple[float, ...]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 5e-4}, (0.01, 0.03, 0.1)),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}, (0.001, 0.003, 0.01)),
}
# Each method gets the same nine configurations: three learning rates times three radii; the plain base optimizer nine
# learning rates in place of them.
RADII = {
    "sam": (0.05, 0.1, 0.2),
    "asam": (0.5, 1.0, 2.0),
    "looksam": (0.05, 0.1, 0.2),
    "msam": (0.1, 0.3, 1.0),
    "gsam": (0.05, 0.1, 0.2),
    "friendlysam": (0.05, 0.1, 0.2),
}
METHODS = ("plain", *RADII)
EPOCHS, BATCH = 40, 50


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is made of; its key in the file."""

    problem: str
    noise: float
    base: str
    method: str
    lr: float
    rho: float
    seed: int
    epochs: int
    measured: bool


@dataclass(frozen=True)
class Split:
    """Inputs and labels; those for training and validation are partly wrong, those for the test are right."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=Path, default=Path("generalization.jsonl"), help="file of finished runs (default: %(default)s)")
    add("--output", type=Path, default=Path(), help="folder for tables and figures (default: here)")
    add("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="PROBLEM")
    add("--noises", nargs="+", type=float, choices=NOISES, default=list(NOISES), metavar="SHARE")
    add("--seeds", type=positive, default=10, help="paired seeds (default: 10)")
    add("--tuning-seeds", type=positive, default=2, help="default: 2")
    add("--epochs", type=positive, default=EPOCHS, help="of equal-epoch runs (default: 40)")
    add("--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="only each N-th problem from the I-th")
    add("--report-only", action="store_true", help="write the report of what the file holds")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    records = _Records(arguments.runs)
    if not arguments.report_only:
        cells = list(itertools.product(arguments.problems, arguments.noises, BASES))
        for problem, noise, base in cells[arguments.part[0] :: arguments.part[1]]:
            _run_cell(records, problem, noise, base, arguments)
    write_report(list(records), arguments.output)


def _run_cell(records: _Records, problem: str, noise: float, base: str, arguments: argparse.Namespace) -> None:
    """Tune all methods on one problem, then run their best configurations at equal epochs and at equal time."""
    seconds = {method: _seconds_per_epoch(problem, base, method) for method in METHODS}
    for method in METHODS:
        tuned = {}
        for lr, rho in configurations(base, method):
            found = [
                records.get(
                    Run(
                        problem=problem,
                        noise=noise,
                        base=base,
                        method=method,
                        lr=lr,
                        rho=rho,
                        seed=1000 + seed,
                        epochs=arguments.epochs,
                        measured=False,
                    )
                )
                for seed in range(arguments.tuning_seeds)
            ]
            tuned[lr, rho] = sum(record["validation_error"] for record in found)
        lr, rho = min(tuned, key=lambda configuration: tuned[configuration])
        # In the time that SAM takes for its epochs; the ratio is measured in this run, steps of all methods in turn.
        known = records.time_ratio(problem, base, method, seconds[method] / seconds["sam"])
        longer = round(arguments.epochs / known)
        for seed, epochs in itertools.product(range(arguments.seeds), sorted({arguments.epochs, longer})):
            records.get(
                Run(
                    problem=problem,
                    noise=noise,
                    base=base,
                    method=method,
                    lr=lr,
                    rho=rho,
                    seed=seed,
                    epochs=epochs,
                    measured=epochs == arguments.epochs,
                )
            )


def configurations(base: str, method: str) -> Iterator[tuple[float, float]]:
    """Nine pairs of learning rate and radius."""
    rates = BASES[base][2]
    if method == "plain":
        low, high = rates[0] / 3, rates[-1] * 3
        yield from ((round(low * (high / low) ** (i / 8), 6), 0.0) for i in range(9))
    else:
        yield from itertools.product(rates, RADII[method])


class _Records:
    """Finished runs, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._known = {json.dumps(record["run"], sort_keys=True): record for record in self._found}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._found)

    def get(self, settings: Run) -> dict[str, Any]:
        """The record of a run, made now if it is not there yet."""
        return self._remember(asdict(settings), lambda: train(settings))

    def time_ratio(self, problem: str, base: str, method: str, ratio: float) -> float:
        """The ratio that was measured first, so that a run that goes on keeps its numbers of epochs."""
        key = {"time_of": method, "problem": problem, "base": base}
        return float(self._remember(key, lambda: {"ratio": ratio})["ratio"])

    def _remember(self, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._known:
            record = {"run": settings, **make()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._found.append(record)
            self._known[key] = record
        return self._known[key]


def load(problem: str, noise: float, seed: int) -> Split:
    """A random split of the data of a problem, a share of the labels of its first two parts replaced by others."""
    from sklearn import datasets

    name, num_train, num_validation = PROBLEMS[problem]
    data = datasets.load_digits() if name == "digits" else datasets.load_breast_cancer()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    inputs, right = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    num_known = num_train + num_validation
    known = inputs[:num_known]
    inputs = inputs / 16 if name == "digits" else (inputs - known.mean(0)) / known.std(0)
    if problem == "digits CNN":
        inputs = inputs.reshape(-1, 1, 8, 8)
    num_classes = int(right.max()) + 1
    wrong = (right + torch.randint(1, num_classes, right.shape, generator=generator)) % num_classes
    # Of two classes, replacing more than half of the labels would only exchange their names.
    share = noise if num_classes > 2 else noise / 2
    given = torch.where(torch.rand(len(right), generator=generator) < share, wrong, right)
    a, b = slice(0, num_train), slice(num_train, num_known)
    return Split((inputs[a], given[a]), (inputs[b], given[b]), (inputs[num_known:], right[num_known:]))


def build(problem: str, seed: int) -> nn.Module:
    """The network of a problem."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if problem == "digits CNN":
            blocks = [
                nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU()) for c, d in ((1, 8), (8, 16))
            ]
            return nn.Sequential(
                blocks[0], nn.MaxPool2d(2), blocks[1], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
            )
        width, num_inputs, num_classes = (128, 64, 10) if problem == "digits MLP" else (32, 30, 2)
        return nn.Sequential(
            nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes)
        )


def make_optimizer(model: nn.Module, base: str, method: str, lr: float, rho: float) -> torch.optim.Optimizer:
    """The base optimizer alone, or the method around it."""
    kind, options, _ = BASES[base]
    if method == "plain":
        plain: Any = kind
        return plain(model.parameters(), lr=lr, **options)  # type: ignore[no-any-return]
    wrapper: Any = sam_core.METHODS[method]
    return wrapper(model.parameters(), kind, rho=rho, lr=lr, **options)  # type: ignore[no-any-return]


def train(settings: Run) -> dict[str, float]:
    """Train, and return errors and measures."""
    split, model = load(settings.problem, settings.noise, settings.seed), build(settings.problem, settings.seed)
    first = [param.detach().clone() for param in model.parameters()]
    optimizer = make_optimizer(model, settings.base, settings.method, settings.lr, settings.rho)
    try:
        _fit(model, optimizer, split.train, settings.epochs, torch.Generator().manual_seed(settings.seed))
    except FloatingPointError:  # too large a step for this method: the worst there is, when it comes to tuning
        return {"validation_error": 1.0, "test_error": 1.0, "train_error": 1.0}
    if isinstance(optimizer, sam_core.OptimizerWrapper):
        with optimizer.at_weights():
            return _report(model, split, first, settings)
    return _report(model, split, first, settings)


def _fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    epochs: int,
    generator: torch.Generator,
) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    model.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(data[1]), generator=generator).split(BATCH):
            batch = data[0][indices], data[1][indices]
            if isinstance(optimizer, sam_core.OptimizerWrapper):
                optimizer.step(sam_core.make_closure(model, [batch], cross_entropy, optimizer))
            else:
                optimizer.zero_grad()
                cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
        scheduler.step()


@torch.no_grad()
def _error(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) != data[1]).float().mean())


def _report(model: nn.Module, split: Split, first: list[Tensor], settings: Run) -> dict[str, float]:
    model.eval()
    report = {
        "validation_error": _error(model, split.validation),
        "test_error": _error(model, split.test),
        "train_error": _error(model, split.train),
    }
    if settings.measured:
        report |= _measures(model, split.train, first)
    return report


def _measures(model: nn.Module, data: tuple[Tensor, Tensor], first: list[Tensor]) -> dict[str, float]:
    """Sharpness of the training loss, and the second-order PAC-Bayes estimate for 1 - p(label), which is in [0, 1]."""

    def miss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1 - outputs.softmax(dim=1).gather(1, targets[:, None]).mean()

    arguments = (model, cross_entropy, *data)
    with torch.no_grad():
        outputs = model(data[0])
        risk, loss = float(miss(outputs, data[1])), float(cross_entropy(outputs, data[1]))
    distance = sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), first, strict=True))
    return {
        "train_loss": loss,
        "one-step sharpness": sharpness.compute_sam_sharpness(*arguments, rho=0.05),
        "adaptive sharpness": sharpness.compute_sam_sharpness(*arguments, rho=0.5, adaptive=True, eta=0.01),
        "worst-case sharpness": sharpness.compute_worst_case_sharpness(*arguments, rho=0.05, num_steps=8),
        "average sharpness": sharpness.compute_average_sharpness(*arguments, sigma=0.02, num_draws=10).value,
        "largest eigenvalue": float(sharpness.compute_top_eigenvalues(*arguments, 1, tol=1e-2).eigenvalues[0]),
        "trace": sharpness.compute_hessian_trace(*arguments, 30).value,
        "distance from the start": distance**0.5,
        **_bound(model, miss, data, risk, distance),
    }


def _bound(
    model: nn.Module, miss: Any, data: tuple[Tensor, Tensor], risk: float, distance_squared: float
) -> dict[str, float]:
    trace = sharpness.compute_hessian_trace(model, miss, *data, 30).value
    num_params = sum(param.numel() for param in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VacuousBoundWarning)  # all of them are: it is their order that counts
        bound = compute_pac_bayes_bound(
            risk, max(trace, 0.0), len(data[1]), num_params, prior_variance=0.01, distance_squared=distance_squared
        )
    return {"PAC-Bayes estimate": bound}


def _seconds_per_epoch(problem: str, base: str, method: str) -> float:
    """Processor time of an epoch, the least of five."""
    split, model = load(problem, 0.0, 0), build(problem, 0)
    optimizer = make_optimizer(model, base, method, 0.01, 0.05)
    times = []
    for _ in range(5):
        start = time.process_time()
        _fit(model, optimizer, split.train, 1, torch.Generator().manual_seed(0))
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
