"""Every method in Lightning's automatic optimization: the plain loop's numbers, and refusals of what would be wrong."""

from __future__ import annotations

import copy
import doctest
import importlib
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

import sam_core
import sam_core.integrations.lightning as integration
from sam_cases import BASES, DEFAULTS, METHODS, assert_bitwise, copies, method_class
from sam_core import make_closure
from sam_core.integrations.lightning import SharpnessAwareCallback

#: What docs say of each method under automatic optimization.
SUPPORT = dict.fromkeys(sam_core.METHODS, "works") | {
    "efficientsam": "raises: it needs each sample's loss; with automatic_optimization = False it works",
}
WORKS = [method for method in DEFAULTS if SUPPORT[method.removesuffix("_coupled")] == "works"]
TWO_PASS = [method for method in WORKS if method != "msam"]

pytestmark = [
    # Advice about workers and logging intervals that a run of three batches has no use for.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches .* is smaller than the logging interval"),
    # Lightning's own use of what torch is about to remove.
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]


def make_batches(num: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(num, 16, 5, generator=generator, dtype=torch.float64)
    return list(zip(inputs, torch.randint(3, (num, 16), generator=generator), strict=True))


def make_loader(num: int = 3) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(make_batches(num), batch_size=None)


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def make_optimizer(net: nn.Module, method: str, base: str = "sgd", **options) -> sam_core.OptimizerWrapper:
    return METHODS[method](net.parameters(), BASES[base][0], **{**BASES[base][1], **options})


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=9)


class Module(LightningModule):
    def __init__(self, method: str, base: str = "sgd", **options) -> None:
        super().__init__()
        self.net, self.how, self.losses = make_net(), (method, base, options), []

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.optimizers().in_second_pass:
            self.log("loss", loss)
            self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        method, base, options = self.how
        optimizer = make_optimizer(self.net, method, base, **options)
        return [optimizer], [{"scheduler": make_scheduler(optimizer), "interval": "step"}]


