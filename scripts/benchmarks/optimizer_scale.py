"""Print what each method takes at size: a transformer of a billion parameters on paper, on 1 to 1,024 ranks.

Memory and communication are those of sam_core.planning. The estimates are then held against small models: what they
really allocate on one device and on simulated ranks, and what they really call on 1 to 1,024 of these.

For example: python scripts/benchmarks/optimizer_scale.py --figure docs/figures/scale.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from simulated_ranks import simulated_ranks
from small_models import (
    FULL_PRECISION,
    K,
    LanguageModel,
    count_collectives,
    make_distributed,
    matrices,
    measure_memory,
    measure_single,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from _common import run
from sam_core.planning import (
    METHOD_NAMES,
    CommunicationEstimate,
    MemoryEstimate,
    estimate_communication,
    estimate_memory,
)

LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 24, 1792, 14, 50304, 1024
BASES = {"sgd_momentum": "SGD with momentum", "adamw": "AdamW", "adafactor": "Adafactor"}
MIXED = {"compute_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
RANKS = (8, 64, 1024)
BLOCK = sum(p.numel() for p in nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, device="meta").parameters())
ROOT = (VOCABULARY + CONTEXT + 2) * WIDTH  # embeddings, the first shared with the head, and the last normalisation
NUM_PARAMS = LAYERS * BLOCK + ROOT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", metavar="FILE", help="also draw memory and time, to this picture")
    parser.add_argument("--no-check", action="store_true", help="the tables alone, without the small models")
    return run(parser, _print, argv)


def _print(arguments: argparse.Namespace) -> None:
    print(
        f"{LAYERS} blocks of width {WIDTH:,}, {HEADS} heads, vocabulary {VOCABULARY:,}, context {CONTEXT:,}: ", end=""
    )
    print(f"{NUM_PARAMS:,} parameters,\n{BLOCK:,} in a block, {ROOT:,} in the root\n")
    for title, lines in tables().items():
        print(f"{title}\n\n" + "\n".join(lines) + "\n", flush=True)
    if not arguments.no_check:
        for line in check_memory():
            print(line, flush=True)
        for line in check_communication():
            print(line, flush=True)
    if arguments.figure:
        draw(Path(arguments.figure))


def tables() -> dict[str, list[str]]:
    """Each table by its title, as lines of markdown."""
    return {
        "Bytes a parameter, float32, one device: between steps / while a closure runs / in the step": one_device(),
        "Bytes a parameter on each rank, float32, at most": by_sharding(),
        "GiB on each rank with AdamW, at most": by_ranks(),
        "GB that each of 64 ranks sends in a step": communication(),
        "GB that a rank sends in a step, by the number of ranks": weak_scaling(),
        "Time of a step under DDP relative to plain training": time_ratios(),
    }


def one_device() -> list[str]:
    """Between steps, in a closure and in the step, for each base optimizer."""

    def cell(method: str, base: str) -> str:
        estimate = memory(method, base)
        parts = (estimate.resident, estimate.in_closure, estimate.in_step)
        return " / ".join(f"{part / NUM_PARAMS:.4g}" for part in parts)

    return markdown(["", *BASES.values()], ([name(m), *(cell(m, b) for b in BASES)] for m in METHOD_NAMES))


def by_sharding() -> list[str]:
    """Peaks on one device, under DDP and sharded, for two base optimizers."""
    cases: list[dict[str, Any]] = [{}, {"sharding": "ddp", "num_ranks": 8}, *({**fsdp(n)} for n in RANKS)]
    heads = ["one device", "DDP", *(f"FSDP2, {n:,}" for n in RANKS)]
    bases = ("sgd_momentum", "adamw")
    return markdown(
        ["", *(f"{BASES[base]}: {head}" if i == 0 else head for base in bases for i, head in enumerate(heads))],
        (
            [name(m), *(f"{memory(m, base, **case).peak_per_parameter:.3g}" for base in bases for case in cases)]
            for m in METHOD_NAMES
        ),
    )


def by_ranks() -> list[str]:
    """Peaks with AdamW, in float32 and in mixed precision."""
    cases: list[dict[str, Any]] = [{}, {"sharding": "ddp", "num_ranks": 8}]
    cases += [{**fsdp(n), **dtypes} for n in RANKS for dtypes in ({}, MIXED)]
    heads = ["one device", "DDP", *(f"FSDP2, {n:,}{mixed}" for n in RANKS for mixed in ("", " mixed"))]
    rows = ([name(m), *(f"{memory(m, 'adamw', **case).peak / 2**30:.2f}" for case in cases)] for m in METHOD_NAMES)
    return markdown(["", *heads], rows)


def communication() -> list[str]:
    """Bytes, collectives and single numbers on 64 ranks."""

    def row(method: str) -> list[str]:
        ddp, whole, mixed = (traffic(method, 64, s, **d) for s, d in (("ddp", {}), ("fsdp", {}), ("fsdp", MIXED)))
        return [
            name(method),
            f"{ddp.bytes_sent / 1e9:.2f}",
            f"{ddp.num_collectives:,.0f}",
            f"{whole.bytes_sent / 1e9:.2f}",
            f"{mixed.bytes_sent / 1e9:.2f}",
            f"{whole.num_collectives:,.0f}",
            f"{whole.num_scalars:.3g}",
        ]

    heads = ["DDP", "collectives", "FSDP2", "FSDP2 mixed", "collectives", "single numbers"]
    return markdown(["", *heads], map(row, METHOD_NAMES))


def weak_scaling() -> list[str]:
    """Bytes that a rank sends as ranks are added, each with a batch of its own."""
    cases = [(m, s) for s in ("ddp", "fsdp") for m in ("base", "sam", "gsam")]
    heads = [f"{'DDP' if sharding == 'ddp' else 'FSDP2'}: {name(method)}" for method, sharding in cases]

    def row(num_ranks: int) -> list[str]:
        return [f"{num_ranks:,}", *(f"{traffic(m, num_ranks, s).bytes_sent / 1e9:.2f}" for m, s in cases)]

    return markdown(["ranks", *heads], (row(2**i) for i in range(11)))


def time_ratios() -> list[str]:
    """By the time that a pass's communication takes relative to its computing: hidden behind it, or after it."""
    rates = (0, 0.5, 1, 2, 4)
    heads = [f"{kind}: {rate:g}" if i == 0 else f"{rate:g}" for kind in KINDS for i, rate in enumerate(rates)]
    rows = ([name(m), *(f"{ratio(m, r, kind):.2f}" for kind in KINDS for r in rates)] for m in METHOD_NAMES)
    return markdown(["", *heads], rows)


