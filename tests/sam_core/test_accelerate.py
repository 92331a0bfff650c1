"""Every method under accelerate: prepared, resumed from its files, accumulated, scaled; and what raises there."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import sam_core
from sam_cases import BASES, DEFAULTS, METHODS, assert_bitwise, method_class
from sam_core import frozen_running_stats
from sam_core import make_closure as make_batch_closure

#: What docs say of each method in accelerate's loop.
SUPPORT = dict.fromkeys(sam_core.METHODS, "works")
WITH_BACKWARD = [method for method in DEFAULTS if not method_class(method).takes_sample_losses]
TWO_PASS = [method for method in WITH_BACKWARD if method != "msam"]


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps the first Accelerator's settings for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
    return nn.Sequential(*layers).to(dtype)


def make_loader(dtype: torch.dtype = torch.float64) -> torch.utils.data.DataLoader:
    inputs = torch.randn(24, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    dataset = torch.utils.data.TensorDataset(inputs, torch.arange(24) % 3)
    return torch.utils.data.DataLoader(dataset, batch_size=8)


class Run:
    """What docs/training_loops.md shows: closures with ``accelerator.backward``, the step of the prepared optimizer."""

    def __init__(
        self, method: str, base: str = "sgd", *, accelerator: Accelerator | None = None, dtype=torch.float64, **options
    ) -> None:
        self.accelerator = accelerator if accelerator is not None else Accelerator(cpu=True)
        net = make_net(dtype)
        self.inner = METHODS[method](net.parameters(), BASES[base][0], **{**BASES[base][1], **options})
        scheduler = torch.optim.lr_scheduler.LinearLR(self.inner, 1.0, 0.1, total_iters=9)
        prepared = self.accelerator.prepare(net, self.inner, make_loader(dtype), scheduler)
        self.net, self.optimizer, self.loader, self.scheduler = prepared

    def losses(self, batch):
        with frozen_running_stats(self.net) if self.inner.in_second_pass else torch.enable_grad():
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def closure(self, batch):
        def closure():
            loss = self.losses(batch).mean()
            self.accelerator.backward(loss)
            return loss.detach()

        def sample_losses(indices=slice(None)):
            return self.losses([tensor[indices] for tensor in batch])

        return sample_losses if self.inner.takes_sample_losses else closure

    def epoch(self) -> None:
        for batch in self.loader:
            self.optimizer.step(self.closure(batch))
            self.scheduler.step()

    def state(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.accelerator.unwrap_model(self.net).state_dict().values()]


class PlainRun(Run):
    """The same without accelerate."""

    def __init__(self, method: str, base: str = "sgd", *, dtype=torch.float64) -> None:
        self.net, self.loader, self.accelerator = make_net(dtype), make_loader(dtype), self
        self.optimizer = self.inner = METHODS[method](self.net.parameters(), BASES[base][0], **BASES[base][1])
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.inner, 1.0, 0.1, total_iters=9)

    def backward(self, loss):
        loss.backward()

    def unwrap_model(self, net):
        return net


# The numbers ----------------------------------------------------------------------------------------------------------


def test_every_method_is_listed():
    assert set(SUPPORT) == set(sam_core.METHODS) == {method.removesuffix("_coupled") for method in DEFAULTS}


@pytest.mark.parametrize("method", DEFAULTS)
def test_prepared_is_the_plain_loop(method):
    run, plain = Run(method), PlainRun(method)
    assert isinstance(run.optimizer, AcceleratedOptimizer)
    for each in (run, plain):
        torch.manual_seed(1)  # of dropout
        each.epoch()
    assert_bitwise(run.state(), plain.state())
    assert run.net[1].num_batches_tracked == 3


@pytest.mark.parametrize(("method", "clean"), [*((method, False) for method in DEFAULTS), ("msam", True)])
def test_resume_from_saved_state_is_the_uninterrupted_run(method, clean, tmp_path, base="adamw"):
    """With dropout; three steps before, so that LookSAM, k = 2, is between two SAM steps; MSAM saved at w or moved."""
    run = Run(method, base)
    run.epoch()
    with run.inner.at_weights() if clean else torch.enable_grad():
        run.accelerator.save_state(str(tmp_path))
    run.epoch()
    resumed = Run(method, base)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.epoch()
    assert_bitwise(resumed.state(), run.state())


def test_bfloat16():
    class Autocast(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(inputs).float()

    run = Run("sam", accelerator=Accelerator(cpu=True, mixed_precision="bf16"), dtype=torch.float32)
    plain = PlainRun("sam", dtype=torch.float32)
    plain.net = Autocast(plain.net)
    for each in (run, plain):
        torch.manual_seed(1)
        each.epoch()
    assert_bitwise(run.state(), plain.state())


@pytest.mark.parametrize("method", WITH_BACKWARD)
def test_a_closure_over_the_micro_batches_under_accumulate(method):
    """Steps are left out until gradients are to be synchronised; the closure then runs all of them, each a share."""
    run = Run(method, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=3))
    run.net[3].p = 0.0
    micro_batches = []
    for batch in run.loader:
        micro_batches.append(batch)
        with run.accelerator.accumulate(run.net):

            def closure():
                parts = [run.closure(micro_batch)() for micro_batch in micro_batches]
                return torch.stack(parts).mean()

            run.optimizer.step(closure)
    reference = PlainRun(method)
    reference.net[3].p = 0.0
    batches, loss_fn = list(reference.loader), nn.functional.cross_entropy
    reference.inner.step(make_batch_closure(reference.net, batches, loss_fn, reference.inner))
    for actual, expected in zip(run.state(), reference.state(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert run.net[1].num_batches_tracked == 3


@pytest.mark.parametrize("method", WITH_BACKWARD)
def test_clipping_by_the_optimizer(method):
    """The docs say max_grad_norm, and this is what it does under accelerate."""
    run, plain = Run(method, max_grad_norm=0.1), PlainRun(method)
    plain.inner.max_grad_norm = 0.1
    for each in (run, plain):
        torch.manual_seed(1)
        each.epoch()
    assert_bitwise(run.state(), plain.state())


# float16's loss scaler, which accelerate has on a GPU alone -----------------------------------------------------------


def scaled(method: str) -> Run:
    run = Run(method)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run.optimizer = AcceleratedOptimizer(run.inner, scaler=run.accelerator.scaler)
    return run


@pytest.mark.parametrize("method", WITH_BACKWARD)
def test_the_prepared_step_with_a_scaler_raises(method):
    """accelerate asks the scaler for its step before the closure has scaled a loss."""
    run = scaled(method)
    before = run.state()
    batch = next(iter(run.loader))
    with pytest.raises(AssertionError, match=r"^Attempted step but _scale is None\."):
        run.optimizer.step(run.closure(batch))
    assert_bitwise(run.state(), before)


@pytest.mark.parametrize("method", WITH_BACKWARD)
def test_the_inner_step_with_a_scaler_is_the_unscaled_one(method):
    run, plain = scaled(method), PlainRun(method)
    scaler = run.accelerator.scaler
    for each in (run, plain):
        torch.manual_seed(1)
        for batch in each.loader:
            if each is run:
                run.inner.step(run.closure(batch), grad_scaler=scaler)
                scaler.update()
            else:
                plain.inner.step(plain.closure(batch))
    assert_bitwise(run.state(), plain.state())  # a power of two loses no bit
    assert scaler.get_scale() == 2.0**10


# What raises, and MSAM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*TWO_PASS, "efficientsam"])
def test_a_step_without_closure_raises_with_two_passes(method):
    run = Run(method)
    batch = next(iter(run.loader))
    run.accelerator.backward(run.losses(batch).mean())
    with pytest.raises(ValueError, match=r"^closure must be given, got None: the second pass needs it\. Or use first"):
        run.optimizer.step()


@pytest.mark.parametrize("method", TWO_PASS)
def test_the_two_halves_end_with_the_prepared_step(method):
    """For loops with the form of a plain optimizer's: backward, first_step, backward, step."""
    run, plain = Run(method), PlainRun(method)
    for each in (run, plain):
        torch.manual_seed(1)
        for batch in each.loader:
            closure = each.closure(batch)
            if each is run and run.inner.second_pass_is_due():
                closure()
                run.inner.first_step(zero_grad=True)
                closure()
                run.optimizer.step()
                run.optimizer.zero_grad()
            elif each is run:
                closure()
                run.optimizer.step()
                run.optimizer.zero_grad()
            else:
                plain.inner.step(closure)
    assert_bitwise(run.state(), plain.state())


def test_msam_in_the_plain_loop_with_accumulation():
    run = Run("msam", accelerator=Accelerator(cpu=True, gradient_accumulation_steps=3))
    run.net[3].p = 0.0
    for batch in [*run.loader, *run.loader]:
        with run.accelerator.accumulate(run.net):
            run.closure(batch)()
            run.optimizer.step()
            run.optimizer.zero_grad()
    reference = PlainRun("msam")
    reference.net[3].p = 0.0
    batches, loss_fn = list(reference.loader), nn.functional.cross_entropy
    for _ in range(2):
        reference.inner.step(make_batch_closure(reference.net, batches, loss_fn, reference.inner))
    moved = run.state()
    for actual, expected in zip(moved, reference.state(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    run.optimizer.eval()  # accelerate hands it on
    reference.inner.eval()
    assert not torch.equal(run.state()[0], moved[0])
    torch.testing.assert_close(run.state()[0], reference.state()[0], rtol=1e-10, atol=1e-12)
