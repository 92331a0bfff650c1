"""The token cache: what is written comes back, nothing stale or torn ever does, and memory stays flat."""

from __future__ import annotations

import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from arrcoc import FlatnessAwareMultiScale, RelevanceModel, VisualTokens
from arrcoc.tokens import fuse
from arrcoc.training.token_cache import TokenCache, picture_key
from models import TinyBackbone, tiny_model


def tokens(seed: int, levels: int = 1) -> VisualTokens:
    """Random tokens of one picture on the grid of the tiny backbone."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        VisualTokens(torch.randn(1, 16, 3, generator=generator), torch.randn(1, 3, generator=generator), (4, 4))
        for _ in range(levels)
    ]
    return fuse(tuple(made))


def key(number: int) -> str:
    return picture_key(torch.full((3, 2, 2), float(number)))


def filled(folder: Path, numbers: range = range(5), model: RelevanceModel | None = None) -> TokenCache:
    cache = TokenCache(folder, model or tiny_model())
    for number in numbers:
        cache.put(key(number), tokens(number))
    return cache


def test_keys_are_those_of_the_bits() -> None:
    image = torch.rand(3, 4, 5)
    assert picture_key(image) == picture_key(image.clone())
    assert picture_key(image.permute(0, 2, 1).contiguous().permute(0, 2, 1)) == picture_key(image)  # another layout
    nudged = image.clone()
    nudged[2, 3, 4] = torch.nextafter(nudged[2, 3, 4], torch.tensor(2.0))
    others = [nudged, image.reshape(3, 5, 4), image.double(), image.flip(-1)]
    assert len({picture_key(other) for other in (image, *others)}) == 5


def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    filled(tmp_path).close()
    cache = TokenCache(tmp_path, tiny_model())
    assert len(cache) == 5
    read = cache.tokens([key(number) for number in range(5)])
    assert len(read) == 5
    selected = read.select(torch.tensor([3, 0, 3]))
    for place, number in enumerate((3, 0, 3)):
        assert torch.equal(selected.patches[place], tokens(number).patches[0])
        assert torch.equal(selected.pooled[place], tokens(number).pooled[0])
    assert selected.grid == (4, 4) and not selected.levels
    assert selected.patches.is_contiguous()
    assert len(read.select(torch.zeros(0, dtype=torch.long))) == 0


def test_several_scales_come_back_with_their_levels(tmp_path: Path) -> None:
    model = RelevanceModel(TinyBackbone(), multiscale=FlatnessAwareMultiScale((1.0, 2.0)))
    cache = TokenCache(tmp_path, model)
    cache.put(key(0), tokens(0, levels=2))
    read, expected = cache.tokens([key(0)]).select(torch.tensor([0])), tokens(0, levels=2)
    assert torch.equal(read.patches, expected.patches) and torch.equal(read.pooled, expected.pooled)
    for level, wanted in zip(read.levels, expected.levels, strict=True):
        assert torch.equal(level.patches, wanted.patches) and torch.equal(level.pooled, wanted.pooled)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_narrow_types_round_to_nearest_and_halve_the_size(tmp_path: Path, dtype: torch.dtype, error: float) -> None:
    cache = TokenCache(tmp_path, tiny_model(), dtype=dtype)
    cache.put(key(0), tokens(0))
    read = cache.tokens([key(0)]).select(torch.tensor([0]))
    assert read.patches.dtype == torch.float32
    torch.testing.assert_close(read.patches, tokens(0).patches, rtol=error, atol=1e-7)
    assert not torch.equal(read.patches, tokens(0).patches)
    assert next(cache.folder.glob("*.records")).stat().st_size == 17 * 3 * 2


def test_other_weights_modes_scales_and_types_have_other_addresses(tmp_path: Path) -> None:
    def other_mode() -> RelevanceModel:
        model = tiny_model()
        model.backbone.mode = "other"
        return model

    def other_statistics() -> RelevanceModel:
        model = tiny_model()
        model.backbone.mean = (0.5, 0.5, 0.5)
        return model

    filled(tmp_path)
    models = [
        RelevanceModel(TinyBackbone(embed_dim=4)),
        RelevanceModel(TinyBackbone(embed_dim=4, seed=1)),
        RelevanceModel(TinyBackbone(), multiscale=FlatnessAwareMultiScale((2.0,))),
        RelevanceModel(TinyBackbone(), multiscale=FlatnessAwareMultiScale((1.0, 2.0))),
        RelevanceModel(TinyBackbone().to(torch.bfloat16)),
        other_mode(),
        other_statistics(),
    ]
    caches = [TokenCache(tmp_path, model) for model in models] + [
        TokenCache(tmp_path, tiny_model(), dtype=torch.float16)
    ]
    assert all(key(0) not in cache for cache in caches)
    assert len({cache.folder for cache in [*caches, filled(tmp_path)]}) == 9
    assert not caches[0].fits(tiny_model())
    assert key(0) in TokenCache(tmp_path, tiny_model(head=False))  # the head does not matter
    turned = tiny_model()
    turned.backbone.orientation = -1  # nor does the orientation: who scores multiplies
    assert key(0) in TokenCache(tmp_path, turned)


@pytest.mark.parametrize("torn", ["half a line", "a line without a record", "a record without a line"])
def test_what_an_interrupted_writer_left_is_passed_over(tmp_path: Path, torn: str) -> None:
    cache = filled(tmp_path, range(3))
    cache.close()
    (index,), (part,) = cache.folder.glob("*.index"), cache.folder.glob("*.records")
    lines, data = index.read_text(), part.read_bytes()
    if torn == "half a line":
        index.write_text(lines[:-4])
    elif torn == "a line without a record":
        part.write_bytes(data[:-5])
    else:
        part.write_bytes(data + b"123")
    again = TokenCache(tmp_path, tiny_model())
    whole = 3 if torn == "a record without a line" else 2
    assert [key(number) in again for number in range(4)] == [number < whole for number in range(4)]
    assert not again.damaged
    again.put(key(9), tokens(9))  # in a part of its own, so the torn end is never written behind
    assert key(9) in TokenCache(tmp_path, tiny_model())
    if whole == 2:
        with pytest.raises(KeyError, match=f"picture {key(2)} has no entry in"):
            again.tokens([key(2)])


def test_a_writer_that_fails_in_the_middle_goes_on_in_another_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled(tmp_path, range(1))
    (cache.folder / "000001 (copy).index").touch()  # as people and synchronising programs leave behind
    from arrcoc.training import record_store

    def full_disk(file: object, data: bytes) -> None:
        file.write(data[: len(data) // 2])  # type: ignore[attr-defined]
        raise OSError(28, "disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"disk full: '.*000001\.records'"):
        patch.setattr(record_store, "_write", full_disk)
        cache.put(key(1), tokens(1))
    assert key(1) not in cache
    cache.put(key(2), tokens(2))
    again = TokenCache(tmp_path, tiny_model())
    assert [key(number) in again for number in range(3)] == [True, False, True]
    assert torch.equal(again.tokens([key(2)]).select(torch.tensor([0])).patches, tokens(2).patches)


@pytest.mark.parametrize("what", ["record", "checksum", "key"])
def test_a_damaged_entry_is_missing_and_can_be_written_again(tmp_path: Path, what: str) -> None:
    cache = filled(tmp_path, range(2))
    cache.close()
    (index,), (part,) = cache.folder.glob("*.index"), cache.folder.glob("*.records")
    damaged = 0
    if what == "record":
        data = bytearray(part.read_bytes())
        data[7] ^= 1
        part.write_bytes(data)
    elif what == "checksum":
        index.write_text(index.read_text().replace(" 0 ", " 1 ", 1))  # the record of another picture
    else:
        index.write_text(index.read_text().replace(key(0), key(7)))
        damaged = 7
    again = TokenCache(tmp_path, tiny_model())
    assert key(damaged) not in again and key(1) in again
    assert again.damaged == {key(damaged)}
    again.put(key(damaged), tokens(5))
    fresh = TokenCache(tmp_path, tiny_model())
    assert torch.equal(fresh.tokens([key(damaged)]).select(torch.tensor([0])).patches, tokens(5).patches)
    assert not fresh.damaged


def write_some(folder: Path, start: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    cache = filled(folder, range(start, start + 20))
    assert len(cache) >= 20


def test_several_writers_do_not_meet_and_readers_see_all(tmp_path: Path) -> None:
    reader = TokenCache(tmp_path, tiny_model())
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_some, args=(tmp_path, start)) for start in (0, 10, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(reader) == 0
    reader.refresh()
    assert len(reader) == 30 + 20
    numbers = [*range(30), *range(40, 60)]
    read = reader.tokens([key(number) for number in numbers]).select(torch.arange(50))
    for patches, number in zip(read.patches, numbers, strict=True):
        assert torch.equal(patches, tokens(number).patches[0])
    assert len(list(reader.folder.glob("*.records"))) == 3


def test_two_writers_that_choose_the_same_number_get_different_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [TokenCache(tmp_path, tiny_model()) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda path, pattern: iter(()))  # neither sees what the other one has begun
        for number in range(6):
            caches[number % 2].put(key(number), tokens(number))
    reader = TokenCache(tmp_path, tiny_model())
    read = reader.tokens([key(number) for number in range(6)]).select(torch.arange(6))
    assert torch.equal(read.patches, torch.cat([tokens(number).patches for number in range(6)]))
    assert len(list(reader.folder.glob("*.records"))) == 2


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_everything(folder: Path, model: RelevanceModel, num: int) -> None:
    """In a process of its own: its memory grows by far less than what it reads."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    cache = TokenCache(folder, model)
    cache.tokens([key(0)] * 8).select(torch.arange(8))
    before = peak_memory()
    read = cache.tokens([key(number) for number in range(num)])  # verifies every entry
    for _ in range(2):
        for batch in torch.randperm(num, generator=torch.Generator().manual_seed(0)).split(8):
            read.select(batch)
    assert cache.num_bytes > 100e6
    assert peak_memory() - before < 30e6, f"{peak_memory() - before} more bytes"


