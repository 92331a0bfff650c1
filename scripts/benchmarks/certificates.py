"""Certificates of the true risk beside the risk on fresh data: perceptrons on digits, the relevance head on drawn
scenes.

Digits (scikit-learn's 1,797 pictures of 8 x 8): perceptrons of several widths learn from n of them; the certificate
bounds the 0-1 risk of weights drawn around the trained ones, which is then measured on the 397 pictures left over. Its
prior is centred at the weights before training, and certified on all n; or at weights learnt on one half of them, and
certified on the other half, on which training then goes on.

Head: seven numbers over the embedded CLIP. The risk of a scene, in [0, 1], is a mean over its queries that name
something in it: of the share of the object that is lost when the most relevant quarter of the tokens is kept, or of
whether the most relevant token misses the object.

For example: python scripts/benchmarks/certificates.py --picture docs/figures/certificates.png
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from _common import positive, run
from sam_core import SAM, make_closure
from sam_core.bounds import RiskCertificate, VacuousBoundWarning, certify_risk

if TYPE_CHECKING:
    from arrcoc import RelevanceHead

NUM_TEST, BATCH = 397, 50
Samples = tuple[Any, Tensor]
WIDTHS = [2.0 ** (k / 2) for k in range(-10, 3)]  # for the head, whose few weights need no finer grid
PRIORS = ("first weights", "half the data")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", default=["digits", "rho", "head"], choices=["digits", "rho", "head"])
    add("--widths", type=int, nargs="+", default=[0, 16, 64], help="hidden units; 0: a linear model")
    add("--num-samples", type=positive, nargs="+", default=[350, 700, 1400])
    add("--rhos", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2, 0.4], metavar="RHO")
    add("--num-seeds", type=positive, default=4, help="of the table of rho (default: 4)")
    add("--max-rise", type=float, default=0.05, help="of the risk, that the width may cost on digits (default: 0.05)")
    add("--num-draws", type=positive, default=3000)
    add("--num-scenes", type=positive, default=300, help="that the head's certificate rests on (default: 300)")
    add("--cache", help="folder that keeps the tokens of the scenes (default: none)")
    add("--picture", help="figure of the digits (default: none)")
    return run(parser, _benchmark, argv)


def _benchmark(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", VacuousBoundWarning)  # the tables show it
    if "digits" in arguments.parts:
        _digits(arguments)
    if "rho" in arguments.parts:
        _rhos(arguments)
    if "head" in arguments.parts:
        _head(arguments)


# Digits


def _digits(arguments: argparse.Namespace) -> None:
    train, test = _load_digits()
    print("| hidden | weights | prior | n | w on samples | drawn w | KL | bound | drawn w, fresh | w, fresh |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: dict[tuple[int, str], list[tuple[int, float, float]]] = {}
    for width in arguments.widths:
        for prior in PRIORS:
            for num_samples in arguments.num_samples:
                model, found = _certify(width, prior, _part(train, 0, num_samples), 0.05, arguments)
                drawn, at_weights = fresh_risk(model, _error, test, found.sigma), fresh_risk(model, _error, test, 0.0)
                rows.setdefault((width, prior), []).append((num_samples, found.risk_bound, drawn))
                print(
                    f"| {width or 'linear'} | {found.num_params:,} | {prior} | {num_samples} "
                    f"| {found.risk_at_weights:.3f} | {found.empirical_risk:.3f} | {found.kl:.0f} "
                    f"| {found.risk_bound:.3f} | {drawn:.3f} | {at_weights:.3f} |",
                    flush=True,
                )
    print()
    if arguments.picture:
        _plot(rows, Path(arguments.picture))


def _rhos(arguments: argparse.Namespace) -> None:
    """The same perceptron, trained with several rho: means over seeds, and the standard error of that of the bound."""
    train, test = _load_digits()
    print("| rho | sigma | KL | w on samples | drawn w | bound | drawn w, fresh | w, fresh |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rho in arguments.rhos:
        rows = []
        for seed in range(arguments.num_seeds):
            model, found = _certify(16, PRIORS[1], train, rho, arguments, seed)
            drawn, at_weights = fresh_risk(model, _error, test, found.sigma), fresh_risk(model, _error, test, 0.0)
            measured = found.sigma, found.kl, found.risk_at_weights, found.empirical_risk, found.risk_bound
            rows.append([*measured, drawn, at_weights])
        table = torch.tensor(rows, dtype=torch.float64)
        sigma, kl, on_samples, empirical, bound, drawn, at_weights = table.mean(0).tolist()
        error = table[:, 4].std().item() / len(rows) ** 0.5
        print(
            f"| {rho:g} | {sigma:.3f} | {kl:.1f} | {on_samples:.3f} | {empirical:.3f} "
            f"| {bound:.3f} ± {error:.3f} | {drawn:.3f} | {at_weights:.3f} |",
            flush=True,
        )
    print()


def _certify(
    width: int, prior: str, samples: Samples, rho: float, arguments: argparse.Namespace, seed: int = 0
) -> tuple[nn.Module, RiskCertificate]:
    """A model trained on the samples, and its certificate on those that the prior has not seen."""
    generator = torch.Generator().manual_seed(seed)
    model = _make_model(width, generator)
    unseen = samples
    if prior == PRIORS[1]:
        half = len(samples[1]) // 2
        _train(model, _part(samples, 0, half), rho, generator, num_steps=500)
        unseen = _part(samples, half, len(samples[1]))
    start = [param.detach().clone() for param in model.parameters()]
    if prior == PRIORS[1]:
        _train(model, samples, rho, generator, num_steps=100, lr=0.001)
    else:
        _train(model, samples, rho, generator, num_steps=600)
    options = {"max_rise": arguments.max_rise, "num_draws": arguments.num_draws}
    return model, certify_risk(model, _error, unseen, prior_mean=start, **options)


def _train(
    model: nn.Module, samples: Samples, rho: float, generator: torch.Generator, *, num_steps: int, lr: float = 0.01
) -> None:
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=rho, lr=lr, weight_decay=0.0)
    inputs, targets = samples
    for _ in range(num_steps):
        batch = torch.randint(len(targets), (BATCH,), generator=generator)
        optimizer.step(make_closure(model, [(inputs[batch], targets[batch])], cross_entropy, optimizer))


def _make_model(width: int, generator: torch.Generator) -> nn.Module:
    layers = [nn.Linear(64, width), nn.Linear(width, 10)] if width else [nn.Linear(64, 10)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]) if width else layers[0]


def _load_digits() -> tuple[Samples, Samples]:
    """Pictures to learn from, and NUM_TEST others, in an order drawn once."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    targets = torch.tensor(digits.target)[order]
    samples = inputs, targets
    return _part(samples, NUM_TEST, len(targets)), _part(samples, 0, NUM_TEST)


