"""Pictures online: the tokens of the cache, whatever the workers; augmentation by (seed, epoch, sample)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from arrcoc import FlatnessAwareMultiScale, RelevanceModel, encode_samples
from arrcoc.data.augment import RelevanceAugmentation
from arrcoc.data.queries import QueryVariants
from arrcoc.data.sample import RelevanceSample
from arrcoc.data.scenes import Scenes
from arrcoc.training.images import ImageLoader, squash
from arrcoc.training.validation import token_average_precisions
from models import TinyBackbone, tiny_model

Batches = list[tuple[torch.Tensor, list[list[str]], torch.Tensor]]


def loader(epoch: int = 0, **options: object) -> Batches:
    settings = {"batch_size": 3, "num_queries": 4, "augmentation": RelevanceAugmentation(), **options}
    made = ImageLoader(Scenes(7, size=(64, 96)), (64, 64), (4, 4), **settings)  # type: ignore[arg-type]
    made.set_epoch(epoch)
    batches = list(made)
    assert len(batches) == len(made) == 3
    return batches


def assert_same(first: Batches, second: Batches) -> None:
    assert len(first) == len(second) > 0
    for (images, texts, targets), (other_images, other_texts, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert texts == other_texts
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_without_augmentation_it_shows_what_encode_samples_encodes(scales: tuple[float, ...]) -> None:
    model = RelevanceModel(TinyBackbone(), multiscale=FlatnessAwareMultiScale(scales))
    scenes = Scenes(5, size=(64, 96))
    encoded = encode_samples(model, scenes, batch_size=2)
    online = ImageLoader.for_model(model, scenes, batch_size=2)
    assert len(online) == len(encoded) == 3
    for (images, texts, targets), (tokens, _, _) in zip(online, encoded, strict=True):
        assert images.shape == (len(tokens), 3, 32, 32)
        assert targets.shape == (len(tokens), 6, 16)
        assert all(len(row) == 6 for row in texts)
        if len(scales) == 1:  # the same order; a second scale is made of the squashed picture here
            one_by_one = torch.cat([model.backbone(image[None]).patches for image in images])
            assert torch.equal(one_by_one, tokens.patches)
    for number in range(5):
        image, queries, targets = online.sample(number)
        assert queries == encoded.queries[number] and torch.equal(targets, encoded.targets[number])
        assert torch.equal(image[0], squash(scenes[number].image, (32, 32)))


def test_targets_are_the_coverage_of_the_queries_that_are_shown() -> None:
    scenes = Scenes(3, size=(64, 64))
    samples = {sample.queries: sample for sample in scenes}
    for images, texts, targets in ImageLoader(scenes, (64, 64), (4, 4), batch_size=2, num_queries=9):
        for image, row, target in zip(images, texts, targets, strict=True):
            (sample,) = (sample for queries, sample in samples.items() if set(row) == set(queries))
            assert torch.equal(image, sample.image)
            masks = torch.stack([sample.masks[sample.queries.index(text)] for text in row])
            torch.testing.assert_close(target, F.avg_pool2d(masks.float(), 16).flatten(1))


def test_batches_depend_on_seed_and_epoch_and_not_on_workers() -> None:
    state = torch.get_rng_state()
    batches = loader(epoch=2)
    assert_same(loader(epoch=2), batches)
    assert_same(loader(epoch=2, workers=2), batches)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (loader(epoch=3), loader(epoch=2, seed=1)):
        assert not torch.equal(other[0][0], batches[0][0])


def test_a_sample_changes_from_epoch_to_epoch() -> None:
    scene = [Scenes(1, size=(64, 96))[0]]
    data = ImageLoader(scene, (64, 64), (4, 4), augmentation=RelevanceAugmentation())
    images = []
    for epoch in range(3):
        data.set_epoch(epoch)
        images += [images for images, _, _ in data]
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    ((twins, _, _),) = ImageLoader(scene * 2, (64, 64), (4, 4), augmentation=RelevanceAugmentation())
    assert not torch.equal(twins[0], twins[1])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_ranks_together_see_the_batches_of_one_process(num_ranks: int) -> None:
    options = {"query_variants": QueryVariants(), "epoch": 1}
    parts = [loader(rank=rank, num_ranks=num_ranks, **options) for rank in range(num_ranks)]
    for whole, *shares in zip(loader(**options), *parts, strict=True):
        together = (
            torch.cat([images for images, _, _ in shares]),
            [row for _, texts, _ in shares for row in texts],
            torch.cat([targets for _, _, targets in shares]),
        )
        assert_same([together], [whole])


def test_a_part_of_a_batch_may_be_empty() -> None:
    data = ImageLoader(Scenes(1, size=64), (64, 64), (4, 4), rank=0, num_ranks=2, num_queries=5)
    ((images, texts, targets),) = list(data)
    assert images.shape == (0, 3, 64, 64) and texts == [] and targets.shape == (0, 5, 16)


def test_validation_on_pictures_is_validation_on_their_tokens() -> None:
    model, scenes = tiny_model(), coloured(4)
    online = ImageLoader.for_model(model, scenes, augmentation=RelevanceAugmentation())
    assert token_average_precisions(model, online) == token_average_precisions(model, encode_samples(model, scenes))


def coloured(num: int) -> list[RelevanceSample]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, 8:, 8:] = True, True
    return [
        RelevanceSample(image=torch.rand(3, 32, 32, generator=generator), queries=("red", "blue"), masks=masks, name="")
        for _ in range(num)
    ]


def test_bad_input() -> None:
    scenes = Scenes(2, size=64)
    with pytest.raises(ValueError, match="samples must be a sequence, to be shuffled, got generator"):
        ImageLoader((scene for scene in scenes), (64, 64), (4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="samples must hold at least one sample, got none"):
        ImageLoader([], (64, 64), (4, 4))
    with pytest.raises(ValueError, match=r"size must be \(height, width\), both >= 1, got \(0, 64\)"):
        ImageLoader(scenes, (0, 64), (4, 4))
    with pytest.raises(ValueError, match=r"grid must be \(height, width\), both >= 1, got \(4,\)"):
        ImageLoader(scenes, (64, 64), (4,))  # type: ignore[arg-type]
    mute = RelevanceSample(image=torch.rand(3, 8, 8), queries=(), masks=torch.zeros(0, 8, 8).bool(), name="mute")
    for augmentation in (None, RelevanceAugmentation()):
        with pytest.raises(ValueError, match="every sample must have a query, 'mute' has none"):
            next(iter(ImageLoader([mute], (8, 8), (1, 1), augmentation=augmentation)))
    with pytest.raises(ValueError, match="workers must be an integer >= 0, got -2"):
        ImageLoader(scenes, (64, 64), (4, 4), workers=-2)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        ImageLoader(scenes, (64, 64), (4, 4), batch_size=0)