def test_memory_stays_flat(tmp_path: Path) -> None:
    model = RelevanceModel(TinyBackbone(embed_dim=8192))
    cache, num = TokenCache(tmp_path, model), 200
    patches = torch.randn(1, 16, 8192)
    for number in range(num):
        cache.put(key(number), VisualTokens(patches, patches[:, 0], (4, 4)))
    assert cache.num_bytes == pytest.approx(num * 17 * 8192 * 4, rel=1e-3)
    process = multiprocessing.get_context("fork").Process(target=read_everything, args=(tmp_path, model, num))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype must be torch.float32, .*, got torch.float64"):
        TokenCache(tmp_path, tiny_model(), dtype=torch.float64)
    trained = tiny_model()
    trained.backbone.num_trained = 1
    with pytest.raises(ValueError, match="the backbone must be frozen for its tokens to be kept"):
        TokenCache(tmp_path, trained)
    cache = filled(tmp_path, range(1))
    with pytest.raises(ValueError, match=r"tokens must be of one picture on the grid \(4, 4\), 1 levels of width 3"):
        cache.put(key(1), tokens(1, levels=2))
    with pytest.raises(ValueError, match="tokens must be of one picture"):
        cache.put(key(1), tokens(1).select(torch.tensor([0, 0])))
    path = cache.folder / "space.json"
    path.write_text(json.dumps({**cache.space, "mode": "other"}))
    with pytest.raises(ValueError, match=r"space.json must describe .* delete its folder"):
        TokenCache(tmp_path, tiny_model())
    path.write_text("{")
    with pytest.raises(ValueError, match=r"space.json is not JSON: .* delete its folder"):
        TokenCache(tmp_path, tiny_model())
