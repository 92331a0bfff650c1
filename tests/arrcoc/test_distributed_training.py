"""Several ranks train as one process does: the same steps up to rounding, the same weights on all ranks bit for bit.

Fast tests let threads stand for ranks, with sums and broadcasts of their own; slow ones start processes by torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arrcoc.training.trainer as trainer_module
from arrcoc import RelevanceModel, TrainConfig, encode_samples, train_relevance_model_with_sam
from arrcoc.training.distributed import Ranks, device_of_rank, process_group
from arrcoc.training.state import TrainingState
from models import tiny_model
from tiny_open_clip import CONVOLUTION, VIT, write_folder
from training_cases import samples

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Sums in another order: float32 and about a dozen steps.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class ThreadRanks(Ranks):
    """One of several threads that stand for ranks."""

    def __init__(self, rank: int, num_ranks: int, barrier: threading.Barrier, box: dict[int, Any]) -> None:
        self.rank, self.num_ranks, self._barrier, self._box = rank, num_ranks, barrier, box

    def gather(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait(timeout=60)
        values = [self._box[rank] for rank in range(self.num_ranks)]
        self._barrier.wait(timeout=60)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            value = self.gather(tensor.detach().clone())[0]
            with torch.no_grad():
                tensor.copy_(value)

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def run_as_ranks(num_ranks: int, work: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The results of a function of the rank, run by as many threads."""
    barrier, box, local = threading.Barrier(num_ranks), {}, threading.local()
    results: list[Any] = [None] * num_ranks
    monkeypatch.setattr(trainer_module, "Ranks", lambda: local.ranks)

    def thread(rank: int) -> None:
        local.ranks = ThreadRanks(rank, num_ranks, barrier, box)
        try:
            results[rank] = work(rank)
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(num_ranks)]
    for started in threads:
        started.start()
    for started in threads:
        started.join()
    if errors := [r for r in results if isinstance(r, Exception) and not isinstance(r, threading.BrokenBarrierError)]:
        raise errors[0]
    return results


def train(
    rank: int, num_ranks: int, config: TrainConfig, **options: Any
) -> tuple[RelevanceModel, list[dict[str, float]]]:
    model = tiny_model(text_rank=2)
    data = encode_samples(model, samples(), batch_size=5, num_queries=2, rank=rank, num_ranks=num_ranks)
    return model, train_relevance_model_with_sam(model, data, epochs=3, config=config, **options)


