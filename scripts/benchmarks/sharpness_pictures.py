"""Draw the loss landscape and the Hessian's spectral density of a small network, and rescale it.

A network of two layers with ReLU learns 400 of scikit-learn's digits. Multiplying its first layer by a factor and
dividing the second by it leaves the function as it is (Dinh et al. 2017); the table says what becomes of each measure.

For example: python scripts/benchmarks/sharpness_pictures.py --output docs/figures
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _common import run
from sam_core.sharpness import (
    compute_average_sharpness,
    compute_hessian_trace,
    compute_loss_landscape,
    compute_m_sharpness,
    compute_sam_sharpness,
    compute_spectral_density,
    compute_top_eigenvalues,
    compute_worst_case_sharpness,
)

Measure = Callable[..., Any]
MEASURES: dict[str, Measure] = {
    "largest eigenvalue": lambda model, loss, x, y: float(
        compute_top_eigenvalues(model, loss, x, y, k=1).eigenvalues[0]
    ),
    "trace": lambda model, loss, x, y: compute_hessian_trace(model, loss, x, y).value,
    "SAM sharpness, ρ = 0.1": partial(compute_sam_sharpness, rho=0.1),
    "m-sharpness, m = 50, ρ = 0.1": partial(compute_m_sharpness, rho=0.1, m=50),
    "worst case l2, ρ = 0.1": partial(compute_worst_case_sharpness, rho=0.1),
    "worst case l∞, ρ = 0.01": partial(compute_worst_case_sharpness, rho=0.01, norm="linf"),
    "average, σ = 0.05": lambda model, loss, x, y: compute_average_sharpness(model, loss, x, y, 0.05).value,
    "adaptive SAM sharpness, ρ = 1": partial(compute_sam_sharpness, rho=1.0, adaptive=True),
    "adaptive worst case l2, ρ = 1": partial(compute_worst_case_sharpness, rho=1.0, adaptive=True),
    "adaptive worst case l∞, ρ = 0.1": partial(compute_worst_case_sharpness, rho=0.1, norm="linf", adaptive=True),
    "adaptive average, σ = 0.2": lambda model, loss, x, y: (
        compute_average_sharpness(model, loss, x, y, 0.2, adaptive=True).value
    ),
    "landscape by filter, mean rise": lambda model, loss, x, y: float(
        compute_loss_landscape(model, loss, x, y, num_directions=1, num_points=11).rise.mean()
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=8.0, help="of the first layer (default: 8)")
    parser.add_argument("--output", default=".", metavar="FOLDER", help="of the two pictures")
    return run(parser, _draw, argv)


def _draw(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    model, batch = trained_network()
    data = (model, cross_entropy, *batch)
    compute_loss_landscape(*data, num_points=25).plot(folder / "sharpness_landscape.png")
    density = compute_spectral_density(*data, num_runs=4, num_steps=80)
    density.plot(folder / "sharpness_density.png")
    trace, error = (density.num_entries * value for value in density.mean(lambda eigenvalues: eigenvalues))
    print(f"n = {density.num_entries:,}, trace {trace:.2f} +- {error:.2f} from {density.num_products} products\n")

    twin = rescaled(model, arguments.factor)
    print(f"| measure | network | first layer × {arguments.factor:g}, second ÷ {arguments.factor:g} | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for name, measure in MEASURES.items():
        before, after = (float(measure(network, cross_entropy, *batch)) for network in (model, twin))
        print(f"| {name} | {before:.3g} | {after:.3g} | {after / before:.3g} |")


def trained_network() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network after 200 steps of SGD with momentum, and what it learned, in float64."""
    from sklearn.datasets import load_digits

    inputs, targets = load_digits(return_X_y=True)
    batch = torch.as_tensor(inputs[:400] / 16), torch.as_tensor(targets[:400])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40, bias=False), nn.ReLU(), nn.Linear(40, 10, bias=False)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model, batch


def rescaled(model: nn.Module, factor: float) -> nn.Module:
    """Other weights for the same function."""
    twin = copy.deepcopy(model)
    first, second = (layer for layer in twin.children() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.mul_(factor)
        second.weight.div_(factor)
    return twin


if __name__ == "__main__":
    sys.exit(main())
