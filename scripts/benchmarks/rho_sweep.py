"""Sweep rho on scikit-learn's digits, with right labels and with a share of them drawn at random.

A perceptron with two hidden layers is trained by SAM over SGD with momentum on some of the 1,797 pictures of 8 x 8; the
labels of the 600 that validate are always right. A seed fixes the split, the random labels, the first weights and the
order of the batches, so that runs of one seed differ in rho alone. Sharpness of the training loss: the largest
eigenvalue of its Hessian, or the rise L(w + e) - L(w) with one radius for all.

For example: python scripts/benchmarks/rho_sweep.py --output docs/figures/rho_sweep.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _common import positive, run
from sam_core import SAM, compute_sam_sharpness, make_closure, power_iteration_top_eigenvalue
from sam_core.tuning import RhoSweep, group_by_perturbation, plot_sweeps, sweep_rho

NUM_VALIDATION, BATCH = 600, 50
MEASURES = {
    "eigenvalue": ("largest Hessian eigenvalue", partial(power_iteration_top_eigenvalue, tol=1e-3)),
    "rise": ("rise of the loss within 0.1", partial(compute_sam_sharpness, rho=0.1)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rhos", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5], metavar="RHO")
    add("--noise", type=float, nargs="+", default=[0.0, 0.4], help="shares of labels drawn anew (default: 0 and 0.4)")
    add("--num-seeds", type=positive, default=8)
    add("--num-train", type=positive, default=400, help="pictures to learn from (default: 400)")
    add("--num-steps", type=positive, default=480, help="of the optimizer (default: 480)")
    add("--perturb", default="all", choices=["all", "norms", "head"], help="layers that SAM moves (default: all)")
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
        settings = {
            "noise": noise,
            "num_train": arguments.num_train,
            "num_steps": arguments.num_steps,
            "perturb": arguments.perturb,
        }
        sweeps[title] = sweep_rho(
            partial(train, inputs=inputs, targets=targets, measure=measure, **settings),
            arguments.rhos,
            seeds=range(arguments.num_seeds),
            file=arguments.file and f"{arguments.file}_{noise:g}.json",
            settings={**settings, "sharpness": arguments.sharpness},
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
    num_train: int,
    num_steps: int,
    perturb: str,
    measure: Callable[..., float],
) -> dict[str, float]:
    """Accuracy on the validation part after training, and the sharpness of the training loss there."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    held_out, chosen = order[:NUM_VALIDATION], order[NUM_VALIDATION:][:num_train]
    train_inputs, train_targets = inputs[chosen], targets[chosen].clone()
    drawn = torch.rand(len(chosen), generator=generator) < noise
    train_targets[drawn] = torch.randint(10, (int(drawn.sum()),), generator=generator)

    model = make_model(generator)
    groups = group_by_perturbation(model, perturb)
    optimizer = SAM(groups, torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    for _, batch in zip(range(num_steps), batches(len(chosen), generator), strict=False):
        optimizer.step(make_closure(model, [(train_inputs[batch], train_targets[batch])], cross_entropy, optimizer))
        lr_scheduler.step()
    with torch.no_grad():
        right = model(inputs[held_out]).argmax(1) == targets[held_out]
    sharpness = measure(model, cross_entropy, train_inputs, train_targets)
    return {"validation": right.double().mean().item(), "sharpness": sharpness}


def make_model(generator: torch.Generator) -> nn.Module:
    """Perceptron 64 - 128 - 128 - 10 with layer normalisation."""
    hidden = [(nn.Linear(width, 128), nn.LayerNorm(128), nn.ReLU()) for width in (64, 128)]
    model = nn.Sequential(*chain.from_iterable(hidden), nn.Linear(128, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


def batches(num_samples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Sample numbers of one batch after the other, epoch after epoch."""
    while True:
        yield from torch.randperm(num_samples, generator=generator).split(BATCH)


if __name__ == "__main__":
    raise SystemExit(main())