class Validated(Module):
    def validation_step(self, batch):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def make_trainer(*callbacks, num_epochs: int = 2, **options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {**quiet, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1, **options}
    return Trainer(max_epochs=num_epochs, callbacks=[*callbacks, SharpnessAwareCallback()], **options)


def plain_loop(method: str, num_epochs: int = 2, base: str = "sgd") -> tuple[nn.Module, list[torch.Tensor]]:
    """What a user would write without Lightning."""
    net, losses = make_net(), []
    optimizer = make_optimizer(net, method, base)
    scheduler = make_scheduler(optimizer)
    for _ in range(num_epochs):
        for batch in make_batches():
            losses.append(optimizer.step(make_closure(net, [batch], nn.functional.cross_entropy, optimizer)))
            scheduler.step()
    if method == "msam":
        optimizer.eval()
    return net, losses


def state(net: nn.Module) -> list[torch.Tensor]:
    """Weights and running statistics."""
    return [tensor.clone() for tensor in net.state_dict().values()]


# The numbers ----------------------------------------------------------------------------------------------------------


def test_every_method_is_listed():
    assert set(SUPPORT) == set(sam_core.METHODS)


@pytest.mark.parametrize("method", WORKS)
def test_automatic_optimization_is_the_plain_loop(method):
    """Weights, running statistics, the loss at w, and one count a step."""
    module, trainer = Module(method), make_trainer()
    trainer.fit(module, make_loader())
    net, losses = plain_loop(method)
    assert_bitwise(state(module.net), state(net))
    assert_bitwise(module.losses, losses)
    assert trainer.callback_metrics["loss"] == losses[-1]
    assert trainer.global_step == 6
    assert module.net[1].num_batches_tracked == 6


@pytest.mark.parametrize("method", WORKS)
def test_resume_from_a_checkpoint_is_the_uninterrupted_run(method, tmp_path, base="adamw"):
    """Three steps an epoch: LookSAM, k = 2, is interrupted between two SAM steps."""

    def trainer(num_epochs):
        saving = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
        return make_trainer(saving, num_epochs=num_epochs, enable_checkpointing=True)

    trainer(1).fit(Module(method, base), make_loader())
    module = Module(method, base)
    trainer(3).fit(module, make_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_bitwise(state(module.net), state(plain_loop(method, 3, base)[0]))


def test_bfloat16_is_the_plain_loop_under_autocast():
    batches = [(inputs.float(), targets) for inputs, targets in make_batches()]
    module = Module("sam")
    module.float()
    make_trainer(precision="bf16-mixed", num_epochs=1).fit(
        module, torch.utils.data.DataLoader(batches, batch_size=None)
    )
    net = make_net(torch.float32)
    optimizer = make_optimizer(net, "sam")
    scheduler = make_scheduler(optimizer)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            optimizer.step(make_closure(net, [batch], nn.functional.cross_entropy, optimizer))
        scheduler.step()
    assert_bitwise(state(module.net), state(net))


def test_clipping_by_the_optimizer():
    module = Module("gsam", max_grad_norm=0.1)
    make_trainer(num_epochs=1).fit(module, make_loader())
    net = make_net()
    optimizer = make_optimizer(net, "gsam", max_grad_norm=0.1)
    scheduler = make_scheduler(optimizer)
    for batch in make_batches():
        optimizer.step(make_closure(net, [batch], nn.functional.cross_entropy, optimizer))
        scheduler.step()
    assert_bitwise(state(module.net), state(net))


class Manual(Module):
    """Manual optimization: a step over two micro-batches, or by samples."""

    def __init__(self, method: str) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return make_optimizer(self.net, self.how[0])

    def training_step(self, batch):
        inner = self.optimizers(use_pl_optimizer=False)
        inputs, targets = batch
        if inner.takes_sample_losses:
            inner.step(self.sample_losses(inputs, targets))
        else:
            halves = list(zip(inputs.chunk(2), targets.chunk(2), strict=True))
            self.optimizers().step(make_closure(self.net, halves, nn.functional.cross_entropy, inner))

    def sample_losses(self, inputs, targets):
        def closure(indices=slice(None)):
            return nn.functional.cross_entropy(self.net(inputs[indices]), targets[indices], reduction="none")

        return closure


@pytest.mark.parametrize("method", ["sam", "looksam", "efficientsam"])
def test_manual_optimization_accumulates_and_takes_samples(method):
    module = Manual(method)
    make_trainer(num_epochs=1).fit(module, make_loader())
    reference = Manual(method)
    optimizer = make_optimizer(reference.net, method)
    reference.optimizers = lambda use_pl_optimizer=True: optimizer
    for batch in make_batches():
        reference.training_step(batch)
    assert_bitwise(state(module.net), state(reference.net))
    assert method == "efficientsam" or module.net[1].num_batches_tracked == 6


def test_manual_optimization_in_two_halves():
    """Of the optimizer itself, not of Lightning's view of it: LookSAM resumes exactly from what Lightning saves."""

    class Halves(Manual):
        def training_step(self, batch):
            optimizer = self.optimizers(use_pl_optimizer=False)
            closure = make_closure(self.net, [batch], nn.functional.cross_entropy, optimizer)
            optimizer.zero_grad()
            closure()
            if optimizer.second_pass_is_due():
                optimizer.first_step(zero_grad=True)
                closure()
            optimizer.step()

    module = Halves("looksam")
    trainer = make_trainer(num_epochs=1)
    trainer.fit(module, make_loader())
    net = make_net()
    optimizer = make_optimizer(net, "looksam")
    for batch in make_batches():
        optimizer.step(make_closure(net, [batch], nn.functional.cross_entropy, optimizer))
    assert_bitwise(state(module.net), state(net))
    saved, expected = trainer.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"]
    assert_bitwise(*([state[number]["sam_core.flat_grad"] for number in state] for state in (saved, expected)))


# MSAM's two sets of weights -------------------------------------------------------------------------------------------


class Watch(Callback):
    """The weights at each moment of a fit."""

    def __init__(self) -> None:
        self.seen: dict[str, list[list[torch.Tensor]]] = {}

    def look(self, name, module) -> None:
        self.seen.setdefault(name, []).append(copies(module.net))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.look("step", pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        self.look("validation", pl_module)

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.look("gradient", pl_module)


def test_msam_is_clean_whenever_no_gradient_is_taken(tmp_path):
    """For validation, any checkpoint, an average of weights and after the end; moved out for each gradient."""
    watch, average = Watch(), EMAWeightAveraging(decay=0.5)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=True)
    module = Validated("msam")
    trainer = make_trainer(watch, average, saving, enable_checkpointing=True)
    trainer.fit(module, make_loader(), make_loader(1))

    net = make_net()
    optimizer = make_optimizer(net, "msam")
    scheduler = make_scheduler(optimizer)
    ema = None
    for step, batch in enumerate(2 * make_batches()):
        assert_bitwise(watch.seen["gradient"][step], copies(net))
        optimizer.step(make_closure(net, [batch], nn.functional.cross_entropy, optimizer))
        scheduler.step()
        with optimizer.at_weights():
            clean = copies(net)
        assert_bitwise(watch.seen["step"][step], clean)
        assert not torch.equal(clean[0], copies(net)[0])
        saved = torch.load(tmp_path / f"step={step + 1}.ckpt")["state_dict"]
        assert_bitwise([saved[f"net.{name}"] for name, _ in net.named_parameters()], clean)
        ema = clean if ema is None else [0.5 * a + 0.5 * w for a, w in zip(ema, clean, strict=True)]
    assert_bitwise(watch.seen["validation"][-1], clean)
    for actual, expected in zip(copies(module.net), ema, strict=True):  # the callback leaves its average in the module
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_msam_with_the_trainers_clipping_and_loss_scaler():
    """Its only pass is where Lightning takes gradients, whoever scales and clips them."""
    batches = [(inputs.float(), targets) for inputs, targets in make_batches()]
    module = Module("msam")
    module.float()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    trainer = make_trainer(num_epochs=1, plugins=[plugin], gradient_clip_val=0.1)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

    net, scaler = make_net(torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = make_optimizer(net, "msam")
    scheduler = make_scheduler(optimizer)
    for inputs, targets in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = nn.functional.cross_entropy(net(inputs), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    optimizer.eval()
    assert_bitwise(state(module.net), state(net))
    assert not torch.equal(net[0].weight, make_net(torch.float32)[0].weight)


def test_a_failing_batch_leaves_the_weights_clean_and_statistics_alive():
    class Failing(Module):
        def training_step(self, batch):
            if len(self.losses) == 2 and (self.how[0] == "msam" or self.optimizers().in_second_pass):
                raise KeyError("training")
            return super().training_step(batch)

    for method in ("msam", "sam"):
        module, watch = Failing(method), Watch()
        with pytest.raises(KeyError, match="training"):
            make_trainer(watch).fit(module, make_loader())
        assert_bitwise(copies(module.net), watch.seen["step"][-1])
        assert module.net[1].momentum == 0.1 and module.net[1].track_running_stats


# Refusals -------------------------------------------------------------------------------------------------------------


def refuses(message: str, method: str, *callbacks, **options) -> None:
    module = Module(method)
    before = state(module.net)
    with pytest.raises(ValueError, match=message):
        make_trainer(*callbacks, **options).fit(module, make_loader())
    assert_bitwise(state(module.net), before)


def test_efficient_sam_is_refused():
    refuses(r"^optimizer must take one loss a batch in automatic optimization, got EfficientSAM, which", "efficientsam")


@pytest.mark.parametrize("method", WORKS)
def test_accumulation_is_refused(method):
    name = method_class(method).__name__
    message = rf"^accumulate_grad_batches must be 1 with {name}, got 3: the step clears gradients and would"
    refuses(message, method, accumulate_grad_batches=3)


def test_accumulation_that_begins_later_is_refused():
    module = Module("sam")
    trainer = make_trainer(GradientAccumulationScheduler({1: 2}), num_epochs=2)
    with pytest.raises(ValueError, match=r"^accumulate_grad_batches must be 1 with SAM, got 2: the step clears"):
        trainer.fit(module, make_loader())
    assert trainer.global_step == 3


@pytest.mark.parametrize("method", TWO_PASS)
def test_clipping_by_the_trainer_is_refused(method):
    name = method_class(method).__name__
    refuses(
        rf"^gradient_clip_val must be None with {name}, got 0\.5: it would clip the grad", method, gradient_clip_val=0.5
    )


@pytest.mark.parametrize("method", TWO_PASS)
def test_loss_scaling_is_refused(method):
    message = rf"^precision must do without a loss scaler with {method_class(method).__name__}, got '16-mixed': Light"
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    refuses(message, method, plugins=[scaling])


def test_other_strategies_are_refused():
    class Sharded(SingleDeviceStrategy):
        pass

    message = r"^strategy must be one device or DDP with MSAM, got Sharded, where norms over all parameters"
    refuses(message, "msam", strategy=Sharded(torch.device("cpu"), accelerator=None), accelerator="auto")


def test_other_optimizers_are_left_alone():
    class Plain(Module):
        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    results = []
    for number in (1, 0):
        module = Plain("sam")
        trainer = make_trainer(gradient_clip_val=0.5, accumulate_grad_batches=3)
        trainer.callbacks = trainer.callbacks[:number]
        trainer.fit(module, make_loader())
        results.append(state(module.net))
    assert_bitwise(*results)


def test_two_callbacks_do_no_harm(monkeypatch, tmp_path):
    """An environment may bring one by Lightning's entry point, beside the one that the user gives."""
    (tmp_path / "plugin-1.0.dist-info").mkdir()
    entry = "[lightning.pytorch.callbacks_factory]\nsam_core = sam_core.integrations.lightning:SharpnessAwareCallback\n"
    (tmp_path / "plugin-1.0.dist-info" / "entry_points.txt").write_text(entry, encoding="utf-8")
    (tmp_path / "plugin-1.0.dist-info" / "METADATA").write_text("Name: plugin\nVersion: 1.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for method in ("sam", "msam"):
        module, trainer = Module(method), make_trainer()
        assert (
            sum(isinstance(callback, SharpnessAwareCallback) for callback in trainer.callbacks) >= 2
        )  # with the one of this package, if it is installed
        trainer.fit(module, make_loader())
        assert_bitwise(state(module.net), state(plain_loop(method)[0]))


@pytest.mark.parametrize("method", ["sam", "looksam", "msam"])
def test_the_package_under_its_older_name(method):
    """pytorch_lightning has classes of its own, and the callback serves both."""
    import pytorch_lightning

    class Older(pytorch_lightning.LightningModule):
        training_step, configure_optimizers = Module.training_step, Module.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.how, self.losses = make_net(), (method, "sgd", {}), []

    module = Older()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {"max_epochs": 2, "callbacks": [SharpnessAwareCallback()], "accelerator": "cpu", **quiet}
    pytorch_lightning.Trainer(**options).fit(module, make_loader())
    assert_bitwise(state(module.net), state(plain_loop(method)[0]))
    with pytest.raises(ValueError, match=r"^accumulate_grad_batches must be 1 with \w+, got 2: the step clears"):
        pytorch_lightning.Trainer(accumulate_grad_batches=2, **options).fit(Older(), make_loader())


def test_documented_example_runs():
    names = {"torch": torch, "SAM": sam_core.SAM}
    assert doctest.testmod(integration, extraglobs=names, raise_on_error=True).attempted > 0


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "sam_core.integrations.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)
    older = importlib.import_module("sam_core.integrations.lightning").SharpnessAwareCallback
    assert older.__base__.__module__.startswith("pytorch_lightning")
    monkeypatch.delitem(sys.modules, "sam_core.integrations.lightning")
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", None)
    with pytest.raises(ImportError, match=r"^sam_core\.integrations\.lightning needs the package lightning: pip inst"):
        __import__("sam_core.integrations.lightning")


def test_a_module_survives_copying():
    """Nothing is left on the caller's module."""
    module = Module("sam")
    make_trainer(num_epochs=1).fit(module, make_loader())
    assert_bitwise(state(copy.deepcopy(module.net)), state(module.net))
    assert module.net[1].__dict__.keys() == make_net()[1].__dict__.keys()


def test_an_installation_attaches_it_to_every_trainer():
    """So that whoever forgets it is refused as well."""
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package in ("lightning.pytorch", "pytorch_lightning"):
        (target,) = project["entry-points"][f"{package}.callbacks_factory"].values()
        module, name = target.split(":")
        assert getattr(importlib.import_module(module), name) is SharpnessAwareCallback
