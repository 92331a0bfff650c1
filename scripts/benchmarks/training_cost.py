"""What training costs beside its floor, as ratios measured in turn in one run.

The floor of a cached epoch is the head alone: all passes over it, the noise of the penalty, losses and steps, and the
two passes that measure sharpness once an epoch, on inputs that lie ready in memory. What an epoch costs beyond is
reading the tokens (after the first time from the system's page cache), choosing queries, similarity and the trainer's
own work. The floor of SAM with online tokens is AdamW, which makes one pass over the head where SAM makes two; the
backbone runs once for both. An epoch is all that the trainer does in it.

For example: python scripts/benchmarks/training_cost.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import positive, run

if TYPE_CHECKING:
    from arrcoc import RelevanceModel, TokenLoader, TrainConfig

BAR = 1.15
Measure = Callable[[], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 for what the user must change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="embedded", help="backbone (default: embedded)")
    add("--num", type=positive, default=400, help="scenes whose tokens are cached (default: 400)")
    add("--num-online", type=positive, default=16, help="scenes that pass the backbone each epoch (default: 16)")
    add("--batch-size", type=positive, default=16, help="pictures a batch, 6 queries each (default: 16)")
    add("--repeats", type=positive, default=5, help="epochs of each kind (default: 5)")
    add("--cache", help="folder that keeps the tokens for the next time (default: a temporary one)")
    return run(parser, _measure, argv)


def _measure(arguments: argparse.Namespace) -> None:
    import arrcoc
    from arrcoc.config import TrainConfig
    from arrcoc.data import Scenes
    from arrcoc.training.images import ImageLoader

    model = arrcoc.load_scorer(arguments.model, head=None).model
    # The penalty runs the head once more, on noisy tokens. Without it the head is cheapest and all else weighs most.
    penalty = TrainConfig().penalty_weight
    adamw, sam = TrainConfig(optimizer="none", penalty_weight=0.0), TrainConfig(penalty_weight=0.0)
    with tempfile.TemporaryDirectory() as temporary:
        loader = _cached(arguments, model, arguments.cache or temporary)
        ready = _ready(model, loader)
        print(f"\na batch of an epoch          cached   head alone   ratio   (bar {BAR})")
        for name, config in {
            "AdamW": adamw,
            "AdamW, penalty": replace(adamw, penalty_weight=penalty),
            "SAM": sam,
            "SAM, penalty": replace(sam, penalty_weight=penalty),
        }.items():
            alone = _HeadAlone(model, ready, config)
            measure = _epoch(model, loader, config, alone)
            pairs = [(measure(), alone.seconds) for _ in range(arguments.repeats + 1)]
            print(f"{name:<23} {_summary(pairs, len(loader))}", flush=True)

        print("\na batch of an epoch             SAM        AdamW   ratio")
        pairs = _in_turn(_epoch(model, loader, sam), _epoch(model, loader, adamw), arguments.repeats)
        print(f"cached tokens           {_summary(pairs, len(loader))}", flush=True)
    images = list(ImageLoader.for_model(model, Scenes(arguments.num_online), batch_size=arguments.batch_size))
    for title, blocks, weight in (
        ("online tokens", 0, 0.0),
        ("online tokens, penalty", 0, penalty),
        ("last block trained", 1, 0.0),
    ):
        one, other = (replace(config, train_blocks=blocks, penalty_weight=weight) for config in (sam, adamw))
        pairs = _in_turn(_epoch(model, images, one), _epoch(model, images, other), min(3, arguments.repeats))
        bar = "" if blocks else f"   (bar {BAR})"
        print(f"{title:<23} {_summary(pairs, len(images))}{bar}", flush=True)


def _cached(arguments: argparse.Namespace, model: RelevanceModel, folder: str) -> TokenLoader:
    """A loader over the cache, filled now and found by a second call as by a later run; both are timed."""
    import arrcoc
    from arrcoc.data import Scenes
    from arrcoc.training.token_cache import TokenCache

    marks = [time.perf_counter()]
    for _ in range(2):
        cache = TokenCache(folder, model)
        missing = arguments.num - len(cache)
        loader = arrcoc.encode_samples(model, Scenes(arguments.num), batch_size=arguments.batch_size, cache=cache)
        marks.append(time.perf_counter())
        seconds = marks[-1] - marks[-2]
        print(f"a picture, {max(0, missing):>4} of {arguments.num} to encode    {_ms(seconds, arguments.num)}")
    print(f"on disk                               {cache.num_bytes / len(cache) / 1e6:8.2f} MB a picture")
    # Texts are encoded when they are first asked for, once a run.
    model.encode_text(sorted({text for texts in loader.queries for text in texts}))
    return loader


class _EndOfEpochError(Exception):
    """Ends a training run after the epoch that is timed, before the head is calibrated."""


class _Clocked:
    """Batches that note when their epoch begins, and how long something else took between them."""

    def __init__(self, batches: Any, aside: _HeadAlone | None) -> None:
        self.batches, self.aside = batches, aside
        self.started, self.paused = 0.0, 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.started = time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self.batches)
        for number in range(len(self)):
            if self.aside is not None:
                self.paused += self.aside.step(number)
            yield next(iterator)


def _epoch(model: RelevanceModel, batches: Any, config: TrainConfig, aside: _HeadAlone | None = None) -> Measure:
    """Seconds of the first epoch of a training run, without what is done aside in its pauses."""
    from arrcoc import train_relevance_model_with_sam

    def measure() -> float:
        clocked, backbone, seconds = _Clocked(batches, aside), model.backbone, 0.0

        def stop(*_: Any) -> None:
            nonlocal seconds
            seconds = time.perf_counter() - clocked.started - clocked.paused
            raise _EndOfEpochError

        model.head = _head(model)
        try:
            train_relevance_model_with_sam(model, clocked, config=config, callbacks=[stop])
        except _EndOfEpochError:
            return seconds
        finally:
            model.head, model.backbone = None, backbone
        raise AssertionError("the callback was not called")

    return measure


class _HeadAlone:
    """The head's own work in an epoch: the steps, and the two passes that measure sharpness once.

    It is done batch by batch in the pauses of the epoch that it is compared with, so what disturbs one disturbs both.
    The noise of the penalty is a part of the loss.

    Attributes:
        seconds: what the last epoch took.
    """

    def __init__(self, model: RelevanceModel, ready: Sequence[Any], config: TrainConfig) -> None:
        self.model, self.ready, self.config = model, ready, config
        self.seconds = 0.0

    def step(self, number: int) -> float:
        """Seconds of the work on batch ``number``; 0 begins an epoch."""
        if number == 0:
            self._begin()
        started = time.perf_counter()
        self._step(*self.ready[number])
        if number == 0:
            self._measure_sharpness(*self.ready[number])
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return seconds

    def _begin(self) -> None:
        import torch

        from arrcoc.training.losses import relevance_loss

        self.head, self.loss = _head(self.model), relevance_loss(self.config.loss)
        self.optimizer = self.config.make_optimizer([{"params": list(self.head.parameters())}])
        self.noise, self.seconds = torch.Generator().manual_seed(0), 0.0

    def _step(self, inputs: tuple[Any, Any, Any], targets: Any) -> None:
        import torch

        from arrcoc.model.robustness import perturb_tokens, relevance_change

        patches, queries, similarity = inputs
        weight = self.config.penalty_weight
        noisy = perturb_tokens(patches, self.config.input_radius, self.noise) if weight else None

        def closure() -> Any:
            logits = self.head(patches, queries, similarity)
            loss = self.loss(logits, targets)
            if noisy is not None:
                changed = self.head(noisy, queries, similarity)
                loss = loss + weight * relevance_change(torch.sigmoid(logits), torch.sigmoid(changed))
            torch.autograd.backward(loss)
            return loss

        self.optimizer.step(closure)

    def _measure_sharpness(self, inputs: tuple[Any, Any, Any], targets: Any) -> None:
        import torch

        torch.autograd.backward(self.loss(self.head(*inputs), targets))
        with torch.no_grad():
            self.loss(self.head(*inputs), targets)


def _ready(model: RelevanceModel, batches: Iterable[Any]) -> list[Any]:
    """Of every batch what the head sees, (tokens, queries, similarity), and the targets."""
    from arrcoc.model.similarity import similarity_logits

    ready = []
    for tokens, texts, targets in batches:
        queries = model.encode_text([text for row in texts for text in row]).unflatten(0, (len(texts), -1))
        ready.append(((tokens.patches, queries, similarity_logits(model.backbone, tokens, queries)), targets))
    return ready


def _head(model: RelevanceModel) -> Any:
    """A new head of the shape that ``train_relevance.py`` makes."""
    from arrcoc import HeadConfig, RelevanceHead

    return RelevanceHead(HeadConfig(embed_dim=model.backbone.embed_dim, text_rank=32))


def _in_turn(first: Measure, second: Measure, repeats: int) -> list[tuple[float, float]]:
    """Two measurements in turn, so that what disturbs one disturbs the other."""
    return [(first(), second()) for _ in range(repeats + 1)]


def _summary(pairs: Sequence[tuple[float, float]], num_batches: int) -> str:
    """Medians of both, a batch, and of the ratio of neighbours; the first pair warms up and does not count."""
    first, second = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratio = statistics.median(one / other for one, other in pairs[1:])
    return f"{_ms(first, num_batches)}  {_ms(second, num_batches)}   {ratio:5.2f}"


def _ms(seconds: float, parts: int) -> str:
    return f"{1000 * seconds / parts:8.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
