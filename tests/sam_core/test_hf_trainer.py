"""Every method in Hugging Face's Trainer: the plain loop's numbers through SAMTrainer, and refusals elsewhere."""

from __future__ import annotations

import doctest
import gc
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import sam_core
import sam_core.integrations.hugging_face as integration
from sam_cases import BASES, DEFAULTS, METHODS, assert_bitwise, copies, method_class
from sam_core import make_closure
from sam_core.integrations.hugging_face import SAMTrainer

#: What docs say of each method in SAMTrainer. In transformers' own Trainer those of two passes raise.
SUPPORT = dict.fromkeys(sam_core.METHODS, "works") | {"efficientsam": "raises: it needs each sample's loss"}
WORKS = [method for method in DEFAULTS if SUPPORT[method.removesuffix("_coupled")] == "works"]
BOTH_GRADIENTS = ["gsam", "wsam", "wsam_coupled", "looksam"]  # their step is made of both, so that one is not clipped


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """Each ``train`` of the Trainer collects garbage, among all that transformers and torch have loaded: a second."""
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    """What a transformers model looks like to the Trainer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3)
        self.layers = nn.Sequential(*layers).double()
        self.num_calls = 0

    def forward(self, inputs, labels=None):
        self.num_calls += self.training
        logits = self.layers(inputs)
        return {"logits": logits} | (
            {"loss": nn.functional.cross_entropy(logits, labels)} if labels is not None else {}
        )


def make_data(num: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(num, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (num,), generator=generator)
    return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]


def make_batches(size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = make_data()
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return [tuple(torch.stack([sample[name] for sample in part]) for name in ("inputs", "labels")) for part in parts]


def make_optimizer(net: nn.Module, method: str, base: str = "sgd", **options) -> sam_core.OptimizerWrapper:
    return METHODS[method](net.parameters(), BASES[base][0], **{**BASES[base][1], **options})


def make_trainer(
    net: nn.Module, folder, method: str, base: str = "sgd", *, kind=SAMTrainer, options=None, callbacks=(), **arguments
) -> Trainer:
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 8}
    chosen = {"num_train_epochs": 2, "max_grad_norm": 0, "save_strategy": "no", "logging_steps": 1, **arguments}
    order = {"train_sampling_strategy": "sequential"} if "train_sampling_strategy" not in arguments else {}
    compute_loss = chosen.pop("compute_loss_func", None)
    trainer = kind(
        net,
        TrainingArguments(str(folder), **fixed, **order, **chosen),
        train_dataset=make_data(),
        eval_dataset=make_data(16),
        compute_loss_func=compute_loss,
        callbacks=list(callbacks),
        optimizers=(make_optimizer(net, method, base, **(options or {})), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def plain_loop(net: Net, method: str, accumulation: int = 1, base: str = "sgd", **options) -> list[torch.Tensor]:
    """Two epochs as a user would write them without a Trainer; the losses at w."""
    optimizer = make_optimizer(net, method, base, **options)
    batches, losses = make_batches(), []
    num_steps = 2 * math.ceil(len(batches) / accumulation)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (num_steps - step) / num_steps))
    for _ in range(2):
        for start in range(0, len(batches), accumulation):
            parts = batches[start : start + accumulation]
            closure = make_closure(net.layers, parts, nn.functional.cross_entropy, optimizer)
            losses.append(optimizer.step(closure))
            scheduler.step()
    if method == "msam":
        optimizer.eval()
    return losses


def state(net: nn.Module) -> list[torch.Tensor]:
    """Weights and running statistics."""
    return [tensor.clone() for tensor in net.state_dict().values()]


# The numbers ----------------------------------------------------------------------------------------------------------


def test_every_method_is_listed():
    assert set(SUPPORT) == set(sam_core.METHODS)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", WORKS)
def test_sam_trainer_is_the_plain_loop(method, accumulation, tmp_path):
    """Weights, running statistics and losses; five batches, so that the last of two is one alone."""
    net, reference = Net(), Net()
    trainer = make_trainer(net, tmp_path, method, gradient_accumulation_steps=accumulation)
    trainer.train()
    losses = plain_loop(reference, method, accumulation)
    assert_bitwise(state(net), state(reference))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([loss.item() for loss in losses], rel=1e-6)
    assert trainer.state.global_step == len(losses)


def test_passes(tmp_path):
    """LookSAM spares the second pass between its own steps; MSAM always."""
    for method, num_calls in (("sam", 20), ("looksam", 15), ("msam", 10)):
        net = Net()
        make_trainer(net, tmp_path, method).train()
        assert net.num_calls == num_calls


@pytest.mark.parametrize("method", WORKS)
def test_resume_from_a_checkpoint_is_the_uninterrupted_run(method, tmp_path, base="adamw"):
    """In the midst of an epoch, shuffled and with dropout, and LookSAM, k = 2, between two SAM steps."""

    def trainer(net):
        arguments = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
        return make_trainer(net, tmp_path, method, base, **arguments)

    whole, resumed = Net(dropout=0.3), Net(dropout=0.3)
    trainer(whole).train()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_bitwise(state(resumed), state(whole))
    assert resumed.num_calls < whole.num_calls


@pytest.mark.parametrize("method", [method for method in WORKS if method not in BOTH_GRADIENTS])
def test_the_trainer_clips_as_the_optimizer_does(method, tmp_path):
    net, reference = Net(), Net()
    make_trainer(net, tmp_path, method, max_grad_norm=0.05).train()
    plain_loop(reference, method, max_grad_norm=0.05)
    for actual, expected in zip(state(net), state(reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("method", BOTH_GRADIENTS)
def test_the_optimizer_clips_where_the_trainer_may_not(method, tmp_path):
    net, reference = Net(), Net()
    make_trainer(net, tmp_path, method, options={"max_grad_norm": 0.05}).train()
    plain_loop(reference, method, max_grad_norm=0.05)
    assert_bitwise(state(net), state(reference))


def test_losses_over_the_samples_of_a_whole_step(tmp_path):
    """num_items_in_batch: a sum of losses over micro-batches of 8, 8 and 4, divided by all 20 in both passes."""

    def mean_loss(outputs, labels, num_items_in_batch):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    net, reference = Net(), Net()
    trainer = make_trainer(net, tmp_path, "gsam", gradient_accumulation_steps=3, compute_loss_func=mean_loss)
    trainer.train_dataset = make_data()[:20]
    trainer.train()
    optimizer = make_optimizer(reference, "gsam")
    batches = [make_batches()[0], make_batches()[1], tuple(tensor[:4] for tensor in make_batches()[2])]
    for factor in (1.0, 0.5):
        optimizer.param_groups[0]["lr"] = factor * BASES["sgd"][1]["lr"]
        optimizer.step(make_closure(reference.layers, batches, nn.functional.cross_entropy, optimizer))
    for actual, expected in zip(state(net), state(reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_bfloat16_is_the_plain_loop_under_autocast(tmp_path):
    net, reference = Net().float(), Net().float()
    trainer = make_trainer(net, tmp_path, "sam", bf16=True, lr_scheduler_type="constant")
    trainer.data_collator = lambda samples: {
        "inputs": torch.stack([sample["inputs"].float() for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }
    trainer.train()
    optimizer = make_optimizer(reference, "sam")

    for inputs, labels in 2 * make_batches():

        def closure(inputs=inputs, labels=labels):
            frozen = sam_core.frozen_running_stats(reference) if optimizer.in_second_pass else torch.enable_grad()
            with frozen, torch.autocast("cpu", torch.bfloat16):
                loss = reference(inputs.float(), labels)["loss"]
            loss.backward()

        optimizer.step(closure)
    assert_bitwise(state(net), state(reference))


def test_a_bad_gradient_is_skipped_in_either_pass(tmp_path):
    class Bad(Net):
        def forward(self, inputs, labels):
            outputs = super().forward(inputs, labels)
            return {**outputs, "loss": outputs["loss"] * (math.nan if self.num_calls in self.bad else 1)}

    for bad in ({1}, {2}):
        net = Bad()
        net.bad, before = bad, copies(net)
        trainer = make_trainer(net, tmp_path, "sam", options={"nonfinite": "skip"}, max_steps=1)
        trainer.train()
        assert_bitwise(copies(net), before)
        assert trainer.optimizer.optimizer.num_skipped == 1


def test_an_error_in_the_second_pass_leaves_the_weights_at_w(tmp_path):
    class Failing(Net):
        def forward(self, inputs, labels):
            if self.num_calls == 3:
                raise KeyError("second pass")
            return super().forward(inputs, labels)

    net, reference = Failing(), Net()
    with pytest.raises(KeyError, match="second pass"):
        make_trainer(net, tmp_path, "sam", lr_scheduler_type="constant").train()
    optimizer = make_optimizer(reference, "sam")
    optimizer.step(make_closure(reference.layers, make_batches()[:1], nn.functional.cross_entropy, optimizer))
    assert_bitwise(copies(net), copies(reference))
    assert net.layers[1].momentum == 0.1 and net.layers[1].track_running_stats


def test_an_error_between_micro_batches_leaves_none_behind(tmp_path):
    class Failing(Net):
        fails = True

        def forward(self, inputs, labels=None):
            if self.num_calls == 1 and self.fails:
                raise KeyError("second micro-batch")
            return super().forward(inputs, labels)

    net, reference = Failing(), Net()
    trainer = make_trainer(net, tmp_path, "sam", gradient_accumulation_steps=2)
    with pytest.raises(KeyError, match="second micro-batch"):
        trainer.train()
    net.fails = False
    trainer.train()
    reference.layers(make_batches()[0][0])  # what batch normalisation has seen
    plain_loop(reference, "sam", accumulation=2)
    assert_bitwise(state(net), state(reference))


# MSAM's two sets of weights -------------------------------------------------------------------------------------------


def test_msam_is_clean_whenever_no_gradient_is_taken(tmp_path):
    """For callbacks, evaluation, files and after the end; moved out for the gradients."""

    class Watching(Net):
        def forward(self, inputs, labels):
            (moved if self.training else evaluated).append(copies(self))
            return super().forward(inputs, labels)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            stepped.append(copies(net))

    moved, evaluated, stepped = [], [], []
    net, reference = Watching(), Net()
    arguments = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    arguments |= {"lr_scheduler_type": "constant", "per_device_eval_batch_size": 16}
    trainer = make_trainer(net, tmp_path, "msam", callbacks=[Watch()], **arguments)
    trainer.train()

    optimizer = make_optimizer(reference, "msam")
    for step, batch in enumerate(2 * make_batches()):
        assert_bitwise(moved[step], copies(reference))
        optimizer.step(make_closure(reference.layers, [batch], nn.functional.cross_entropy, optimizer))
        with optimizer.at_weights():
            clean = copies(reference)
        assert not torch.equal(clean[0], copies(reference)[0])
        assert_bitwise(stepped[step], clean)
        assert_bitwise(evaluated[step], clean)
        saved = load_file(tmp_path / f"checkpoint-{step + 1}" / "model.safetensors")
        assert_bitwise([saved[name] for name, _ in net.named_parameters()], clean)
    assert_bitwise(copies(net), clean)
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "end"))
    saved = load_file(tmp_path / "end" / "model.safetensors")
    assert_bitwise([saved[name] for name, _ in net.named_parameters()], clean)


def test_msam_is_clean_after_an_error(tmp_path):
    class Failing(Net):
        def forward(self, inputs, labels=None):
            if self.num_calls == 3:
                raise KeyError("fourth step")
            clean.append(copies(self))
            return super().forward(inputs, labels)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clean.append(copies(net))

    net, clean = Failing(), []
    with pytest.raises(KeyError, match="fourth step"):
        make_trainer(net, tmp_path, "msam", callbacks=[Watch()]).train()
    assert not torch.equal(clean[-2][0], clean[-1][0])
    assert_bitwise(copies(net), clean[-1])


def test_msam_ends_at_the_best_checkpoint(tmp_path):
    net = Net()
    arguments = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(net, tmp_path, "msam", load_best_model_at_end=True, options={"lr": 3.0}, **arguments)
    trainer.train()
    best = load_file(trainer.state.best_model_checkpoint + "/model.safetensors")
    assert not trainer.state.best_model_checkpoint.endswith("-10")
    assert_bitwise(state(net), [best[name] for name in net.state_dict()])


# Refusals -------------------------------------------------------------------------------------------------------------


def refuses(message: str, method: str, folder, **arguments) -> None:
    net = Net()
    before = state(net)
    with pytest.raises(ValueError, match=message):
        make_trainer(net, folder, method, **arguments).train()
    assert_bitwise(state(net), before)


@pytest.mark.parametrize("method", [method for method in DEFAULTS if method != "msam"])
def test_the_plain_trainer_raises_with_two_passes(method, tmp_path):
    net = Net()
    before = copies(net)
    with pytest.raises(ValueError, match=r"^closure must be given, got None: the second pass needs it\. Or use first"):
        make_trainer(net, tmp_path, method, kind=Trainer).train()
    assert_bitwise(copies(net), before)


def test_the_plain_trainer_trains_msam_and_evaluates_clean_weights(tmp_path):
    net, reference = Net(), Net()
    trainer = make_trainer(net, tmp_path, "msam", kind=Trainer)
    trainer.train()
    plain_loop(reference, "msam")
    assert not torch.equal(copies(net)[0], copies(reference)[0])
    trainer.evaluate()
    assert_bitwise(copies(net), copies(reference))


def test_efficient_sam_is_refused(tmp_path):
    refuses(
        r"^optimizer must take one loss a batch, got EfficientSAM, which needs each sample's\.$",
        "efficientsam",
        tmp_path,
    )


@pytest.mark.parametrize("method", BOTH_GRADIENTS)
def test_clipping_one_of_two_gradients_is_refused(method, tmp_path):
    name = method_class(method).__name__
    message = rf"^max_grad_norm must be 0 with {name}, got 1\.0: the Trainer would clip the second gradient alone"
    refuses(message, method, tmp_path, max_grad_norm=1.0)


@pytest.mark.parametrize("method", [method for method in WORKS if method != "msam"])
def test_loss_scaling_is_refused(method, tmp_path):
    trainer = make_trainer(Net(), tmp_path, method)
    trainer.args.fp16 = True  # transformers itself refuses it on a CPU
    with pytest.raises(ValueError, match=rf"^fp16 must be False with {method_class(method).__name__}, got True: the"):
        trainer.create_optimizer()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused(kind, tmp_path, monkeypatch):
    trainer = make_trainer(Net(), tmp_path, "msam")
    distributed = type(trainer.accelerator.distributed_type)[kind]
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", property(lambda self: distributed))
    message = rf"^SAMTrainer must run on one device or with DistributedDataParallel, got {kind} with MSAM: there norms"
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()


def test_other_optimizers_are_left_alone(tmp_path):
    results = []
    for kind in (Trainer, SAMTrainer):
        net = Net(dropout=0.3)
        trainer = make_trainer(net, tmp_path, "sam", kind=kind, gradient_accumulation_steps=2, max_grad_norm=0.1)
        trainer.optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        trainer.train()
        results.append(state(net))
    assert_bitwise(*results)


def test_documented_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "SAM": sam_core.SAM}
    assert doctest.testmod(integration, extraglobs=names, raise_on_error=True).attempted > 0


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sam_core.integrations.hugging_face")
    with pytest.raises(ImportError, match=r"^sam_core\.integrations\.hugging_face needs transformers and accelerate:"):
        __import__("sam_core.integrations.hugging_face")
