"""Every setting of training does what it says, and a resume with all of them is the uninterrupted run, bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arrcoc import RelevanceModel, TokenLoader, TrainConfig, VisualTokens, train_relevance_model_with_sam
from arrcoc.training.averaging import WeightAverage
from arrcoc.training.checkpoint import load_checkpoint
from arrcoc.training.distributed import Ranks
from arrcoc.training.part import TrainedPart
from arrcoc.training.state import TrainingState
from arrcoc.training.stopping import BestEpoch
from arrcoc.training.update import Update
from models import tiny_model
from sam_core import SAM
from sam_core.optimizers import METHODS
from training_cases import loader

Batch = tuple[Any, Any, Tensor]


class Stop(Exception):
    pass


def scores(values: list[float], stop_at: int | None = None) -> Callable[[RelevanceModel], dict[str, float]]:
    """A validation that gives these scores, one an epoch; it breaks the run off at a call."""
    calls = itertools.count()

    def evaluate(model: RelevanceModel) -> dict[str, float]:
        call = next(calls)
        if call == stop_at:
            raise Stop
        return {"ap": values[call]}

    return evaluate


def train(config: TrainConfig, epochs: int = 3, model: RelevanceModel | None = None, **options: Any) -> RelevanceModel:
    model = tiny_model(text_rank=2) if model is None else model
    train_relevance_model_with_sam(model, loader(model), epochs=epochs, config=config, **options)
    return model


def weights(model: RelevanceModel) -> dict[str, Tensor]:
    assert model.head is not None
    return {name: value.clone() for name, value in model.head.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        assert torch.equal(second[name], value), name


# ---- resuming


ALL = {
    "lr": 0.03,
    "schedule": "linear",
    "min_lr": 0.001,
    "warm_up": 0.2,
    "accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "ema_decay": 0.8,
    "patience": 2,
    "monitor": "ap",
    "penalty_weight": 0.5,
}


FLOAT16 = {**ALL, "precision": "float16", "base_optimizer": "SGD", "base_options": {"momentum": 0.9}}
BFLOAT16 = {**ALL, "precision": "bfloat16", "optimizer": "asam", "optimizer_options": {"eta": 0.01}}
METHODS_ALONE = [{"optimizer": name, "lr": 0.03} for name in METHODS if name not in ("sam", "asam")]


@pytest.mark.parametrize(
    ("options", "at"),
    [(FLOAT16, 1), (FLOAT16, 3), (BFLOAT16, 1), (BFLOAT16, 3), *((options, 3) for options in METHODS_ALONE)],
)
def test_a_resumed_run_is_the_uninterrupted_one(options: dict[str, Any], at: int, tmp_path: Path) -> None:
    config, values = TrainConfig(**options), [0.1, 0.3, 0.2, 0.1, 0.5]  # with patience, the fifth epoch is never run
    whole = train(config, 5, evaluate=scores(values), output=tmp_path / "a")
    with pytest.raises(Stop):
        train(config, 5, evaluate=scores(values, stop_at=at), output=tmp_path / "b")
    resumed = train(config, 5, evaluate=scores(values[at:]), output=tmp_path / "b", resume=True)
    assert_same(weights(whole), weights(resumed))
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in "ab"]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == (4 if config.patience else 5)


def test_a_resume_takes_up_the_scale_of_the_loss(tmp_path: Path) -> None:
    """It changes no bit of a step that does not overflow, but it decides which one does."""
    config = TrainConfig(precision="float16", penalty_weight=0.0, nonfinite="skip")
    for folder, stops in (("a", [None]), ("b", [1, None])):
        for number, stop_at in enumerate(stops):
            model = tiny_model()
            spoiled = Spoiled(loader(model), {1})  # every epoch halves the scale
            options = {"evaluate": scores([0.0] * 3, stop_at), "resume": number > 0}
            with contextlib.suppress(Stop):
                train_relevance_model_with_sam(
                    model, spoiled, epochs=3, config=config, output=tmp_path / folder, **options
                )
    a, b = (load_checkpoint(tmp_path / folder / "checkpoint.pt")["scaler"] for folder in "ab")
    assert a == b and a["scale"] == 65536 / 2**3


@pytest.mark.parametrize("name", ["precision", "ema_decay", "patience", "accumulation_steps", "schedule"])
def test_a_resume_refuses_another_value_of_every_setting(name: str, tmp_path: Path) -> None:
    options = {"precision": "bfloat16", "ema_decay": 0.5, "patience": 1, "accumulation_steps": 2, "schedule": "linear"}
    train(TrainConfig(), 1, output=tmp_path)
    with pytest.raises(ValueError, match=rf"the checkpoint's config.{name} must be {options[name]!r}, got "):
        train(TrainConfig(**{name: options[name]}), 1, output=tmp_path, resume=True)


# ---- methods


def test_a_method_is_known_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dummy(SAM):
        """A method that came later, with an option of its own."""

        num_steps = 0

        def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, flavour: str = "", **kwargs: Any):
            super().__init__(params, base_optimizer, rho=rho, **kwargs)
            self.flavour = flavour

        def step(self, *args: Any, **kwargs: Any) -> Any:
            Dummy.num_steps += self.flavour == "sweet"
            return super().step(*args, **kwargs)

    monkeypatch.setitem(METHODS, "dummy", Dummy)
    model = train(TrainConfig(optimizer="dummy", optimizer_options={"flavour": "sweet"}), 2)
    assert Dummy.num_steps == 2 * 3
    assert_same(weights(model), weights(train(TrainConfig(), 2)))


def test_a_method_may_ask_for_the_losses_of_single_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that keeps the worst samples sees the same mean as all others, and only those it asks for."""
    seen: dict[str, Any] = {"sizes": []}

    class Choosy(SAM):
        takes_sample_losses = True

        def step(self, closure: Any, **kwargs: Any) -> Any:
            def backward(indices: Tensor | None = None) -> Tensor:
                losses = closure() if indices is None else closure(indices)
                seen["sizes"].append(len(losses))
                losses.mean().backward()
                return losses.detach()

            with torch.enable_grad():
                self.zero_grad()
                losses = backward()
                seen.setdefault("mean", losses.mean().item())
                chosen = losses.topk(2).indices.sort().values
                with torch.no_grad():
                    torch.testing.assert_close(closure(chosen), losses[chosen])
            self.base_optimizer.step()

    monkeypatch.setitem(METHODS, "choosy", Choosy)
    config = {"accumulation_steps": 2, "penalty_weight": 0.5}
    model = tiny_model(text_rank=2)
    data = loader(model)
    histories = [
        train_relevance_model_with_sam(
            tiny_model(text_rank=2), data, epochs=1, config=TrainConfig(optimizer=name, **config)
        )
        for name in ("choosy", "none")
    ]
    assert seen["sizes"] == [6, 2]
    first = histories[1][0]
    assert histories[0][0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert histories[0][0]["penalty"] == pytest.approx(first["penalty"], rel=1e-5)


# ---- batches


@pytest.mark.parametrize("loss", ["listwise", "bce"])
def test_both_gradients_are_those_of_the_whole_batch(loss: str) -> None:
    """Micro-batches of unequal numbers of queries and of present ones; float64."""
    whole = next(iter(loader(tiny_model(), batch_size=7)))
    tokens, texts, targets = whole
    pieces = [torch.arange(0, 2), torch.arange(2, 3), torch.arange(3, 7)]
    parts = [(tokens.select(p), [texts[n] for n in p], targets[p]) for p in pieces]

    def gradients(batches: list[Batch], rho: float) -> list[Tensor]:
        twin = tiny_model(text_rank=2).double()
        twin.head.load_state_dict({name: value + 0.1 for name, value in twin.head.state_dict().items()})
        config = TrainConfig(loss=loss, rho=rho, penalty_weight=0.3, input_radius=0.0, base_optimizer="SGD", lr=1.0)
        part = TrainedPart(twin, config, Ranks())
        update = Update(part, [{"params": list(twin.head.parameters())}], config, Ranks())
        before = [param.detach().clone() for param in update.params]
        prepared = [part.prepare(as_float64(batch), torch.Generator()) for batch in batches]
        update([p for p in prepared if p is not None])
        return [b - param.detach() for b, param in zip(before, update.params, strict=True)]

    for rho in (0.0, 0.5):
        for one, many in zip(gradients([whole], rho), gradients(parts, rho), strict=True):
            torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-12)