def _part(samples: Samples, start: int, end: int) -> Samples:
    return samples[0][start:end], samples[1][start:end]


def _error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) != targets).float()


def _plot(rows: dict[tuple[int, str], list[tuple[int, float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    widths = sorted({width for width, _ in rows})
    for axis, prior in zip(axes, PRIORS, strict=True):
        for number, width in enumerate(widths):
            num_samples, bounds, risks = zip(*rows[width, prior], strict=True)
            name = f"{width} hidden" if width else "linear"
            axis.plot(num_samples, bounds, "o-", color=f"C{number}", label=f"{name}: bound")
            axis.plot(num_samples, risks, "o:", color=f"C{number}", mfc="white", label=f"{name}: fresh data")
        axis.set(title=f"prior: {prior}", xlabel="samples", ylim=(0, 1.02), xticks=num_samples)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("0-1 risk of drawn weights")
    axes[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# The relevance head


def _head(arguments: argparse.Namespace) -> None:
    import arrcoc

    model = arrcoc.load_scorer().model
    shipped = model.head
    assert shipped is not None
    start = arrcoc.RelevanceHead(shipped.config)
    samples, fresh = (
        _scenes(model, count, seed, arguments.cache) for seed, count in enumerate((arguments.num_scenes, 200))
    )
    trained = copy.deepcopy(start)
    _train_head(trained, samples)
    print("| risk | head | prior | sigma | KL | w on samples | drawn w | bound | drawn w, fresh | w, fresh |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for title, loss_fn in (("lost of the object", _lost), ("missed by the first token", _missed)):
        for name, head, prior_name, prior in (
            ("shipped", shipped, "the same", shipped),
            ("trained", trained, "zero-shot", start),
        ):
            found = _certify_head(head, prior, loss_fn, samples)
            drawn, at_weights = fresh_risk(head, loss_fn, fresh, found.sigma), fresh_risk(head, loss_fn, fresh, 0.0)
            print(
                f"| {title} | {name} | {prior_name} | {found.sigma:.3f} | {found.kl:.1f} "
                f"| {found.risk_at_weights:.3f} | {found.empirical_risk:.3f} | {found.risk_bound:.3f} "
                f"| {drawn:.3f} | {at_weights:.3f} |",
                flush=True,
            )


def _certify_head(
    head: RelevanceHead, prior: RelevanceHead, loss_fn: Callable[[Tensor, Tensor], Tensor], samples: Samples
) -> RiskCertificate:
    """A draw of the weights for every scene: as many draws as scenes for the price of one pass."""
    inputs, targets = samples
    batches = [(tuple(value[i : i + 1] for value in inputs), targets[i : i + 1]) for i in range(len(targets))]
    return certify_risk(
        head,
        loss_fn,
        batches,
        prior_mean=list(prior.parameters()),
        max_rise=0.02,
        sigmas=WIDTHS,
        prior_sigmas=WIDTHS,
        num_draws=1000,
    )


def _scenes(model: Any, num_scenes: int, seed: int, cache: str | None) -> Samples:
    """Head inputs (tokens, queries, similarity) and targets [S, Q, N] of drawn scenes."""
    import arrcoc
    from arrcoc.data import Scenes
    from arrcoc.model.similarity import similarity_logits

    data = arrcoc.encode_samples(model, Scenes(num_scenes, seed=seed, num_queries=4), cache=cache)
    tokens = data.tokens.select(torch.arange(num_scenes))
    queries = torch.stack([model.encode_text(texts) for texts in data.queries])
    with torch.no_grad():
        similarity = similarity_logits(model.backbone, tokens, queries)
    return (tokens.patches, queries, similarity), torch.stack(data.targets)


def _train_head(head: nn.Module, samples: Samples) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = SAM(head.parameters(), torch.optim.AdamW, rho=0.01, lr=0.05, weight_decay=0.0)
    inputs, targets = samples
    for _ in range(150):
        batch = torch.randint(len(targets), (8,), generator=generator)

        def closure(batch: Tensor = batch) -> Tensor:
            logits = head(*(value[batch] for value in inputs))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[batch])
            loss.backward()
            return loss

        optimizer.step(closure)


def _lost(logits: Tensor, targets: Tensor) -> Tensor:
    kept = logits.topk(logits.shape[-1] // 4, dim=-1).indices
    share = targets.gather(-1, kept).sum(-1) / targets.sum(-1).clamp(min=1e-6)
    return _mean_of_present(1 - share.clamp(max=1), targets)


def _missed(logits: Tensor, targets: Tensor) -> Tensor:
    return _mean_of_present((targets.gather(-1, logits.argmax(-1, keepdim=True))[..., 0] == 0).float(), targets)


def _mean_of_present(risks: Tensor, targets: Tensor) -> Tensor:
    """Mean [S] of risks [S, Q] over the queries that name something in the scene; 0 if none does."""
    present = (targets.amax(-1) > 0).float()
    return (risks * present).sum(-1) / present.sum(-1).clamp(min=1)


def fresh_risk(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], samples: Samples, sigma: float, num_draws: int = 200
) -> float:
    """Mean loss on samples of weights drawn from N(w, sigma² I), in as many parts as draws; of w itself for 0."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = samples
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    total = 0.0
    with torch.no_grad():
        for part in torch.arange(len(targets)).chunk(num_draws):
            weights = {
                name: param + sigma * torch.randn(param.shape, generator=generator)
                for name, param in model.named_parameters()
            }
            outputs = functional_call(model, weights, tuple(value[part] for value in arguments))
            total += float(loss_fn(outputs, targets[part]).sum())
    return total / len(targets)


if __name__ == "__main__":
    raise SystemExit(main())
