"""Encoding samples, with and without a cache, and the batches of a TokenLoader over ranks."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from arrcoc import FlatnessAwareMultiScale, RelevanceModel, TokenLoader, VisualTokens, encode_samples
from arrcoc.data.queries import QueryVariants
from arrcoc.data.sample import RelevanceSample
from arrcoc.training.token_cache import TokenCache, TokenCacheWarning
from arrcoc.training.validation import token_average_precision, token_average_precisions
from models import TinyBackbone, tiny_model

COLOURS = ("red", "green", "blue")
Batches = list[tuple[VisualTokens, list[list[str]], torch.Tensor]]


def samples(num: int = 7, size: tuple[int, int] = (32, 40)) -> list[RelevanceSample]:
    """Noise with a square of each colour somewhere; blue is absent from every third picture."""
    made = []
    for number in range(num):
        generator = torch.Generator().manual_seed(number)
        image = 0.7 * torch.rand(3, *size, generator=generator)
        masks = torch.zeros(3, *size, dtype=torch.bool)
        for channel in range(2 if number % 3 == 0 else 3):
            top, left = torch.randint(0, 16, (2,), generator=generator).tolist()
            image[channel, top : top + 16, left : left + 16] += 0.02
            masks[channel, top : top + 16, left : left + 16] = True
        made.append(RelevanceSample(image=image, queries=COLOURS, masks=masks, name=str(number)))
    return made


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second) > 0
    for (tokens, texts, targets), (other_tokens, other_texts, other_targets) in zip(first, second, strict=True):
        assert torch.equal(tokens.patches, other_tokens.patches)
        assert torch.equal(tokens.pooled, other_tokens.pooled)
        assert tokens.grid == other_tokens.grid and len(tokens.levels) == len(other_tokens.levels)
        assert texts == other_texts
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.0)])
def test_a_cache_gives_the_batches_of_memory_and_encodes_each_picture_once(
    tmp_path: Path, scales: tuple[float, ...]
) -> None:
    model = RelevanceModel(TinyBackbone(), multiscale=FlatnessAwareMultiScale(scales))
    in_memory = list(encode_samples(model, samples(), batch_size=3, num_queries=2))
    passes = model.backbone.num_image_passes
    assert passes == 7 * len(scales)
    twice = [*samples(), samples()[2]]  # the same picture again
    cached = encode_samples(model, twice, batch_size=3, num_queries=2, cache=tmp_path)
    assert model.backbone.num_image_passes == 2 * passes
    assert len(cached.queries) == 8
    again = encode_samples(model, samples(), batch_size=3, num_queries=2, cache=tmp_path)
    assert model.backbone.num_image_passes == 2 * passes
    assert_same(list(again), in_memory)
    encode_samples(model, samples(9), cache=TokenCache(tmp_path, model))  # two new ones
    assert model.backbone.num_image_passes == 2 * passes + 2 * len(scales)


def test_a_changed_picture_under_an_old_name_is_encoded_anew(tmp_path: Path) -> None:
    model = tiny_model()
    encode_samples(model, samples(), cache=tmp_path)
    changed = samples()
    changed[3].image[0, 5, 5] += 0.01
    passes = model.backbone.num_image_passes
    loader = encode_samples(model, changed, cache=tmp_path)
    assert model.backbone.num_image_passes == passes + 1
    expected = encode_samples(model, changed)
    assert torch.equal(loader.sample(3)[0].patches, expected.sample(3)[0].patches)


def test_targets_and_queries_are_those_of_now_and_not_of_the_cache(tmp_path: Path) -> None:
    model = tiny_model()
    encode_samples(model, samples(), cache=tmp_path)
    other = [
        RelevanceSample(image=sample.image, queries=("green",), masks=sample.masks[1:2], name="")
        for sample in samples()
    ]
    loader = encode_samples(model, other, cache=tmp_path)
    assert loader.queries == [("green",)] * 7
    assert torch.equal(loader.targets[1], encode_samples(model, samples()).targets[1][1:2])


@pytest.mark.parametrize("cached", [False, True])
def test_workers_and_streams_give_the_same(tmp_path: Path, cached: bool) -> None:
    model = tiny_model()

    def encode(source: object, **options: int) -> Batches:
        folder = tmp_path / f"{type(source).__name__}-{options}"
        return list(encode_samples(model, source, batch_size=3, cache=folder if cached else None, **options))  # type: ignore

    expected = encode(samples())
    state = torch.get_rng_state()
    assert_same(encode(samples(), workers=2), expected)
    assert_same(encode(samples(), workers=2), expected)  # now every picture is known, if there is a cache
    assert_same(encode(sample for sample in samples()), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("workers", "stream"), [(0, False), (1, False), (0, True)])
def test_damaged_entries_are_encoded_anew_and_reported(tmp_path: Path, workers: int, stream: bool) -> None:
    model = tiny_model()
    expected = list(encode_samples(model, samples(), cache=tmp_path))
    (part,) = TokenCache(tmp_path, model).folder.glob("*.records")
    data = bytearray(part.read_bytes())
    data[3] ^= 64
    part.write_bytes(data)
    with pytest.warns(TokenCacheWarning, match=r"1 of 7 pictures had damaged entries in .* and were encoded anew"):
        source = iter(samples()) if stream else samples()  # a stream that cannot be gone through again
        assert_same(list(encode_samples(model, source, cache=tmp_path, workers=workers)), expected)
    assert_same(list(encode_samples(model, samples(), cache=tmp_path)), expected)  # without a warning


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("cached", [False, True])
def test_the_ranks_together_see_the_batches_of_one_process(tmp_path: Path, num_ranks: int, cached: bool) -> None:
    model = tiny_model()
    options = {"batch_size": 3, "num_queries": 2, "query_variants": QueryVariants(templates=("a {}", "one {}"))}
    whole = encode_samples(model, samples(), **options)
    parts = [
        encode_samples(model, samples(), cache=tmp_path if cached else None, rank=rank, num_ranks=num_ranks, **options)
        for rank in range(num_ranks)
    ]
    assert [len(part) for part in parts] == [3] * num_ranks
    for epoch in (0, 4):
        for loader in (whole, *parts):
            loader.set_epoch(epoch)
        for batch, *shares in zip(whole, *parts, strict=True):
            together = (
                VisualTokens(
                    torch.cat([tokens.patches for tokens, _, _ in shares]),
                    torch.cat([tokens.pooled for tokens, _, _ in shares]),
                    (4, 4),
                ),
                [row for _, texts, _ in shares for row in texts],
                torch.cat([targets for _, _, targets in shares]),
            )
            assert_same([together], [batch])
            lengths = [len(texts) for _, texts, _ in shares]
            assert max(lengths) - min(lengths) <= 1


def run_rank(rank: int, folder: Path) -> None:
    """One of two ranks, in a process of its own."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    model = tiny_model()
    loader = encode_samples(model, samples(), cache=folder / "cache", batch_size=3, rank=rank, num_ranks=2)
    texts = [texts for _, texts, _ in loader]
    passes = model.backbone.num_image_passes
    precision = token_average_precision(model, loader)
    (folder / f"{rank}.json").write_text(json.dumps([passes, precision, texts]))
    dist.destroy_process_group()