KINDS = ("hidden", "not hidden")


def ratio(method: str, rate: float, kind: str) -> float:
    """Time of a step under DDP over that of plain training, whose communication takes ``rate`` times its computing."""
    bandwidth = traffic("base", 1024, "ddp").bytes_sent / rate if rate else 1e30
    times = [
        traffic(m, 1024, "ddp").step_seconds(pass_seconds=1.0, bytes_per_second=bandwidth)[KINDS.index(kind)]
        for m in (method, "base")
    ]
    return times[0] / times[1]


def memory(method: str, base: str, **options: Any) -> MemoryEstimate:
    """The transformer's."""
    return estimate_memory(NUM_PARAMS, method, base, **options)


def fsdp(num_ranks: int) -> dict[str, Any]:
    """Each block a unit."""
    return {"sharding": "fsdp", "num_ranks": num_ranks, "unit_params": BLOCK, "root_params": ROOT}


def traffic(method: str, num_ranks: int, sharding: str, **options: Any) -> CommunicationEstimate:
    """The transformer's communication."""
    ranks = {"sharding": sharding, "num_ranks": num_ranks, "num_units": LAYERS, "root_params": ROOT}
    return estimate_communication(NUM_PARAMS, method, **{**ranks, **options})


def name(method: str) -> str:
    """A method as the tables call it."""
    return "base optimizer" if method == "base" else f"`{method}`"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table, a line a row; methods whose numbers are the same share one."""
    names: dict[tuple[str, ...], list[str]] = {}
    for first, *numbers in rows:
        names.setdefault(tuple(numbers), []).append(first)
    lines = [heads, ["---"] * len(heads), *([", ".join(firsts), *numbers] for numbers, firsts in names.items())]
    return ["| " + " | ".join(line) + " |" for line in lines]


# Small models, really run ---------------------------------------------------------------------------------------------


def check_memory() -> Iterable[str]:
    """Measured over estimated bytes: at most and at least over all methods."""
    size = sum(p.numel() for p in matrices().parameters())
    for base in ("sgd_momentum", "adamw"):
        shares = [
            measured / estimated
            for method in METHOD_NAMES
            for measured, estimated in zip(
                _sums(measure_single(method, base), method),
                _sums(estimate_memory(size, method, base, k=K), method),
                strict=True,
            )
        ]
        yield f"measured / estimated bytes, one device, {base}, {len(METHOD_NAMES)} methods: {_range(shares)}"
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("ddp", 8, {}),
        ("fsdp", 8, {}),
        ("fsdp", 64, {}),
        ("fsdp", 64, MIXED),
    ]
    for sharding, num_ranks, dtypes in cases:
        shares = []
        for method in ("base", "sam", "asam", "gsam", "friendlysam", "msam"):
            model = LanguageModel(depth=24, width=128, hidden=256, vocabulary=128)
            size = sum(p.numel() for p in model.parameters())
            estimate = estimate_memory(
                size,
                method,
                sharding=sharding,
                num_ranks=num_ranks,
                unit_params=model.unit_params,
                root_params=model.root_params,
                foreach=False,
                **dtypes,
            )
            with simulated_ranks(num_ranks):
                measured = measure_memory(partial(_small, method, sharding, bool(dtypes)), num_steps=2)
            shares += [m / e for m, e in zip(_sums(measured, method), _sums(estimate, method), strict=True)]
        case = f"{sharding}{' mixed' if dtypes else ''} on {num_ranks} simulated ranks, 6 methods"
        yield f"measured / estimated bytes, {case}: {_range(shares)}"


def check_communication() -> Iterable[str]:
    """Counted over estimated bytes on 1 to 1,024 simulated ranks."""
    shape = {"depth": 3, "width": 8, "hidden": 1024, "vocabulary": 1024}
    for sharding in ("ddp", "fsdp"):
        for method in ("base", "sam", "gsam", "looksam"):
            shares, counts = [], set()
            for num_ranks in (2**i for i in range(11)):
                model = LanguageModel(**shape)
                size, root = sum(p.numel() for p in model.parameters()), model.root_params
                with simulated_ranks(num_ranks):
                    calls = count_collectives(make_distributed(method, "adamw", sharding, model)[0])
                options: dict[str, Any] = {"sharding": sharding, "num_ranks": num_ranks, "root_params": root, "k": K}
                estimated = estimate_communication(size, method, num_units=3, **options).bytes_sent
                counted = sum(call.bytes_sent(num_ranks) for call in calls if call.num_bytes > 8) / K
                if num_ranks > 1:
                    shares.append(counted / estimated)
                    counts.add(len(calls) / K)
                elif counted != 0:
                    raise FloatingPointError(f"one rank must send nothing, got {counted} bytes.")
            numbers = " or ".join(f"{count:g}" for count in sorted(counts))
            case = f"{sharding}, {method}, 2 to 1,024 ranks"
            yield f"counted / estimated bytes, {case}: {_range(shares)}; {numbers} calls a step"


def _small(method: str, sharding: str, mixed: bool) -> Any:
    torch.manual_seed(0)
    model = LanguageModel(depth=24, width=128, hidden=256, vocabulary=128)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else FULL_PRECISION
    return make_distributed(method, "adamw", sharding, model, foreach=False, policy=policy)


def _sums(memory: Any, method: str) -> tuple[int, ...]:
    """What is compared; EfficientSAM's backward runs outside its closure."""
    if method == "efficientsam":
        return memory.resident, memory.peak
    return memory.resident, memory.in_closure, memory.in_step


