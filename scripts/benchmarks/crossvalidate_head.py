"""Cross-validate a relevance head on a COCO folder: on unseen photos, and on unseen photos with unseen names.

For example: python scripts/benchmarks/crossvalidate_head.py PATH --loss mse --scales 0.7 1.0 1.4

Five folds of photos. For unseen names the head is trained on every other category name, and judged on the names and
photos left out. Every picture is squashed to a square. AP over the tokens, mean over queries, beside zero-shot on the
same queries. The settings are those of training, so any loss, method or schedule can be compared.
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
    from arrcoc.config import HeadShape, TrainConfig

NUM_FOLDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _crossvalidate, argv)


def _crossvalidate(arguments: argparse.Namespace) -> None:
    import torch

    import arrcoc
    from arrcoc.config import HeadConfig
    from arrcoc.data import CocoFolder
    from arrcoc.flags import with_flags
    from arrcoc.training.validation import token_average_precisions

    config, shape = with_flags(_train_config(), arguments), with_flags(_head_shape(), arguments)
    model = arrcoc.load_scorer(head=None, scales=tuple(arguments.scales)).model
    samples = CocoFolder(arguments.path, absent_queries=2)
    data = arrcoc.encode_samples(model, samples, seed=config.seed, progress=sys.stderr.isatty())
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(config.seed))
    folds = [order[number::NUM_FOLDS].tolist() for number in range(NUM_FOLDS)]
    names = sorted({name for queries in data.queries for name in queries})

    def judge(train_names: set[str], test_names: set[str]) -> list[tuple[float, float]]:
        """(zero-shot, head) AP of every query of test_names, each judged by the fold that did not see its photo."""
        pairs: list[tuple[float, float]] = []
        for fold in folds:
            rest = [number for number in range(len(samples)) if number not in set(fold)]
            head = arrcoc.RelevanceHead(
                HeadConfig(embed_dim=model.backbone.embed_dim, **vars(shape)),
                generator=torch.Generator().manual_seed(config.seed),
            )
            trained = arrcoc.RelevanceModel(model.backbone, head)
            part = _part(data, rest, train_names)
            arrcoc.train_relevance_model_with_sam(trained, part, config.epochs, config.rho, config=config)
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
    if not chosen:
        raise ValueError(f"path must hold enough photos and names for {NUM_FOLDS} folds, got a part without any query.")
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


def _train_config() -> TrainConfig:
    from arrcoc.config import TrainConfig

    return TrainConfig(epochs=20)


def _head_shape() -> HeadShape:
    from arrcoc.config import HeadShape

    return HeadShape()


def _parser() -> argparse.ArgumentParser:
    from arrcoc.flags import add_flags

    parser = argparse.ArgumentParser(
        usage="crossvalidate_head.py PATH [--scales S ...] [--SETTING VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="COCO folder")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="sizes of the pictures")
    add_flags(parser, _head_shape())
    add_flags(parser, _train_config())
    return parser


if __name__ == "__main__":
    sys.exit(main())