OPTIONS = {
    "plain": {"penalty_weight": 0.0},
    "penalty": {"penalty_weight": 0.5},
    "bce": {"loss": "bce", "penalty_weight": 0.5},
    "all": {
        "penalty_weight": 0.5,
        "accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "ema_decay": 0.8,
        "patience": 1,
        "monitor": "ap",
        "precision": "float16",
    },
    "looksam": {"optimizer": "looksam"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("num_ranks", [2, 4])  # the last batch has three pictures: one of four ranks has none of them
def test_ranks_train_as_one_process_does(name: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(lr=0.03, **OPTIONS[name])

    def evaluate(model: RelevanceModel) -> dict[str, float]:
        return {"ap": 0.5}  # which never rises: with patience, two epochs

    alone, history = train(0, 1, config, evaluate=evaluate)
    with monkeypatch.context() as patch:
        results = run_as_ranks(num_ranks, lambda rank: train(rank, num_ranks, config, evaluate=evaluate), patch)
    assert len(history) == (2 if name == "all" else 3)
    for model, its_history in results:
        for (key, value), own in zip(alone.head.state_dict().items(), model.head.state_dict().values(), strict=True):
            torch.testing.assert_close(own, value, **(CLOSE if name != "all" else {"rtol": 0.02, "atol": 0.02}))
            assert torch.equal(own, results[0][0].head.state_dict()[key]), key
        assert its_history == results[0][1]
        for record, expected in zip(its_history, history, strict=True):
            assert record == pytest.approx(expected, rel=1e-2 if name == "all" else 1e-4, abs=1e-5)


def test_the_first_rank_alone_writes_and_a_resume_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = TrainConfig(lr=0.03, ema_decay=0.5), []

    def stop(model: RelevanceModel, record: dict[str, float]) -> None:
        seen.append(record["epoch"])
        if stop.armed and record["epoch"] == 2:
            raise KeyError("stop")

    def run(folder: str, resume: bool = False) -> list[Any]:
        def work(rank: int) -> Any:
            return train(rank, 2, config, output=tmp_path / folder, resume=resume, callbacks=[stop])

        with monkeypatch.context() as patch:
            return run_as_ranks(2, work, patch)

    stop.armed = False
    (whole, history), _ = run("a")
    assert seen == [1, 2, 3]  # not twice
    stop.armed = True
    with pytest.raises(KeyError, match="stop"):
        run("b")
    stop.armed = False
    for model, its_history in run("b", resume=True):
        assert its_history == history
        assert all(torch.equal(v, model.head.state_dict()[k]) for k, v in whole.head.state_dict().items())
    lines = [[json.loads(x) for x in (tmp_path / f / "log.jsonl").read_text().splitlines()] for f in "ab"]
    assert lines[0] == lines[1] == history
    with pytest.raises(ValueError, match=r"the checkpoint's num_ranks must be 1, got 2: resume with the settings"):
        train(0, 1, config, output=tmp_path / "a", resume=True)


def test_all_ranks_start_from_the_weights_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> Tensor:
        model = tiny_model(text_rank=2)
        with torch.no_grad():
            model.head.token_factor.add_(rank)
        TrainingState(model, TrainConfig(), 1, trainer_module.Ranks())
        return model.head.token_factor.detach()

    first, second = run_as_ranks(2, work, monkeypatch)
    assert torch.equal(first, second)


def test_the_head_is_calibrated_by_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the others would make of it, on another card perhaps."""

    def calibrate(head: Any, batches: Any) -> None:
        with torch.no_grad():
            head.bias.add_(threading.get_ident() % 1000)

    monkeypatch.setattr("arrcoc.training.state.calibrate_head", calibrate)
    (first, _), (second, _) = run_as_ranks(2, lambda rank: train(rank, 2, TrainConfig()), monkeypatch)
    assert torch.equal(first.head.bias, second.head.bias)


def test_what_no_rank_uses_does_not_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter without a gradient is left alone, as by one process: a gradient of zero would let it decay."""

    def work(rank: int) -> Tensor:
        model = tiny_model()
        model.head.unused = torch.nn.Parameter(torch.ones(2))
        data = encode_samples(model, samples(), batch_size=5, rank=rank, num_ranks=2)
        train_relevance_model_with_sam(model, data, epochs=1, config=TrainConfig(weight_decay=0.5, lr=0.1))
        return model.head.unused.detach()

    for unused in run_as_ranks(2, work, monkeypatch):
        assert torch.equal(unused, torch.ones(2))


def test_choosing_samples_needs_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="optimizer must not choose among samples on several ranks, got 'efficientsam'"
    ):
        run_as_ranks(2, lambda rank: train(rank, 2, TrainConfig(optimizer="efficientsam")), monkeypatch)


def test_one_process_is_one_rank() -> None:
    with process_group() as ranks:
        assert (ranks.rank, ranks.num_ranks, ranks.is_writer) == (0, 1, True)
        assert ranks.gather("x") == ["x"] and ranks.broadcast("x") == "x" and list(ranks.share(3)) == [0, 1, 2]
        tensor = torch.ones(2)
        assert ranks.sum_(tensor) is tensor and torch.equal(tensor, torch.ones(2))


def test_shares_are_contiguous_and_complete() -> None:
    parts = [ThreadRanks(rank, 3, threading.Barrier(1), {}).share(8) for rank in range(3)]
    assert [number for part in parts for number in part] == list(range(8))


def test_each_rank_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of_rank("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device_of_rank(name) for name in ("cuda", "cuda:0", "cpu", None)] == ["cuda:1", "cuda:0", "cpu", None]


# ---- processes


def torchrun(*argv: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    # The two dashes keep torchrun from taking --num for the beginning of an option of its own.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=SCRIPTS)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("models")
    models = {"convolution": CONVOLUTION, "vit": VIT}
    yield {name: f"open_clip:local-dir:{write_folder(folder / name, model)}" for name, model in models.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("convolution", ["--patience", "2"]), ("vit", ["--train-blocks", "1"])])
def test_torchrun_gives_the_run_of_one_process(
    name: str, options: list[str], specs: dict[str, str], tmp_path: Path
) -> None:
    import train_relevance

    argv = ["--model", specs[name], "--num", "5", "--epochs", "2", "--batch-size", "3", "--text-rank", "2", *options]
    assert train_relevance.main([*argv, "--output", str(tmp_path / "one")]) == 0
    script = str(SCRIPTS / "train_relevance.py")
    cache = [] if "--train-blocks" in options else ["--cache", str(tmp_path / "cache")]
    done = torchrun(script, *argv, *cache, "--output", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP over tokens") == 1  # one writer
    one, two = ([json.loads(x) for x in (tmp_path / f / "log.jsonl").read_text().splitlines()] for f in ("one", "two"))
    assert len(one) == 2
    for record, expected in zip(two, one, strict=True):
        assert record == pytest.approx(expected, rel=1e-3, abs=1e-4)
    from safetensors.torch import load_file

    def read(file: Path) -> dict[str, torch.Tensor]:
        """The weights, with the gain itself: its logarithm is anything where a map says nothing."""
        return {key: value.exp() if key == "log_gain" else value for key, value in load_file(file).items()}

    for file in (tmp_path / "one").glob("*.safetensors"):
        torch.testing.assert_close(read(tmp_path / "two" / file.name), read(file), rtol=1e-3, atol=1e-3)
    again = torchrun(script, "--output", str(tmp_path / "two"), "--resume")
    assert again.returncode == 0, again.stderr
    assert [json.loads(x) for x in (tmp_path / "two" / "log.jsonl").read_text().splitlines()] == two


FAILING = """
import sys
import torch
from arrcoc import train_relevance_model_with_sam
from arrcoc.training.distributed import process_group
from models import tiny_model

def batches(rank):
    for number in range(4):
        if rank == 1 and number == 2:
            raise ValueError("this rank has had enough")
        yield torch.rand(2, 3, 32, 32), ["red", "blue"], torch.rand(2, 16)

class Loader:
    def __init__(self, rank): self.rank = rank
    def __len__(self): return 4
    def __iter__(self): return batches(self.rank)

with process_group() as ranks:
    train_relevance_model_with_sam(tiny_model(), Loader(ranks.rank), epochs=1)
"""


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    done = torchrun(str(tmp_path / "failing.py"), timeout=120)  # not the half hour after which a group gives up
    assert done.returncode != 0
    assert "this rank has had enough" in done.stderr