def _range(shares: Sequence[float]) -> str:
    return f"{min(shares):.3f} to {max(shares):.3f}"


# The figure -----------------------------------------------------------------------------------------------------------

PARTS = ("parameters", "gradients", "base_state", "method_state")
COLOURS = ("#30638e", "#6c9bc4", "#a9c5de", "#f0a202", "#d95d39")


def draw(path: Path) -> None:
    """Bytes a parameter by what they are for, and the time of a step as communication grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    methods = list(METHOD_NAMES)[::-1]
    ends = [0.0] * len(methods)
    estimates = [memory(method, "adamw") for method in methods]
    for part, colour in zip(PARTS, COLOURS, strict=False):
        widths = [getattr(estimate, part) / NUM_PARAMS for estimate in estimates]
        left.barh(methods, widths, left=ends, color=colour, label=part.replace("_", " ").replace("base", "AdamW's"))
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    rest = [estimate.peak_per_parameter - end for estimate, end in zip(estimates, ends, strict=True)]
    left.barh(methods, rest, left=ends, color=COLOURS[-1], label="for a moment")
    left.set(xlabel="bytes a parameter at most: float32, AdamW, one device")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, columnspacing=1, handlelength=1)

    rates = torch.logspace(-1, 1, 60).tolist()
    for method, colour in (("gsam", COLOURS[4]), ("sam", COLOURS[0]), ("looksam", COLOURS[3]), ("msam", "#555555")):
        for kind, line in zip(KINDS, ("-", ":"), strict=True):
            label = f"{method}, {kind}" if method == "sam" else method if kind == "hidden" else None
            right.plot(rates, [ratio(method, rate, kind) for rate in rates], line, color=colour, label=label)
    right.set(xscale="log", ylim=(0.9, 2.1), ylabel="time of a step, plain training = 1")
    right.set(xlabel="communication of a plain step under DDP, its computing = 1", xticks=(0.1, 1, 10))
    right.xaxis.set_major_formatter("{x:g}")
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, columnspacing=1)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
