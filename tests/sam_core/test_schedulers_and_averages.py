"""torch's learning-rate schedulers and averages of weights over every method: attached, stepped, resumed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from sam_cases import BASES, DEFAULTS, METHODS, assert_bitwise, copies, make_batch, make_closure, make_model

SCHEDULERS = {
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, 1.0, total_iters=5),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        milestones=[3],
    ),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5),
    "swa": lambda optimizer: SWALR(optimizer, swa_lr=0.02, anneal_epochs=4),
}


def build(model: nn.Module, method: str, base: str = "sgd", **options):
    return METHODS[method](model.parameters(), BASES[base][0], **{**BASES[base][1], **options})


def train(model, optimizer, scheduler, num_steps, method="sam", first=0):
    """Steps with a batch of their own each; the options that the scheduler has set for each of them."""
    settings = []
    for step in range(first, first + num_steps):
        group = optimizer.param_groups[0]
        settings.append((group["lr"], group.get("momentum"), group.get("betas")))
        losses = optimizer.step(make_closure(model, make_batch(step), method=method))
        loss = (step,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()
        assert losses is not None
        scheduler.step(*loss)
    return settings


@pytest.fixture(params=SCHEDULERS)
def make_scheduler(request):
    return SCHEDULERS[request.param]


@pytest.fixture(params=BASES)
def base(request):
    return request.param


# Schedulers; a warning of theirs would be an error here ---------------------------------------------------------------


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_scheduler_sets_what_it_sets_for_the_base_optimizer(method, base, make_scheduler):
    """The learning rate, and with one_cycle the momentum or beta, step by step."""
    model, plain = make_model(), make_model()
    optimizer, reference = build(model, method, base), BASES[base][0](plain.parameters(), **BASES[base][1])
    scheduler, expected = make_scheduler(optimizer), make_scheduler(reference)
    assert train(model, optimizer, scheduler, 8, method) == train(plain, reference, expected, 8)


def test_a_scheduler_of_the_base_optimizer_serves_as_well(make_scheduler):
    results = []
    for attach in (lambda optimizer: optimizer, lambda optimizer: optimizer.base_optimizer):
        model = make_model()
        optimizer = build(model, "sam")
        train(model, optimizer, make_scheduler(attach(optimizer)), 8)
        results.append(copies(model))
    assert_bitwise(*results)


def test_without_a_radius_it_is_the_base_optimizer_under_the_schedule(base, make_scheduler):
    model, plain = make_model(), make_model()
    optimizer, reference = build(model, "sam", base, rho=0.0), BASES[base][0](plain.parameters(), **BASES[base][1])
    train(model, optimizer, make_scheduler(optimizer), 8)
    scheduler = make_scheduler(reference)
    for step in range(8):
        reference.zero_grad()
        make_closure(plain, make_batch(step))()
        reference.step()
        scheduler.step(*((step,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()))
    assert_bitwise(copies(model), copies(plain))


@pytest.mark.parametrize("method", DEFAULTS)
def test_resume_with_a_scheduler_is_the_uninterrupted_run(method, make_scheduler, base="adamw"):
    """Five steps, so that LookSAM, k = 2, is between two SAM steps; through a file."""
    whole = make_model()
    optimizer = build(whole, method, base)
    train(whole, optimizer, make_scheduler(optimizer), 8, method)

    first = make_model()
    optimizer = build(first, method, base)
    scheduler = make_scheduler(optimizer)
    train(first, optimizer, scheduler, 5, method)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved = torch.load(file)

    resumed = make_model()
    with torch.no_grad():
        resumed[0].weight.zero_()
    optimizer = build(resumed, method, base)
    scheduler = make_scheduler(optimizer)
    for part, state in zip((resumed, optimizer, scheduler), saved, strict=True):
        part.load_state_dict(state)
    train(resumed, optimizer, scheduler, 3, method, first=5)
    assert_bitwise(copies(resumed), copies(whole))


# Averages of weights --------------------------------------------------------------------------------------------------


def average(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def train_averaged(model, optimizer, ema, method, num_steps, first=0):
    """As the docs say: the average takes in the clean weights. What it has taken in."""
    seen = []
    for step in range(first, first + num_steps):
        optimizer.step(make_closure(model, make_batch(step), method=method))
        with optimizer.at_weights():
            ema.update_parameters(model)
            seen.append(copies(model))
    return seen


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_average_is_that_of_clean_weights(method, base):
    model = make_model()
    optimizer, ema = build(model, method, base), average(model)
    before = copies(model)
    seen = train_averaged(model, optimizer, ema, method, 4)
    expected = seen[0]  # torch starts with the first it is given
    for weights in seen[1:]:
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, weights, strict=True)]
    for actual, value, start in zip(copies(ema.module), expected, before, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-14)
        assert not torch.equal(actual, start)


def test_outside_the_block_msam_would_average_moved_weights(base):
    """Why the block is in the docs."""
    model = make_model()
    optimizer, ema = build(model, "msam", base), average(model)
    for step in range(2):
        optimizer.step(make_closure(model, make_batch(step)))
    ema.update_parameters(model)
    with optimizer.at_weights():
        assert not torch.equal(copies(ema.module)[0], copies(model)[0])


@pytest.mark.parametrize("method", DEFAULTS)
def test_resume_with_an_average_is_the_uninterrupted_run(method, base="adamw"):
    whole = make_model()
    ema = average(whole)
    train_averaged(whole, build(whole, method, base), ema, method, 6)

    first = make_model()
    optimizer, first_ema = build(first, method, base), average(first)
    train_averaged(first, optimizer, first_ema, method, 3)
    saved = copy.deepcopy([part.state_dict() for part in (first, optimizer, first_ema)])

    resumed = make_model()
    optimizer, resumed_ema = build(resumed, method, base), average(resumed)
    for part, state in zip((resumed, optimizer, resumed_ema), saved, strict=True):
        part.load_state_dict(state)
    train_averaged(resumed, optimizer, resumed_ema, method, 3, first=3)
    assert_bitwise(copies(resumed_ema.module), copies(ema.module))
    assert_bitwise(copies(resumed), copies(whole))


def test_running_statistics_of_the_average():
    """update_bn is a pass over the data with the averaged weights, whatever trained them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer, ema = build(model, "msam"), average(model)
    train_averaged(model, optimizer, ema, "msam", 3)
    batches = [make_batch(step)[0] for step in range(4)]
    update_bn(batches, ema)
    hidden = [ema.module[0](inputs) for inputs in batches]
    expected = torch.stack([h.mean(0) for h in hidden]).mean(0)
    torch.testing.assert_close(ema.module[1].running_mean, expected.detach(), rtol=1e-12, atol=1e-14)
