"""Train a relevance head over a frozen backbone with sharpness-aware minimization.

For example: python scripts/train_relevance.py --data scenes --output runs/scenes
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _common import DEVICE_HELP, check_device, coco_path, head_argument, positive, run

if TYPE_CHECKING:
    from arrcoc import RelevanceModel
    from arrcoc.data import RelevanceDataset

VALIDATION_SHARE = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    return run(_parser(), _train, argv)


def _train(arguments: argparse.Namespace) -> None:
    import torch

    import arrcoc
    from arrcoc.config import HeadConfig, TrainConfig
    from arrcoc.data import sample_photos
    from arrcoc.training.checkpoint import load_checkpoint
    from arrcoc.training.tokens import encode_samples
    from arrcoc.training.validation import token_average_precision

    # What can be refused is refused before pictures are encoded, which takes a while.
    check_device(arguments.device)
    config = TrainConfig(
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
        optimizer=arguments.optimizer,
        base_optimizer=arguments.base_optimizer,
        rho=arguments.rho,
        loss=arguments.loss,
        penalty_weight=arguments.penalty_weight,
        input_radius=arguments.input_radius,
        seed=arguments.seed,
    )
    if arguments.resume:
        load_checkpoint(Path(arguments.output) / "checkpoint.pt")
    started = time.perf_counter()
    train, validation = _samples(arguments)
    scorer = arrcoc.load_scorer(arguments.model, head=head_argument(arguments.init), device=arguments.device)
    model = scorer.model
    if model.head is None:
        shape = HeadConfig(
            embed_dim=model.backbone.embed_dim, text_rank=arguments.text_rank, objectness_dim=arguments.objectness_dim
        )
        generator = torch.Generator().manual_seed(arguments.seed)
        model.head = arrcoc.RelevanceHead(shape, generator=generator).to(arguments.device or "cpu")
    progress = sys.stderr.isatty() or arguments.progress
    options = {"seed": arguments.seed, "progress": progress, "batch_size": arguments.batch_size}
    encoded = {
        "held-out": encode_samples(model, validation, **options),
        "photos": encode_samples(model, sample_photos(absent_queries=2), **options),
    }
    loader = encode_samples(model, train, **options)

    def evaluate(model: RelevanceModel) -> dict[str, float]:
        return {f"ap_{name}": token_average_precision(model, data) for name, data in encoded.items()}

    zero_shot = evaluate(model.zero_shot())
    history = arrcoc.train_relevance_model_with_sam(
        model,
        loader,
        epochs=arguments.epochs,
        rho=arguments.rho,
        config=config,
        evaluate=evaluate,
        output=arguments.output,
        resume=arguments.resume,
        progress=progress,
        callbacks=[lambda _, record: print(_line(record), flush=True)],
    )
    print(f"\nAP over tokens       {'zero-shot':>9} {'trained':>9}")
    for name in encoded:
        print(f"{name:<20} {zero_shot[f'ap_{name}']:>9.3f} {history[-1][f'ap_{name}']:>9.3f}")
    print(f"\nmodel, checkpoint and log are in {arguments.output} ({time.perf_counter() - started:.0f} s)")


def _line(record: dict[str, float]) -> str:
    scores = "  ".join(f"{name.removeprefix('ap_')} AP {value:.3f}" for name, value in record.items() if "ap_" in name)
    return (
        f"epoch {record['epoch']:>3}  loss {record['loss']:.4f}  penalty {record['penalty']:.4f}  "
        f"sharpness {record['sharpness']:.5f}  {scores}"
    )


def _samples(arguments: argparse.Namespace) -> tuple[RelevanceDataset, RelevanceDataset]:
    """Training and validation pictures; those of scenes hold combinations of shape and colour never trained on."""
    from arrcoc.data import CocoFolder, Scenes

    if arguments.data == "scenes":
        num_validation = max(1, round(VALIDATION_SHARE * arguments.num))
        train = Scenes(arguments.num, split="train", seed=arguments.seed)
        return train, Scenes(num_validation, split="val", seed=arguments.seed)
    if path := coco_path(arguments.data):
        queries = {"queries": arguments.queries, "val_share": VALIDATION_SHARE, "absent_queries": 2}
        return CocoFolder(path, split="train", **queries), CocoFolder(path, split="val", **queries)
    raise ValueError(f"--data must be scenes or coco:PATH, got {arguments.data!r}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="scenes", help="scenes (drawn, endless) or coco:PATH (default: scenes)")
    add("--queries", default="categories", help="of a COCO folder: categories or captions (default: categories)")
    add("--num", type=positive, default=400, help="scenes to train on (default: 400)")
    add("--model", default="embedded", help="backbone (default: embedded)")
    add("--init", default="none", help="head to start from: none (a new one), default or a folder (default: none)")
    add("--output", default="runs/relevance", metavar="DIR", help="where everything goes (default: runs/relevance)")
    add("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    add("--epochs", type=positive, default=20, help="passes over the training set (default: 20)")
    add("--batch-size", type=positive, default=16, help="pictures a batch, 6 queries each (default: 16)")
    add("--optimizer", default="sam", help="sam, asam or none (the base optimizer alone) (default: sam)")
    add("--base-optimizer", default="AdamW", help="class of torch.optim (default: AdamW)")
    add("--rho", type=float, default=0.05, help="radius of SAM (default: 0.05)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default: 0.003)")
    add("--weight-decay", type=float, default=0.01, help="decoupled weight decay (default: 0.01)")
    add("--loss", default="listwise", help="listwise, bce or mse (default: listwise)")
    add("--penalty-weight", type=float, default=0.1, help="weight of the robustness penalty (default: 0.1)")
    add("--input-radius", type=float, default=0.1, help="token noise of the penalty, relative (default: 0.1)")
    add("--text-rank", type=int, default=32, help="rank of the learned token-text product, 0 for none (default: 32)")
    add("--objectness-dim", type=int, default=0, help="width of the text-free objectness term (default: 0)")
    add("--device", help=DEVICE_HELP)
    add("--seed", type=int, default=0, help="of scenes, weights, order and noise (default: 0)")
    add("--progress", action="store_true", help="progress bars even where the output is no terminal")
    return parser


if __name__ == "__main__":
    sys.exit(main())
