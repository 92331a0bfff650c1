"""Cost and accuracy of each measure of sharpness as networks grow, beside other libraries in the same run.

Networks of three layers, trained for a moment on scikit-learn's digits, from 10^3 to 10^7 entries, in float32. H v is
held against float64, the rest against the dense Hessian up to 3,200 entries; beyond, eigenvalues against the median of
the libraries, traces against their mean. Times are processor time, in turns; a ratio is the median over rounds of a
library's time over sam_core's.

For example: python scripts/benchmarks/sharpness_measures.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from ascent_competitors import interleaved
from curvature_libraries import Library, Ours, libraries
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _common import run
from sam_core.sharpness import (
    compute_average_sharpness,
    compute_hessian,
    compute_hessian_vector_product,
    compute_m_sharpness,
    compute_sam_sharpness,
    compute_worst_case_sharpness,
)

DENSE = 3_200  # entries, up to which the whole Hessian is formed
NUM_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class Size:
    """How wide the network is, and how much work is affordable there."""

    width: int
    num_samples: int
    rounds: int
    num_products: int  # for a trace
    num_steps: int  # of Lanczos, for a density; 0: for none
    k: int = 3  # eigenvalues


SIZES = {
    "1e3": Size(width=12, num_samples=256, rounds=7, num_products=60, num_steps=40),
    "3e3": Size(width=30, num_samples=256, rounds=5, num_products=60, num_steps=40),
    "1e5": Size(width=280, num_samples=256, rounds=3, num_products=60, num_steps=40),
    "1e6": Size(width=960, num_samples=128, rounds=2, num_products=30, num_steps=20),
    "1e7": Size(width=3120, num_samples=32, rounds=1, num_products=6, num_steps=0, k=1),
}


@dataclass
class Row:
    """One measure of one network, by library."""

    title: str
    seconds: dict[str, list[float]]
    errors: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="entries, about")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for name in arguments.sizes:
        size = SIZES[name]
        model, batch = trained_network(size)
        num_entries = sum(p.numel() for p in model.parameters())
        vector = torch.randn(num_entries, generator=torch.Generator().manual_seed(0))
        exact, truth = _in_float64(model, batch, vector)
        parts = list(zip(batch[0].chunk(NUM_BATCHES), batch[1].chunk(NUM_BATCHES), strict=True))
        for data, whole in (([batch], True), (parts, False)):
            title = f"n = {num_entries:,}, {size.num_samples} samples in {len(data)} batch{'es' * (not whole)}"
            print(f"\n{title}\n", flush=True)
            with ExitStack() as stack:
                found = libraries(model, data, stack)
                _print_rows(list(found), _rows(found, size, vector, exact, truth, whole))
        _print_first_order(model, batch, size)


def trained_network(size: Size) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network after thirty steps of Adam, and the digits it was trained on."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    batch = torch.as_tensor(inputs[: size.num_samples] / 16).float(), torch.as_tensor(targets[: size.num_samples])
    torch.manual_seed(0)
    width = size.width
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03 / width**0.5)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, batch


def _in_float64(model: nn.Module, batch: tuple[Tensor, Tensor], vector: Tensor) -> tuple[Tensor, Tensor | None]:
    """H v [n], and the eigenvalues of H [n], falling, if n is small enough."""
    model.double()
    data = model, cross_entropy, batch[0].double(), batch[1]
    product, eigenvalues = compute_hessian_vector_product(*data, vector.double()), None
    if len(vector) <= DENSE:
        eigenvalues = torch.linalg.eigvalsh(compute_hessian(*data)).flip(0)
    model.float()
    return product, eigenvalues


def _rows(
    found: dict[str, Library], size: Size, vector: Tensor, exact: Tensor, truth: Tensor | None, whole: bool
) -> Iterator[Row]:
    """One after the other; of the largest network fewer."""
    ours = found["sam_core"]
    assert isinstance(ours, Ours)
    errors = partial(_product_errors, exact=exact)
    yield _row("H v", found, size.rounds + 2, lambda lib, seed: lib.product(vector), errors)
    if not whole and not size.num_steps:
        return
    ours.top(size.k, 0)
    yield _row(
        f"{size.k} largest eigenvalue{'s' * (size.k > 1)} ({ours.num_products} products)",
        found,
        size.rounds,
        lambda lib, seed: lib.top(size.k, ours.num_products),
        partial(_eigenvalue_errors, truth=truth),
    )
    for method in ("hutchinson", "hutch++") if whole and size.num_steps else ("hutch++",):
        yield _row(
            f"trace, {method} ({size.num_products} products)",
            found,
            size.rounds,
            lambda lib, seed, method=method: lib.trace(method, size.num_products, seed),  # type: ignore[misc]
            partial(_trace_errors, truth=truth),
        )
    if whole and size.num_steps:
        yield _row(
            f"density ({size.num_steps} steps)",
            found,
            size.rounds,
            lambda lib, seed: lib.density(size.num_steps, seed),
            partial(_density_errors, truth=truth),
        )


def _row(
    title: str,
    found: dict[str, Library],
    rounds: int,
    ask: Callable[[Library, int], Any],
    errors: Callable[[dict[str, list[Any]]], dict[str, float]],
) -> Row:
    """Ask all in turn; of several rounds the first warms up."""
    answers: dict[str, list[Any]] = {name: [] for name in found}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + (rounds > 1)):
        for name, library in found.items():
            started = time.process_time()
            answers[name].append(ask(library, number))
            seconds[name].append(time.process_time() - started)
    return Row(title, {name: times[rounds > 1 :] for name, times in seconds.items()}, errors(answers))


def _product_errors(answers: dict[str, list[Tensor]], exact: Tensor) -> dict[str, float]:
    return {name: float((found[0] - exact).norm() / exact.norm()) for name, found in answers.items()}


def _eigenvalue_errors(answers: dict[str, list[Tensor]], truth: Tensor | None) -> dict[str, float]:
    if truth is None:
        truth = torch.stack([found[0] for found in answers.values()]).median(dim=0).values
    wanted = truth[: len(next(iter(answers.values()))[0])]
    return {name: float(((found[0] - wanted) / wanted).abs().max()) for name, found in answers.items()}


def _trace_errors(answers: dict[str, list[float]], truth: Tensor | None) -> dict[str, float]:
    """Root mean square over seeds, relative."""
    everything = [value for values in answers.values() for value in values]
    trace = float(truth.sum()) if truth is not None else statistics.fmean(everything)
    return {
        name: statistics.fmean((value / trace - 1) ** 2 for value in values) ** 0.5 for name, values in answers.items()
    }


def _density_errors(answers: dict[str, list[tuple[Tensor, Tensor]]], truth: Tensor | None) -> dict[str, float]:
    """Distance by which the estimated distribution must be moved to the true one, over the largest eigenvalue."""
    if truth is None:
        return {}
    from scipy.stats import wasserstein_distance

    return {
        name: statistics.fmean(
            wasserstein_distance(nodes, truth, v_weights=None, u_weights=weights.clamp(min=0)) / float(truth[0])
            for nodes, weights in found
        )
        for name, found in answers.items()
    }


def _print_rows(names: list[str], rows: Iterator[Row]) -> None:
    others = names[1:]
    print("| | ms | " + " | ".join(f"{name} ×" for name in others) + " | relative error: " + ", ".join(names) + " |")
    print("| --- | ---: |" + " ---: |" * len(others) + " --- |")
    for row in rows:
        ours = row.seconds["sam_core"]
        ratios = [statistics.median(b / a for a, b in zip(ours, row.seconds[name], strict=True)) for name in others]
        errors = ", ".join(f"{row.errors[name]:.0e}" for name in names) if row.errors else ""
        cells = [row.title, f"{1000 * statistics.median(ours):.3g}", *(f"{ratio:.2f}" for ratio in ratios), errors]
        print("| " + " | ".join(cells) + " |", flush=True)


def _print_first_order(model: nn.Module, batch: tuple[Tensor, Tensor], size: Size) -> None:
    """The neighbourhoods, in gradients: nobody else has them all."""
    inputs, targets = batch

    def gradient() -> None:
        torch.autograd.grad(cross_entropy(model(inputs), targets), list(model.parameters()))

    actions: dict[str, Callable[[], object]] = {
        "gradient": gradient,
        "SAM sharpness": partial(compute_sam_sharpness, model, cross_entropy, *batch),
        "m-sharpness, m = n / 4": partial(compute_m_sharpness, model, cross_entropy, *batch, m=len(targets) // 4),
        "worst case, 5 steps": partial(compute_worst_case_sharpness, model, cross_entropy, *batch, num_steps=5),
        "average case, 5 pairs": partial(compute_average_sharpness, model, cross_entropy, *batch, num_draws=5),
    }
    seconds = interleaved(actions, size.rounds, clock=time.process_time)
    unit = seconds.pop("gradient")
    ratios = {n: statistics.median(b / a for a, b in zip(unit, s, strict=True)) for n, s in seconds.items()}
    print(
        f"\nin gradients of {1000 * statistics.median(unit):.3g} ms: "
        + ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items()),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