def test_ranks_that_run_together_share_the_encoding_and_the_validation(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=run_rank, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [passes for passes, _, _ in results] == [4, 3]
    model = tiny_model()
    whole = encode_samples(model, samples(), batch_size=3)
    assert [precision for _, precision, _ in results] == [token_average_precision(model, whole)] * 2
    assert [a + b for a, b in zip(results[0][2], results[1][2], strict=True)] == [texts for _, texts, _ in whole]


def test_a_rank_that_runs_alone_encodes_what_the_others_would(tmp_path: Path) -> None:
    models = [tiny_model() for _ in range(2)]
    for rank, model in enumerate(models):
        encode_samples(model, samples(), cache=tmp_path, rank=rank, num_ranks=2)
    assert [model.backbone.num_image_passes for model in models] == [7, 0]


def test_variants_are_drawn_anew_every_epoch_from_seed_and_epoch_alone() -> None:
    model = tiny_model()
    variants = QueryVariants(templates=("a {}", "one {}", "this {}"))

    def texts(epoch: int, query_variants: QueryVariants | None = variants) -> list[list[list[str]]]:
        loader = encode_samples(model, samples(), num_queries=2, query_variants=query_variants)
        loader.set_epoch(epoch)
        return [texts for _, texts, _ in loader]

    assert texts(0) == texts(0) != texts(1)
    shown = {text for batch in texts(0) for row in batch for text in row}
    assert shown <= {text for colour in COLOURS for text in variants.variants(colour)}
    assert not shown <= set(COLOURS)
    assert {text for batch in texts(0, None) for row in batch for text in row} <= set(COLOURS)


def test_validation_sees_every_sample_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    variants = QueryVariants(templates=("a {}",))  # which the tiny backbone does not know
    in_memory, cached = (
        encode_samples(model, samples()),
        encode_samples(model, samples(), cache=tmp_path, query_variants=variants, num_queries=1),
    )
    values = token_average_precisions(model, in_memory)
    assert len(values) == 7 * 3 - 3  # blue is absent three times
    assert len(set(values)) > 7
    assert token_average_precisions(model, cached) == values
    assert token_average_precision(model, cached) == pytest.approx(sum(values) / len(values), abs=1e-12)
    absent = [
        RelevanceSample(image=torch.rand(3, 32, 32), queries=("red",), masks=torch.zeros(1, 32, 32).bool(), name="")
    ]
    with pytest.raises(ValueError, match="samples must hold a query that is present, got none"):
        token_average_precision(model, encode_samples(model, absent))


def test_bad_input(tmp_path: Path) -> None:
    model = tiny_model()

    def stream() -> Iterator[RelevanceSample]:
        yield from samples()

    with pytest.raises(ValueError, match="samples must hold at least one sample, got none"):
        encode_samples(model, iter(()))
    with pytest.raises(ValueError, match="workers must be 0 for samples that are a stream, got 2"):
        encode_samples(model, stream(), workers=2)
    with pytest.raises(ValueError, match="workers must be an integer >= 0, got -1"):
        encode_samples(model, samples(), workers=-1)
    with pytest.raises(ValueError, match="cache must be made for this model, got one for"):
        encode_samples(model, samples(), cache=TokenCache(tmp_path, RelevanceModel(TinyBackbone(embed_dim=4))))
    with pytest.raises(ValueError, match="rank must be < num_ranks = 2, got 2"):
        encode_samples(model, samples(), rank=2, num_ranks=2)
    tokens = encode_samples(model, samples(2)).tokens
    with pytest.raises(ValueError, match="must be for the same samples, at least one; got 2, 1 and 2"):
        TokenLoader(tokens, [("red",)], [torch.zeros(1, 16)] * 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="queries must hold at least one text for every sample"):
        TokenLoader(tokens, [("red",), ()], [torch.zeros(1, 16)] * 2)
    passes = model.backbone.num_image_passes
    for name in ("batch_size", "num_queries", "num_ranks"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            encode_samples(model, samples(2), **{name: 0})  # type: ignore[arg-type]
    assert model.backbone.num_image_passes == passes  # refused before anything is encoded