def as_float64(batch: Batch) -> Batch:
    tokens, texts, targets = batch
    return VisualTokens(tokens.patches.double(), tokens.pooled.double(), tokens.grid), texts, targets.double()


@pytest.mark.parametrize(("accumulation_steps", "num_steps"), [(1, 8), (3, 3), (4, 2), (9, 1)])
def test_accumulation_makes_fewer_steps(accumulation_steps: int, num_steps: int, tmp_path: Path) -> None:
    model = tiny_model()
    config = TrainConfig(accumulation_steps=accumulation_steps, schedule="linear", min_lr=1e-3)
    data = loader(model, batch_size=1)  # eight batches
    history = train_relevance_model_with_sam(model, data, epochs=1, config=config, output=tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["scheduler"]["last_epoch"] == num_steps
    assert history[0]["lr"] == pytest.approx(1e-3)  # the schedule ends with the run, whatever the number of steps


# ---- the other settings


def test_the_rate_follows_its_schedule() -> None:
    model = tiny_model()
    config = TrainConfig(lr=0.1, min_lr=0.02, schedule="linear", warm_up=0.0)
    history = train_relevance_model_with_sam(model, loader(model), epochs=4, config=config)
    assert [record["lr"] for record in history] == pytest.approx([0.08, 0.06, 0.04, 0.02])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_precision_trains_close_to_float32(precision: str) -> None:
    wide, narrow = (weights(train(TrainConfig(precision=name, lr=0.03))) for name in ("float32", precision))
    assert any(not torch.equal(narrow[name], value) for name, value in wide.items())
    for name, value in wide.items():
        assert narrow[name].dtype == torch.float32
        torch.testing.assert_close(narrow[name], value, rtol=0.1, atol=0.05)


def test_long_steps_are_clipped() -> None:
    plain = {"base_optimizer": "SGD", "lr": 1.0, "warm_up": 0.0, "schedule": "constant", "weight_decay": 0.0}
    moves = {}
    for limit in (None, 1e-3):
        model = tiny_model()
        before = weights(model)
        config = TrainConfig(max_grad_norm=limit, loss="mse", **plain)
        part = TrainedPart(model, config, Ranks())
        update = Update(part, [{"params": list(model.head.parameters())}], config, Ranks())
        prepared = part.prepare(next(iter(loader(model))), torch.Generator())
        update([prepared])
        moves[limit] = torch.cat([(weights(model)[n] - before[n]).flatten() for n in before])
    assert moves[None].norm() > 2e-3
    torch.testing.assert_close(moves[1e-3], 1e-3 * moves[None] / moves[None].norm(), rtol=1e-3, atol=1e-7)


class Spoiled:
    """A loader whose batches of some numbers hold a NaN."""

    def __init__(self, data: TokenLoader, numbers: set[int]) -> None:
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        for number, (tokens, texts, targets) in enumerate(self.data):
            spoiled = tokens.with_patches(tokens.patches * math.nan)
            yield (spoiled if number in self.numbers else tokens), texts, targets


def test_steps_that_are_not_finite_are_refused_or_skipped_and_counted() -> None:
    model = tiny_model()
    with pytest.raises(FloatingPointError, match="is not finite at w"):
        train_relevance_model_with_sam(model, Spoiled(loader(model), {1}), epochs=1)
    config = TrainConfig(nonfinite="skip", penalty_weight=0.0)
    for bad in ({0}, {1}):  # the first batch is what sharpness is measured on, and all are calibrated with
        model = tiny_model()
        (record,) = train_relevance_model_with_sam(model, Spoiled(loader(model), bad), epochs=1, config=config)
        assert record["num_skipped"] == 1 and all(map(math.isfinite, record.values()))
        assert all(value.isfinite().all() for value in weights(model).values())
    with pytest.raises(FloatingPointError, match="no loss of epoch 1 is finite"):
        train_relevance_model_with_sam(tiny_model(), Spoiled(loader(model), {0, 1, 2}), epochs=1, config=config)


def test_the_head_is_not_calibrated_with_what_is_not_finite() -> None:
    model = tiny_model()
    state = TrainingState(model, TrainConfig(), 3, Ranks())
    with pytest.raises(FloatingPointError, match="the scores that the head is calibrated with must be finite"):
        state.finish(Spoiled(loader(model), {1}))


def test_a_score_that_is_not_finite_stops_the_run_before_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the log entry of epoch 2 must be finite, got {'ap': nan}"):
        train(TrainConfig(), evaluate=scores([0.5, math.nan]), output=tmp_path)
    resumed = train(TrainConfig(), evaluate=scores([0.5, 0.5]), output=tmp_path, resume=True)
    whole = train(TrainConfig(), evaluate=scores([0.5] * 3), output=tmp_path / "whole")
    assert_same(weights(whole), weights(resumed))


# ---- averages and early stopping


def test_the_average_is_its_formula() -> None:
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = WeightAverage([param], 0.7)
    expected = param.detach().double().clone()
    for step in range(12):
        with torch.no_grad():
            param.add_(torch.tensor([0.5, -1.0]))
        average.update()
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * param.detach().double()
    torch.testing.assert_close(average.values[0].double(), expected, rtol=1e-5, atol=1e-5)
    before = param.detach().clone()
    with average.applied():
        assert torch.equal(param, average.values[0])
    assert torch.equal(param, before)


def test_the_average_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    model = tiny_model(text_rank=2)

    def evaluate(model: RelevanceModel) -> dict[str, float]:
        seen.append(weights(model))
        return {}

    train(TrainConfig(ema_decay=0.9, lr=0.03), 2, model=model, evaluate=evaluate, output=tmp_path)
    plain = train(TrainConfig(lr=0.03), 2)
    assert not torch.equal(weights(model)["query_factor"], weights(plain)["query_factor"])
    assert torch.equal(weights(model)["query_factor"], seen[-1]["query_factor"])
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    # What goes on learning is not the average: without it the run would be the same.
    train(TrainConfig(lr=0.03), 2, output=tmp_path / "plain")
    assert_same(saved["head"], load_checkpoint(tmp_path / "plain" / "checkpoint.pt")["head"])


def test_the_best_epoch_is_kept_and_the_run_stops(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    values = scores([0.2, 0.5, 0.504, 0.4, 0.9])

    def evaluate(model: RelevanceModel) -> dict[str, float]:
        seen.append(weights(model))
        return values(model)

    model = tiny_model(text_rank=2)
    config = TrainConfig(patience=2, min_delta=0.01, monitor="ap", lr=0.03)
    train(config, 5, model=model, evaluate=evaluate, output=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]  # the third did not rise by enough
    assert torch.equal(weights(model)["query_factor"], seen[1]["query_factor"])
    assert not torch.equal(seen[1]["query_factor"], seen[3]["query_factor"])


def test_a_score_that_is_not_there_is_named() -> None:
    best = BestEpoch("ap_val", 1)
    with pytest.raises(
        ValueError, match=r"monitor must be a score that validation gives, \['epoch', 'ap'\], got 'ap_v"
    ):
        best.update({"epoch": 1, "ap": 0.5}, [])
