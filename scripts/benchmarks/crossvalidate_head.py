"""Cross-validate a relevance head on a COCO folder: on unseen photos, and on unseen photos with unseen names.

For example: python scripts/benchmarks/crossvalidate_head.py PATH --scales 0.7 1.0 1.4

Five folds of photos. For unseen names the head is trained on every other category name, and judged on the names and
photos left out. Every picture is squashed to a square. AP over the tokens, mean over queries, beside zero-shot on the
same queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import run

if TYPE_CHECKING:
    from arrcoc import TokenLoader

NUM_FOLDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _crossvalidate, argv)


def _crossvalidate(arguments: argparse.Namespace) -> None:
    import torch

    import arrcoc
    from arrcoc.config import HeadConfig, TrainConfig
    from arrcoc.data import CocoFolder
    from arrcoc.training.validation import token_average_precisions

    model = arrcoc.load_scorer(head=None, scales=tuple(arguments.scales)).model
    samples = CocoFolder(arguments.path, absent_queries=2)
    data = arrcoc.encode_samples(model, samples, seed=arguments.seed, progress=sys.stderr.isatty())
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(arguments.seed))
    folds = [order[number::NUM_FOLDS].tolist() for number in range(NUM_FOLDS)]
    names = sorted({name for queries in data.queries for name in queries})
    config = TrainConfig(
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        loss=arguments.loss,
        penalty_weight=arguments.penalty_weight,
        seed=arguments.seed,
    )

    def judge(train_names: set[str], test_names: set[str]) -> list[tuple[float, float]]:
        """(zero-shot, head) AP of every query of test_names, each judged by the fold that did not see its photo."""
        pairs: list[tuple[float, float]] = []
        for fold in folds:
            rest = [number for number in range(len(samples)) if number not in set(fold)]
            head = arrcoc.RelevanceHead(
                HeadConfig(
                    embed_dim=model.backbone.embed_dim,
                    text_rank=arguments.text_rank,
                    objectness_dim=arguments.objectness_dim,
                ),
                generator=torch.Generator().manual_seed(arguments.seed),
            )
            trained = arrcoc.RelevanceModel(model.backbone, head)
            arrcoc.train_relevance_model_with_sam(
                trained, _part(data, rest, train_names), epochs=arguments.epochs, rho=arguments.rho, config=config
            )
            test = _part(data, fold, test_names)
            pairs += zip(*(token_average_precisions(m, test) for m in (model, trained)), strict=True)
        return pairs

    halves = set(names[0::2]), set(names[1::2])
    _print("unseen photos", judge(set(names), set(names)))
    _print("unseen photos and names", judge(halves[0], halves[1]) + judge(halves[1], halves[0]))


def _part(data: TokenLoader, numbers: list[int], names: set[str]) -> TokenLoader:
    """The samples of these numbers with the queries of these names; samples without any are left out."""
    import torch

    from arrcoc import TokenLoader

    chosen = {n: [k for k, name in enumerate(data.queries[n]) if name in names] for n in numbers}
    chosen = {n: kept for n, kept in chosen.items() if kept}
    return TokenLoader(
        data.tokens.select(torch.tensor(list(chosen))),
        [[data.queries[n][k] for k in kept] for n, kept in chosen.items()],
        [data.targets[n][kept] for n, kept in chosen.items()],
        batch_size=data.batch_size,
        num_queries=data.num_queries,
        seed=data.seed,
    )


def _print(title: str, pairs: list[tuple[float, float]]) -> None:
    zero_shot, head = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    print(f"{title:<24} zero-shot {zero_shot:.4f}   head {head:.4f}   ({len(pairs)} queries)", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", help="COCO folder")
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S")
    add("--epochs", type=int, default=20)
    add("--lr", type=float, default=3e-3)
    add("--optimizer", default="sam")
    add("--rho", type=float, default=0.05)
    add("--loss", default="listwise")
    add("--penalty-weight", type=float, default=0.1)
    add("--text-rank", type=int, default=0)
    add("--objectness-dim", type=int, default=0)
    add("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
