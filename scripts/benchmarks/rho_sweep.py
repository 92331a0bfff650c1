"""Sweep rho on scikit-learn's digits, with right labels and with a share of them drawn at random.

A perceptron with two hidden layers is trained by SAM over SGD with momentum on 400 of the 1,797 pictures of 8 x 8; the
labels of the 600 that validate are always right. A seed fixes the split, the wrong labels, the first weights and the
order of the batches, so that runs of one seed differ in rho alone. Sharpness of the training loss: the largest
eigenvalue of its Hessian, or the rise L(w + e) - L(w) with one radius for all.

For example: python scripts/benchmarks/rho_sweep.py --output docs/figures/rho_sweep.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _common import positive, run
from sam_core import SAM, compute_sam_sharpness, make_closure, power_iteration_top_eigenvalue
from sam_core.tuning import RhoSweep, plot_sweeps, sweep_rho

NUM_TRAIN, NUM_VALIDATION, BATCH = 400, 600, 50
MEASURES = {
    "eigenvalue": ("largest eigenvalue of the Hessian", partial(power_iteration_top_eigenvalue, tol=1e-3)),
    "rise": ("rise of the loss within 0.1", partial(compute_sam_sharpness, rho=0.1)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rhos", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7], metavar="RHO")
    add("--noise", type=float, nargs="+", default=[0.0, 0.4], help="shares of labels drawn anew (default: 0 and 0.4)")
    add("--num-seeds", type=positive, default=5)
    add("--epochs", type=positive, default=60)
    add("--sharpness", default="eigenvalue", choices=list(MEASURES), help="default: eigenvalue")
    add("--output", default="rho_sweep.png", metavar="PICTURE")
    add("--file", metavar="PREFIX", help="keeps finished runs, in PREFIX_0.4.json for noise 0.4 (default: none)")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    targets = torch.tensor(digits.target)
    sweeps: dict[str, RhoSweep] = {}
    label, measure = MEASURES[arguments.sharpness]
    for noise in arguments.noise:
        title = f"{noise:.0%} of the labels random" if noise else "labels all right"
        sweeps[title] = sweep_rho(
            partial(train, inputs=inputs, targets=targets, noise=noise, epochs=arguments.epochs, measure=measure),
            arguments.rhos,
            seeds=range(arguments.num_seeds),
            file=arguments.file and f"{arguments.file}_{noise:g}.json",
            settings={"noise": noise, "epochs": arguments.epochs, "sharpness": arguments.sharpness},
        )
        print(f"{title}\n\n{sweeps[title].to_markdown()}\n", flush=True)
    plot_sweeps(sweeps, arguments.output, validation="validation accuracy", sharpness=label)


def train(
    rho: float,
    seed: int,
    *,
    inputs: Tensor,
    targets: Tensor,
    noise: float,
    epochs: int,
    measure: Callable[..., float],
) -> dict[str, float]:
    """Accuracy on the validation part after training, and the sharpness of the training loss there."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    chosen, held_out = order[:NUM_TRAIN], order[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION]
    train_inputs, train_targets = inputs[chosen], targets[chosen].clone()
    wrong = torch.rand(NUM_TRAIN, generator=generator) < noise
    train_targets[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    for param in model.parameters():
        bound = param.shape[-1] ** -0.5 if param.dim() == 2 else 0.0
        nn.init.uniform_(param, -bound, bound, generator=generator)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        for batch in torch.randperm(NUM_TRAIN, generator=generator).split(BATCH):
            optimizer.step(make_closure(model, [(train_inputs[batch], train_targets[batch])], cross_entropy, optimizer))
        lr_scheduler.step()
    with torch.no_grad():
        right = model(inputs[held_out]).argmax(1) == targets[held_out]
    sharpness = measure(model, cross_entropy, train_inputs, train_targets)
    return {"validation": right.double().mean().item(), "sharpness": sharpness}


if __name__ == "__main__":
    raise SystemExit(main())
